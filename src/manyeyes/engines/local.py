"""The local engine: spawned processes on this machine. They die with the driver, and a killed one is replaced."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any

from manyeyes.engines.base import (
    MAX_ATTEMPTS,
    THREADS_VARIABLE,
    GangContext,
    Item,
    Result,
    available_cores,
    describe_failure,
)
from manyeyes.errors import EngineError, ManyeyesError, TaskError

# Tasks handed out ahead of the workers, per worker: enough to keep them busy, few enough to keep items out of memory.
_TASKS_AHEAD = 2


class LocalEngine:
    """Runs tasks in `num_workers` spawned processes.

    Spawned, not forked: a fork of a process with threads (OpenCV, TensorFlow) may deadlock.
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
        for index, result in self._run(fn, items):
            if on_result is not None:
                on_result(index, result)
            results[index] = result
        return [results[index] for index in range(len(results))]

    def map_reduce(
        self, map_fn: Callable[[Item], Result], reduce_fn: Callable[[Result, Result], Result], items: Iterable[Item]
    ) -> Result | None:
        """See Engine.map_reduce; results are reduced as they come, so only workers' results are held."""
        mapped = (result for _, result in self._run(map_fn, items))
        first = next(mapped, None)
        return None if first is None else functools.reduce(reduce_fn, mapped, first)

    def gang(self, fn: Callable[[GangContext], Result], world_size: int) -> list[Result]:
        """See Engine.gang."""
        context = multiprocessing.get_context("spawn")
        addresses = tuple(f"127.0.0.1:{port}" for port in _free_ports(world_size))
        threads = max(1, available_cores() // world_size)
        workers = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_run_gang_worker,
                    args=(fn, GangContext(rank, world_size, addresses), threads, sender),
                    name=f"manyeyes-gang-{rank}",
                )
                process.start()
                sender.close()
                workers.append((process, receiver))
            return _collect_gang(workers)
        finally:
            for process, _ in workers:
                if process.is_alive():
                    process.terminate()
                process.join(timeout=5)
                if process.is_alive():
                    process.kill()
                    process.join()

    def _run(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[int, Result]]:
        queue = iter(enumerate(items))
        pool = self._new_pool()
        pending: dict[Future[Any], tuple[int, Item, int]] = {}
        exhausted = False
        try:
            while True:
                while not exhausted and len(pending) < self.num_workers * _TASKS_AHEAD:
                    try:
                        index, item = next(queue)
                    except StopIteration:
                        exhausted = True
                        break
                    pending[pool.submit(_call, fn, item)] = (index, item, 1)
                if not pending:
                    return
                done, _ = wait(pending, return_when=FIRST_COMPLETED)
                broken: list[tuple[int, Item, int]] = []
                for future in done:
                    index, item, attempt = pending.pop(future)
                    try:
                        outcome = future.result()
                    except BrokenProcessPool:
                        broken.append((index, item, attempt))
                        continue
                    if isinstance(outcome, _Failure):
                        if isinstance(outcome.error, ManyeyesError) and not isinstance(outcome.error, EngineError):
                            raise outcome.error
                        if attempt >= MAX_ATTEMPTS:
                            message = f"Task {index} ({describe_failure(fn)}) failed {attempt} times: {outcome.summary}"
                            raise TaskError(message, outcome.traceback)
                        pending[pool.submit(_call, fn, item)] = (index, item, attempt + 1)
                    else:
                        yield index, outcome
                if broken:
                    # A dead worker breaks the whole pool: every task in flight is lost, so all go to a new one.
                    broken += pending.values()
                    pending.clear()
                    _stop(pool)
                    pool = self._new_pool()
                    for index, item, attempt in sorted(broken, key=lambda task: task[0]):
                        if attempt >= MAX_ATTEMPTS:
                            raise TaskError(
                                f"Task {index} ({describe_failure(fn)}) was in flight {attempt} times when a worker died. "
                                "A worker that dies without a traceback was mostly killed for memory: use fewer workers."
                            )
                        pending[pool.submit(_call, fn, item)] = (index, item, attempt + 1)
        finally:
            _stop(pool)

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            max_workers=self.num_workers,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start_worker,
            initargs=(max(1, available_cores() // self.num_workers),),
        )


def create(num_workers: int | None = None) -> LocalEngine:
    """Make the engine, with one worker per core unless told."""
    return LocalEngine(num_workers)


class _Failure:
    """An exception of a task, in a form that always pickles."""

    def __init__(self, error: BaseException) -> None:
        self.summary = repr(error)
        self.traceback = traceback.format_exc()
        self.error = error if isinstance(error, ManyeyesError) else None


def _call(fn: Callable[[Any], Any], item: Any) -> Any:
    try:
        return fn(item)
    except Exception as error:
        return _Failure(error)


def _start_worker(num_threads: int) -> None:
    os.environ[THREADS_VARIABLE] = str(num_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    # Ctrl-C reaches the whole process group: the driver alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()


def _die_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _stop(pool: ProcessPoolExecutor) -> None:
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        with contextlib.suppress(Exception):
            process.terminate()
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()


def _run_gang_worker(fn: Callable[[GangContext], Any], context: GangContext, threads: int, sender: Connection) -> None:
    _start_worker(threads)
    try:
        outcome: Any = fn(context)
    except BaseException as error:
        outcome = _Failure(error)
    sender.send(outcome)
    sender.close()


def _collect_gang(workers: list[tuple[Any, Connection]]) -> list[Any]:
    results: dict[int, Any] = {}
    waiting = {receiver: rank for rank, (_, receiver) in enumerate(workers)}
    while waiting:
        for ready in multiprocessing.connection.wait(list(waiting)):
            rank = waiting.pop(ready)  # type: ignore[arg-type]
            try:
                outcome = ready.recv()  # type: ignore[union-attr]
            except EOFError:
                raise TaskError(f"Worker {rank} of the gang died without a traceback.") from None
            if isinstance(outcome, _Failure):
                if outcome.error is not None:
                    raise outcome.error
                raise TaskError(f"Worker {rank} of the gang failed: {outcome.summary}", outcome.traceback)
            results[rank] = outcome
    return [results[rank] for rank in range(len(workers))]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for listener in sockets:
            listener.bind(("127.0.0.1", 0))
        return [listener.getsockname()[1] for listener in sockets]
