"""One worker process: spawned with a function, fed one pickled item at a time through a pipe, gone with its driver."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

from manyeyes.engines.base import THREADS_VARIABLE
from manyeyes.engines.failures import pickle_failure


class _Started:
    """What a worker says first: its start is over, so a later death is a task's fault."""

    def __reduce__(self) -> str:
        return "STARTED"


STARTED = _Started()


class Worker:
    """The driver's side of one process.

    Attributes:
        content: the pickle of its function.
        task: what it works on, for whoever feeds it; None when it is idle.
        started: whether it ever answered.
    """

    def __init__(self, process: SpawnProcess, connection: Connection, content: bytes) -> None:
        self.process = process
        self.connection = connection
        self.content = content
        self.task: Any = None
        self.started = False

    def send(self, content: bytes) -> None:
        """Send it a pickled item. A worker that just died is noticed when its answer is read."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.connection.send_bytes(content)

    def receive(self) -> Any:
        """The next answer: STARTED once, then a result or a Failure for each item.

        Raises:
            EOFError, OSError: the process is dead.
        """
        outcome = pickle.loads(self.connection.recv_bytes())
        self.started = True
        return outcome

    def cause_of_death(self) -> str:
        """How the process ended, for people; call it after joining the process."""
        code = self.process.exitcode
        if code is not None and code < 0:
            name = signal.Signals(-code).name
            return f"killed by {name}" + (", mostly a lack of memory: use fewer workers" if name == "SIGKILL" else "")
        return f"ended with exit code {code}"


def start_worker(content: bytes, name: str, num_threads: int) -> Worker:
    """Start a process that applies the function whose pickle is `content`, with `num_threads` for its libraries."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_tasks, args=(content, num_threads, theirs), name=name)
    with contextlib.closing(theirs), _interrupts_deferred():
        process.start()
    return Worker(process, ours, content)


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


def stop_workers(workers: Sequence[Worker]) -> None:
    """End the processes, and return when they are gone."""
    for worker in workers:
        worker.connection.close()
        worker.process.kill()
    for worker in workers:
        worker.process.join()


def _serve_tasks(content: bytes, num_threads: int, connection: Connection) -> None:
    """The life of a worker: run tasks until the driver goes away."""
    os.environ[THREADS_VARIABLE] = str(num_threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(num_threads))
    # The driver alone decides what an interrupt of the whole process group means.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    # A driver that hangs up, before an item or before an answer, wants no more of this worker.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        connection.send_bytes(pickle.dumps(STARTED))
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
