"""The local engine: spawned processes on this machine. They die with the driver, and a dead one is replaced."""

from __future__ import annotations

import collections
import contextlib
import functools
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

from manyeyes.engines.base import (
    MAX_ATTEMPTS,
    THREADS_VARIABLE,
    GangContext,
    Item,
    Result,
    available_cores,
    describe_failure,
    refuse_settings,
)
from manyeyes.engines.failures import Failure, pickle_failure, pickle_value
from manyeyes.errors import EngineError, TaskError, UsageError


class LocalEngine:
    """Runs tasks in `num_workers` spawned processes.

    Spawned, not forked: a fork of a process with threads (OpenCV, TensorFlow) may deadlock. A worker holds one task at
    a time, so that a worker's death is the fault of one known task, and a long task delays none behind it.
    """

    name = "local"

    def __init__(self, num_workers: int | None = None) -> None:
        self.num_workers = num_workers or available_cores()

    def map(
        self,
        fn: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        on_result: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """See Engine.map."""
        results: dict[int, Result] = {}
        with contextlib.closing(self._run(fn, items)) as outcomes:
            for index, result in outcomes:
                if on_result is not None:
                    on_result(index, result)
                results[index] = result
        return [results[index] for index in range(len(results))]

    def map_reduce(
        self, map_fn: Callable[[Item], Result], reduce_fn: Callable[[Result, Result], Result], items: Iterable[Item]
    ) -> Result | None:
        """See Engine.map_reduce; results are reduced as they come, so at most one per worker is held."""
        with contextlib.closing(self._run(map_fn, items)) as outcomes:
            for _, first in outcomes:
                return functools.reduce(reduce_fn, (result for _, result in outcomes), first)
        return None

    def gang(self, fn: Callable[[GangContext], Result], world_size: int) -> list[Result]:
        """See Engine.gang."""
        if world_size < 1:
            raise UsageError(f"A gang of {world_size} workers is not possible. Ask for at least 1.")
        addresses = tuple(f"127.0.0.1:{port}" for port in _free_ports(world_size))
        num_threads = max(1, available_cores() // world_size)
        workers: list[_Worker] = []
        try:
            # One by one, so that `finally` also stops those that were started before a start failed.
            workers.extend(_start(fn, f"manyeyes-gang-{rank}", num_threads) for rank in range(world_size))
            for rank, worker in enumerate(workers):
                worker.assign(_Task(rank, GangContext(rank, world_size, addresses)), fn)
            return _collect_gang(workers)
        finally:
            _stop(workers)

    def _run(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> Generator[tuple[int, Result], None, None]:
        """Yield (index, result) as tasks end. An item is drawn only when a worker is free to take it."""
        fresh = (_Task(index, item) for index, item in enumerate(items))
        again: collections.deque[_Task] = collections.deque()
        workers: list[_Worker] = []
        num_failed_starts = 0
        try:
            while True:
                self._hand_out(fn, workers, again, fresh)
                busy = {worker.connection: worker for worker in workers if worker.task is not None}
                if not busy:
                    return
                for connection in wait(list(busy)):
                    worker = busy[connection]  # type: ignore[index]
                    task = worker.task
                    assert task is not None
                    try:
                        outcome = worker.receive()
                    except (EOFError, OSError):
                        workers.remove(worker)
                        worker.process.join(timeout=5)
                        _stop([worker])
                        num_failed_starts = 0 if worker.started else num_failed_starts + 1
                        _judge_death(fn, worker, task, num_failed_starts)
                        again.append(task)
                        continue
                    if outcome is _STARTED:
                        num_failed_starts = 0
                        continue
                    worker.task = None
                    if isinstance(outcome, Failure):
                        _judge_failure(fn, task, outcome)
                        again.append(task)
                        continue
                    # The worker gets its next task before the driver spends time on this result.
                    self._hand_out(fn, workers, again, fresh)
                    yield task.index, outcome
        finally:
            _stop(workers)

    def _hand_out(
        self,
        fn: Callable[..., Any],
        workers: list[_Worker],
        again: collections.deque[_Task],
        fresh: Iterator[_Task],
    ) -> None:
        idle = [worker for worker in workers if worker.task is None]
        while idle or len(workers) < self.num_workers:
            task = again.popleft() if again else next(fresh, None)
            if task is None:
                return
            if idle:
                worker = idle.pop()
            else:
                num_threads = max(1, available_cores() // self.num_workers)
                worker = _start(fn, f"manyeyes-worker-{len(workers)}", num_threads)
                workers.append(worker)
            worker.assign(task, fn)


def create(num_workers: int | None, settings: Mapping[str, Any]) -> LocalEngine:
    """Make the engine, with one worker per core unless told; it has no settings."""
    refuse_settings("local", settings)
    return LocalEngine(num_workers)


@dataclass
class _Task:
    """An item on its way; `num_attempts` counts the tries that failed by its own fault."""

    index: int
    item: Any
    num_attempts: int = 0


class _Started:
    """What a worker says first: its start is over, so a later death is a task's fault."""

    def __reduce__(self) -> str:
        return "_STARTED"


_STARTED = _Started()


class _Worker:
    """The driver's side of one process."""

    def __init__(self, process: SpawnProcess, connection: Connection) -> None:
        self.process = process
        self.connection = connection
        self.task: _Task | None = None
        self.started = False

    def assign(self, task: _Task, fn: Callable[..., Any]) -> None:
        self.task = task
        content = pickle_value(task.item, f"Item {task.index} of {describe_failure(fn)}")
        # A worker that just died is noticed when its answer is read.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(content)

    def receive(self) -> Any:
        """The next answer. Raises EOFError or OSError when the process is dead."""
        outcome = pickle.loads(self.connection.recv_bytes())
        self.started = True
        return outcome

    def cause_of_death(self) -> str:
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (", mostly a lack of memory: use fewer workers" if name == "SIGKILL" else "")
        return f"ended with exit code {code}"


def _judge_death(fn: Callable[..., Any], worker: _Worker, task: _Task, num_failed_starts: int) -> None:
    """Count an attempt of the task that its worker died on; raise when it was the last."""
    if not worker.started:
        if num_failed_starts >= MAX_ATTEMPTS:
            raise EngineError(
                f"Worker processes end before their first task ({worker.cause_of_death()}). A script that uses the "
                "local engine needs `if __name__ == '__main__':` around its calls; see standard error for more."
            )
        return
    task.num_attempts += 1
    if task.num_attempts >= MAX_ATTEMPTS:
        raise TaskError(
            f"Task {task.index} ({describe_failure(fn)}) ended its worker {task.num_attempts} times "
            f"(last: {worker.cause_of_death()})."
        )


def _judge_failure(fn: Callable[..., Any], task: _Task, failure: Failure) -> None:
    """Count an attempt of a task that raised; raise when it was the last or was said on purpose."""
    failure.raise_if_on_purpose()
    task.num_attempts += 1
    if task.num_attempts >= MAX_ATTEMPTS:
        raise failure.task_error(fn, task.index, task.num_attempts)


def _collect_gang(workers: Sequence[_Worker]) -> list[Any]:
    results: dict[int, Any] = {}
    ranks = {worker.connection: rank for rank, worker in enumerate(workers)}
    while len(results) < len(workers):
        for connection in wait([workers[rank].connection for rank in ranks.values() if rank not in results]):
            rank = ranks[connection]  # type: ignore[index]
            worker = workers[rank]
            try:
                outcome = worker.receive()
            except (EOFError, OSError):
                worker.process.join(timeout=5)
                raise TaskError(f"Worker {rank} of the gang died ({worker.cause_of_death()}).") from None
            if isinstance(outcome, Failure):
                if outcome.error is not None:
                    outcome.error.add_note(f"In worker {rank} of the gang:\n{outcome.traceback}")
                    raise outcome.error
                raise TaskError(f"Worker {rank} of the gang failed: {outcome.summary}", outcome.traceback)
            if outcome is not _STARTED:
                results[rank] = outcome
    return [results[rank] for rank in range(len(workers))]


def _start(fn: Callable[..., Any], name: str, num_threads: int) -> _Worker:
    content = pickle_value(fn, describe_failure(fn))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_tasks, args=(content, num_threads, theirs), name=name)
    with contextlib.closing(theirs), _interrupts_deferred():
        process.start()
    return _Worker(process, ours)


@contextlib.contextmanager
def _interrupts_deferred() -> Iterator[None]:
    """Let Ctrl-C wait until the block is over: a process whose start is cut short prints a traceback of its own.

    Ctrl-C reaches the whole process group, and the driver alone decides what happens then: a process that is started in
    the block inherits the mask of its signals, so it is safe from its first instruction on. The mask alone does not
    protect the driver, because the system may hand the signal to another of its threads.
    """
    is_main = threading.current_thread() is threading.main_thread()
    pending: list[tuple[int, Any]] = []
    previous = signal.signal(signal.SIGINT, lambda *arguments: pending.append(arguments)) if is_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, previous)
    if pending and callable(previous):
        previous(*pending[0])


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:
        worker.connection.close()
        worker.process.terminate()
    for worker in workers:
        worker.process.join(timeout=5)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _serve_tasks(content: bytes, num_threads: int, connection: Connection) -> None:
    """The life of a worker: run tasks until the driver goes away."""
    os.environ[THREADS_VARIABLE] = str(num_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    # A driver that hangs up, before an item or before an answer, wants no more of this worker.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send_bytes(pickle.dumps(_STARTED))
        fn: Callable[[Any], Any] | None = None
        while True:
            encoded_item = connection.recv_bytes()
            try:
                fn = fn or pickle.loads(content)
                answer = pickle.dumps(fn(pickle.loads(encoded_item)), protocol=pickle.HIGHEST_PROTOCOL)
            except (Exception, SystemExit) as error:
                answer = pickle_failure(error)
            connection.send_bytes(answer)


def _die_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
