"""The local engine: spawned processes on this machine. They die with the driver, and a dead one is replaced."""

from __future__ import annotations

import collections
import contextlib
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

from manyeyes.engines.base import (
    MAX_ATTEMPTS,
    GangContext,
    Item,
    Result,
    available_cores,
    collect,
    describe_failure,
    reduce_outcomes,
    refuse_settings,
)
from manyeyes.engines.failures import Failure, death_error, pickle_item, pickle_value
from manyeyes.engines.worker import STARTED, Worker, start_worker, stop_workers
from manyeyes.errors import EngineError, TaskError, UsageError


class LocalEngine:
    """Runs tasks in `num_workers` spawned processes.

    Spawned, not forked: a fork of a process with threads (OpenCV, TensorFlow) may deadlock. A worker holds one task at
    a time, so that a worker's death is the fault of one known task, and a long task delays none behind it.
    """

    name = "local"

    def __init__(self, num_workers: int | None = None) -> None:
        self.num_workers = num_workers or available_cores()
        self._kept: list[Worker] | None = None

    def map(
        self,
        fn: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        on_result: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """See Engine.map."""
        return collect(self._run(fn, items), on_result)

    def map_reduce(
        self, map_fn: Callable[[Item], Result], reduce_fn: Callable[[Result, Result], Result], items: Iterable[Item]
    ) -> Result | None:
        """See Engine.map_reduce; results are reduced as they come, so at most one per worker is held."""
        return reduce_outcomes(self._run(map_fn, items), reduce_fn)

    def gang(self, fn: Callable[[GangContext], Result], world_size: int) -> list[Result]:
        """See Engine.gang."""
        if world_size < 1:
            raise UsageError(f"A gang of {world_size} workers is not possible. Ask for at least 1.")
        addresses = tuple(f"127.0.0.1:{port}" for port in _free_ports(world_size))
        num_threads = max(1, available_cores() // world_size)
        content = pickle_value(fn, describe_failure(fn))
        workers: list[Worker] = []
        try:
            # One by one, so that `finally` also stops those that were started before a start failed.
            workers.extend(start_worker(content, f"manyeyes-gang-{rank}", num_threads) for rank in range(world_size))
            for rank, worker in enumerate(workers):
                worker.send(pickle_item(fn, rank, GangContext(rank, world_size, addresses)))
            return _collect_gang(workers)
        finally:
            stop_workers(workers)

    @contextlib.contextmanager
    def keep_workers(self) -> Iterator[None]:
        """See kept_workers: idle workers stay for the next job whose function is the same, until the block ends."""
        self._kept = []
        try:
            yield
        finally:
            kept, self._kept = self._kept, None
            stop_workers(kept)

    def _run(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> Generator[tuple[int, Result], None, None]:
        """Yield (index, result) as tasks end. An item is drawn only when a worker is free to take it."""
        fresh = (_Task(index, item) for index, item in enumerate(items))
        again: collections.deque[_Task] = collections.deque()
        workers = self._take_kept(fn)
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
                        stop_workers([worker])
                        num_failed_starts = 0 if worker.started else num_failed_starts + 1
                        _judge_death(fn, worker, task, num_failed_starts)
                        again.append(task)
                        continue
                    if outcome is STARTED:
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
            self._keep_or_stop(workers)

    def _take_kept(self, fn: Callable[..., Any]) -> list[Worker]:
        """The kept workers that have this function; the others are stopped."""
        if not self._kept:
            return []
        kept, self._kept = self._kept, []
        content = pickle_value(fn, describe_failure(fn))
        workers = [worker for worker in kept if worker.content == content and worker.process.is_alive()]
        stop_workers([worker for worker in kept if worker not in workers])
        return workers

    def _keep_or_stop(self, workers: list[Worker]) -> None:
        """Keep the idle workers where they are kept; one that has a task is of a job that was given up."""
        if self._kept is not None:
            self._kept += [worker for worker in workers if worker.task is None]
            workers = [worker for worker in workers if worker.task is not None]
        stop_workers(workers)

    def _hand_out(
        self,
        fn: Callable[..., Any],
        workers: list[Worker],
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
                content = pickle_value(fn, describe_failure(fn))
                worker = start_worker(content, f"manyeyes-worker-{len(workers)}", num_threads)
                workers.append(worker)
            worker.task = task
            worker.send(pickle_item(fn, task.index, task.item))


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


def _judge_death(fn: Callable[..., Any], worker: Worker, task: _Task, num_failed_starts: int) -> None:
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
        raise death_error(fn, task.index, task.num_attempts, worker.cause_of_death())


def _judge_failure(fn: Callable[..., Any], task: _Task, failure: Failure) -> None:
    """Count an attempt of a task that raised; raise when it was the last or was said on purpose."""
    failure.raise_if_on_purpose()
    task.num_attempts += 1
    if task.num_attempts >= MAX_ATTEMPTS:
        raise failure.task_error(fn, task.index, task.num_attempts)


def _collect_gang(workers: Sequence[Worker]) -> list[Any]:
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
                raise outcome.gang_error(rank)
            if outcome is not STARTED:
                results[rank] = outcome
    return [results[rank] for rank in range(len(workers))]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
