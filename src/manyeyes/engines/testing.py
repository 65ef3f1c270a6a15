"""The contract of an engine as suites of tests: inherit those that the engine claims, and every promise is checked.

    class TestLocal(EngineContract, WorkerProcessContract, GangContract):
        engine_name = "local"

The tasks stand here, not in a test file, because workers import them.
"""

# The name of a test says what is promised.
# ruff: noqa: D102

from __future__ import annotations

import functools
import json
import operator
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from manyeyes.engines.base import MAX_ATTEMPTS, Engine, GangContext
from manyeyes.engines.registry import create_engine
from manyeyes.errors import EngineError, ImageError, MissingExtraError, Reason, TaskError, UsageError

# How long processes may take to come or to go away, on a machine that does much else.
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class ScriptedTask:
    """A task whose first `num_failures` attempts fail; attempts are counted by files in `directory`."""

    directory: str
    name: str
    num_failures: int = 0


class _EngineSuite:
    """An engine to test.

    Attributes:
        engine_name: its name in the registry.
        num_workers: the number of workers that the engine is made with.
        knows_signals: whether the engine can tell by which signal a worker ended.
        patience_seconds: how long a job may take to start its first tasks, and to go away when it is cancelled.
    """

    engine_name: str
    num_workers = 2
    knows_signals = True
    patience_seconds = _PATIENCE_SECONDS

    def engine_settings(self) -> dict[str, Any]:
        """The settings that the engine is made with; plain values, as they travel to drivers by their repr."""
        return {}

    @pytest.fixture
    def engine(self) -> Engine:
        """The engine under test."""
        return create_engine(self.engine_name, self.num_workers, self.engine_settings())

    def start_driver(self, function: Callable[..., None], *arguments: object) -> subprocess.Popen[bytes]:
        """Run a function of this module in a driver with a session of its own, so that all it leaves can be found."""
        made = (self.engine_name, self.num_workers, self.engine_settings())
        code = f"from manyeyes.engines import testing; testing.{function.__name__}(*{(*made, *arguments)!r})"
        return subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)

    def orphans(self, driver: subprocess.Popen[bytes]) -> list[object]:
        """What a driver left behind, if anything: processes; on a cluster also jobs."""
        return list(processes_of_session(driver.pid))


class EngineContract(_EngineSuite):
    """What every engine does."""

    def test_it_is_an_engine_with_its_name(self, engine: Engine) -> None:
        assert isinstance(engine, Engine)
        assert engine.name == self.engine_name

    def test_results_are_in_the_order_of_the_items(self, engine: Engine) -> None:
        delays = [0.2, 0.0, 0.1, 0.0, 0.05]
        assert engine.map(sleep_and_return, delays) == delays

    def test_hundreds_of_tasks_each_report_once_in_the_driver(self, engine: Engine) -> None:
        seen: dict[int, int] = {}
        process_ids = set()

        def on_result(index: int, result: int) -> None:
            assert index not in seen
            seen[index] = result
            process_ids.add(os.getpid())

        results = engine.map(functools.partial(operator.mul, 3), range(300), on_result=on_result)
        assert results == [3 * item for item in range(300)]
        assert seen == dict(enumerate(results))
        assert process_ids == {os.getpid()}

    def test_no_items_give_no_results(self, engine: Engine) -> None:
        assert engine.map(sleep_and_return, []) == []
        assert engine.map_reduce(sleep_and_return, operator.add, []) is None

    def test_map_reduce_equals_the_sequential_reduce(self, engine: Engine) -> None:
        items = range(57)
        assert engine.map_reduce(square, operator.add, items) == sum(item * item for item in items)

    def test_map_reduce_takes_none_for_a_result(self, engine: Engine) -> None:
        assert engine.map_reduce(return_none, keep_both, range(2)) == (None, None)

    def test_a_task_that_fails_for_a_while_is_tried_again(self, engine: Engine, tmp_path: Path) -> None:
        tasks = [ScriptedTask(str(tmp_path), f"task{i}", i % MAX_ATTEMPTS) for i in range(6)]
        assert engine.map(run_scripted, tasks) == [task.name for task in tasks]
        assert [count_attempts(task) for task in tasks] == [task.num_failures + 1 for task in tasks]

    def test_a_task_that_always_fails_is_named_with_its_remote_traceback(self, engine: Engine, tmp_path: Path) -> None:
        tasks = [ScriptedTask(str(tmp_path), f"task{i}", 99 if i == 2 else 0) for i in range(4)]
        with pytest.raises(TaskError, match=r"Task 2 \(run_scripted\) failed 3 times: RuntimeError") as caught:
            engine.map(run_scripted, tasks)
        assert caught.value.index == 2
        assert "raise RuntimeError(f'scripted failure" in caught.value.remote_traceback.replace('"', "'")
        assert count_attempts(tasks[2]) == MAX_ATTEMPTS

    def test_an_error_of_manyeyes_reaches_the_driver_as_itself_and_at_once(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        task = ScriptedTask(str(tmp_path), "bad image")
        with pytest.raises(ImageError, match="truncated: half of it") as caught:
            engine.map(raise_image_error, [task])
        assert caught.value.reason is Reason.TRUNCATED
        assert count_attempts(task) == 1
        with pytest.raises(MissingExtraError, match=r"plots needs .*manyeyes\[plots\]"):
            engine.map(raise_missing_extra, [0])

    def test_a_task_that_leaves_python_does_not_end_the_driver(self, engine: Engine) -> None:
        with pytest.raises(TaskError, match="Task 0"):
            engine.map(sys.exit, [7])

    def test_items_may_be_larger_than_memory_in_sum(self, tmp_path: Path) -> None:
        driver = self.start_driver(large_items_driver, str(tmp_path))
        assert driver.wait(timeout=300) == 0
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["num_bytes"] == 80 << 23
        # What an engine itself needs, such as PySpark's modules, is up to 100 MiB of it.
        assert report["growth_bytes"] < report["num_bytes"] / 2

    @pytest.mark.parametrize("how", ["interrupt", "kill"])
    def test_a_cancelled_driver_leaves_no_orphans(self, how: str, tmp_path: Path) -> None:
        driver = self.start_driver(endless_driver, str(tmp_path))
        wait_until(
            lambda: len(list(tmp_path.iterdir())) >= self.num_workers or driver.poll() is not None,
            self.patience_seconds,
        )
        assert driver.poll() is None
        if how == "interrupt":
            # As a terminal does it: to every process of the group.
            os.killpg(driver.pid, signal.SIGINT)
        else:
            os.kill(driver.pid, signal.SIGKILL)
        assert driver.wait(timeout=self.patience_seconds) != 0
        wait_until(lambda: not self.orphans(driver), self.patience_seconds)
        assert self.orphans(driver) == []


class LazyContract(_EngineSuite):
    """What engines do that feed tasks one by one; a batch system takes all items before it starts."""

    def test_a_single_item_is_the_result_of_its_reduce(self, engine: Engine) -> None:
        assert engine.map_reduce(square, operator.add, [5]) == 25

    def test_items_are_drawn_only_as_workers_come_free(self, engine: Engine) -> None:
        alive: weakref.WeakSet[LargeItem] = weakref.WeakSet()
        most_alive = 0

        def items() -> Iterator[LargeItem]:
            nonlocal most_alive
            for _ in range(60):
                item = LargeItem(b"x")
                alive.add(item)
                most_alive = max(most_alive, len(alive))
                yield item

        assert engine.map_reduce(size_of_item, operator.add, items()) == 60
        assert most_alive <= 3 * engine.num_workers + 2


class WorkerProcessContract(_EngineSuite):
    """What engines do whose tasks run in processes of their own."""

    def test_a_killed_worker_is_replaced_and_its_task_tried_again(self, engine: Engine, tmp_path: Path) -> None:
        tasks = [ScriptedTask(str(tmp_path), f"task{i}", 1 if i % 3 == 0 else 0) for i in range(12)]
        assert engine.map(kill_scripted, tasks) == [task.name for task in tasks]

    def test_a_task_that_always_kills_its_worker_is_named_and_harms_no_other(
        self, engine: Engine, tmp_path: Path
    ) -> None:
        tasks = [ScriptedTask(str(tmp_path), f"task{i}", 99 if i == 3 else 0) for i in range(12)]
        cause = "SIGKILL" if self.knows_signals else "killed"
        with pytest.raises(TaskError, match=rf"Task 3 \(kill_scripted\) ended its worker 3 times .*{cause}") as caught:
            engine.map(kill_scripted, tasks)
        assert caught.value.index == 3
        assert count_attempts(tasks[3]) == MAX_ATTEMPTS
        assert all(count_attempts(task) <= 1 for task in tasks if task is not tasks[3])

    def test_what_can_not_travel_to_a_worker_is_said(self, engine: Engine) -> None:
        with pytest.raises(EngineError, match="top level of a module"):
            engine.map(lambda item: item, [1])
        with pytest.raises(EngineError, match="Item 0"):
            engine.map(return_none, [lambda: None])
        with pytest.raises(TaskError, match="Task 0"):
            engine.map(return_lambda, [1])


class GangContract(_EngineSuite):
    """What engines do that run gangs."""

    def test_a_gang_of_one_runs(self, engine: Engine) -> None:
        assert engine.gang(rank_and_size, 1) == [(0, 1)]

    def test_a_gang_of_none_is_refused(self, engine: Engine) -> None:
        with pytest.raises(UsageError, match="A gang of 0 workers"):
            engine.gang(rank_and_size, 0)

    def test_all_ranks_of_a_gang_run_at_once_and_reach_each_other(self, engine: Engine) -> None:
        assert engine.gang(meet_everyone, 2) == [[0, 1], [0, 1]]

    def test_every_gang_has_processes_of_its_own(self, engine: Engine) -> None:
        # What a rank sets up for its process, such as TensorFlow's collectives, must not meet that of an earlier gang.
        assert len({process_id for _ in range(2) for process_id in engine.gang(own_process_id, 2)}) == 4

    @pytest.mark.parametrize("fault", ["raise", "kill", "manyeyes"])
    def test_a_failing_rank_fails_its_gang_and_stops_the_others(
        self, engine: Engine, fault: str, tmp_path: Path
    ) -> None:
        expected = {
            "raise": (TaskError, "Worker 1 .*scripted"),
            "kill": (TaskError, "Worker 1 .*" + ("SIGKILL" if self.knows_signals else "killed")),
            "manyeyes": (ImageError, "corrupt"),
        }
        error, message = expected[fault]
        with pytest.raises(error, match=message):
            engine.gang(functools.partial(fail_on_rank_1, fault, str(tmp_path)), 2)
        process_ids = [int(path.name) for path in tmp_path.iterdir()]
        assert len(process_ids) == 2
        wait_until(lambda: not any(Path(f"/proc/{process_id}").exists() for process_id in process_ids))
        assert not any(Path(f"/proc/{process_id}").exists() for process_id in process_ids)


class LargeItem:
    """Bytes that can be watched while they live."""

    def __init__(self, content: bytes) -> None:
        self.content = content


def sleep_and_return(seconds: float) -> float:
    """Task."""
    time.sleep(seconds)
    return seconds


def square(item: int) -> int:
    """Task."""
    return item * item


def return_none(item: object) -> object:
    """Task."""
    return None


def keep_both(left: object, right: object) -> object:
    """Reduce."""
    return left, right


def return_lambda(item: object) -> object:
    """Task with a result that does not pickle."""
    return lambda: item


def size_of_item(item: LargeItem) -> int:
    """Task."""
    return len(item.content)


def run_scripted(task: ScriptedTask) -> str:
    """Task that raises on its first attempts."""
    if begin_attempt(task) <= task.num_failures:
        raise RuntimeError(f"scripted failure of {task.name}")
    return task.name


def kill_scripted(task: ScriptedTask) -> str:
    """Task that kills its own process on its first attempts."""
    if begin_attempt(task) <= task.num_failures:
        os.kill(os.getpid(), signal.SIGKILL)
    return task.name


def raise_image_error(task: ScriptedTask) -> None:
    """Task."""
    begin_attempt(task)
    raise ImageError(Reason.TRUNCATED, "half of it")


def raise_missing_extra(item: object) -> None:
    """Task that raises an error with a constructor of its own."""
    raise MissingExtraError("plots", "plots")


def sleep_for_ever(directory: str, item: int) -> None:
    """Task that says that it began, and never ends."""
    (Path(directory) / str(item)).touch()
    time.sleep(600)


def rank_and_size(context: GangContext) -> tuple[int, int]:
    """Gang."""
    return context.rank, context.world_size


def own_process_id(context: GangContext) -> int:
    """Gang."""
    return os.getpid()


def meet_everyone(context: GangContext) -> list[int]:
    """Gang: every rank waits at its own address until all the others called; only a gang that is whole gets through."""
    host, _, port = context.addresses[context.rank].rpartition(":")
    met = [context.rank]
    with socket.create_server((host, int(port))) as server:
        server.settimeout(60)
        for address in context.addresses[: context.rank] + context.addresses[context.rank + 1 :]:
            _call_until_answered(address).sendall(bytes([context.rank]))
        while len(met) < context.world_size:
            peer, _ = server.accept()
            met.append(peer.recv(1)[0])
    return sorted(met)


def fail_on_rank_1(fault: str, directory: str, context: GangContext) -> None:
    """Gang in which rank 1 fails and the others would go on for long."""
    (Path(directory) / str(os.getpid())).touch()
    wait_until(lambda: len(list(Path(directory).iterdir())) == context.world_size)
    if context.rank != 1:
        time.sleep(600)
    if fault == "raise":
        raise RuntimeError("scripted failure")
    if fault == "manyeyes":
        raise ImageError(Reason.CORRUPT)
    os.kill(os.getpid(), signal.SIGKILL)


def endless_driver(engine_name: str, num_workers: int, settings: dict[str, Any], directory: str) -> None:
    """Driver whose tasks never end."""
    create_engine(engine_name, num_workers, settings).map(functools.partial(sleep_for_ever, directory), range(100))


def large_items_driver(engine_name: str, num_workers: int, settings: dict[str, Any], directory: str) -> None:
    """Driver that feeds 80 items of 8 MiB and reports by how much its memory grew at most."""
    before = peak_memory_bytes()
    items = (LargeItem(bytes(1 << 23)) for _ in range(80))
    num_bytes = create_engine(engine_name, num_workers, settings).map_reduce(size_of_item, operator.add, items)
    report = {"num_bytes": num_bytes, "growth_bytes": peak_memory_bytes() - before}
    (Path(directory) / "report.json").write_text(json.dumps(report))


def begin_attempt(task: ScriptedTask) -> int:
    """Record one attempt; returns its number, from 1."""
    (Path(task.directory) / f"{task.name}-{uuid.uuid4().hex}").touch()
    return count_attempts(task)


def count_attempts(task: ScriptedTask) -> int:
    """How often the task was begun."""
    return len(list(Path(task.directory).glob(f"{task.name}-*")))


def processes_of_session(session_id: int) -> list[int]:
    """The ids of all living processes of a session, from /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended while we looked
            continue
        if int(session) == session_id and state != "Z":
            found.append(int(path.parent.name))
    return found


def peak_memory_bytes() -> int:
    """The most memory that this process ever held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise OSError("/proc/self/status has no VmHWM")


def wait_until(condition: Callable[[], bool], seconds: float = _PATIENCE_SECONDS) -> None:
    """Return when `condition()` holds, or after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def _call_until_answered(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 60
    while True:
        try:
            return socket.create_connection((host, int(port)), timeout=60)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
