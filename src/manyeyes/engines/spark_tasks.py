"""What of the Spark engine runs on the executors. Whatever it imports, every Python worker of Spark imports."""

from __future__ import annotations

import base64
import collections
import functools
import gc
import os
import pickle
import re
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from manyeyes.engines.base import THREADS_VARIABLE, GangContext
from manyeyes.engines.failures import Failure, pickle_failure
from manyeyes.engines.worker import STARTED, start_worker, stop_workers
from manyeyes.errors import ManyeyesError, TaskError

_RANK_FAILED = "manyeyes-rank-failed"


@dataclass(frozen=True)
class Work:
    """One task, as it travels.

    Attributes:
        fn, item: pickled; as bytes, or as a broadcast of Spark where they are large.
        num_failed: attempts in earlier jobs, where Spark itself tries less often than the contract asks for.
        num_attempts: how often Spark tries this job.
    """

    fn: Any
    item: Any
    num_failed: int
    num_attempts: int


class TaskFailedError(Exception):
    """A task failed and Spark is to try it again; it says what the task's exception said."""


def run_task(work: Work, partition: Iterable[Any]) -> Iterator[Any]:
    """Yield whether the task was done, then its pickled result, or else its pickled Failure and the attempts so far.

    A failure that Spark should try again is raised instead, so that Spark counts it and shows it on its pages.
    """
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    _begin(context, partition)
    try:
        fn = _unpickle_function(_content(work.fn))
        result = pickle.dumps(fn(pickle.loads(_content(work.item))), protocol=pickle.HIGHEST_PROTOCOL)
    except (Exception, SystemExit) as error:
        # The attempts of one Spark job are numbered from 0.
        num_attempts = context.attemptNumber() + 1
        if not isinstance(error, ManyeyesError) and num_attempts < work.num_attempts:
            raise TaskFailedError(repr(error)) from error
        yield False
        yield pickle_failure(error)
        yield work.num_failed + num_attempts
        return
    yield True
    yield result
    settle()


def run_rank(fn: bytes, partition: Iterable[Any]) -> Iterator[Any]:
    """Meet the other ranks of a barrier stage, then yield the pickled result of one rank.

    The rank has a process of its own: Spark's Python workers are reused, and TensorFlow's collectives can be set up
    only once in a process, before anything else.
    """
    from pyspark import BarrierTaskContext

    context = BarrierTaskContext.get()
    _begin(context, partition)
    rank = context.partitionId()
    infos = context.getTaskInfos()
    host = infos[rank].address.rpartition(":")[0] or infos[rank].address
    # The port is held until every rank has one, so that no two get the same.
    with _bind(host) as holder:
        addresses = tuple(context.allGather(f"{host}:{holder.getsockname()[1]}"))
    outcome = _run_alone(fn, GangContext(rank, len(infos), addresses), context.cpus())
    if isinstance(outcome, Failure):
        # Text is all that Spark brings from a failed task to the driver.
        raise TaskFailedError(f"{_RANK_FAILED}:{rank}:{base64.b64encode(pickle.dumps(outcome)).decode()}:")
    yield pickle.dumps(outcome, protocol=pickle.HIGHEST_PROTOCOL)


def _run_alone(fn: bytes, gang: GangContext, num_threads: int) -> Any:
    """The result, or the Failure, of a rank in a new process, which ends with this one."""
    worker = start_worker(fn, f"manyeyes-gang-{gang.rank}", num_threads)
    try:
        worker.send(pickle.dumps(gang))
        while (outcome := worker.receive()) is STARTED:
            pass
        return outcome
    except (EOFError, OSError):
        worker.process.join(timeout=5)
        return Failure(TaskError(f"Worker {gang.rank} of the gang died ({worker.cause_of_death()})."))
    finally:
        stop_workers([worker])


def failed_rank(message: str) -> tuple[int, Failure] | None:
    """Find the rank that failed, and why, in what Spark says about a barrier stage that was given up."""
    found = re.search(rf"{_RANK_FAILED}:(\d+):([\w+/=]+):", message)
    return None if found is None else (int(found[1]), pickle.loads(base64.b64decode(found[2])))


def _content(parcel: Any) -> bytes:
    return parcel if isinstance(parcel, bytes) else parcel.value


@functools.lru_cache(maxsize=4)
def _unpickle_function(content: bytes) -> Any:
    return pickle.loads(content)


def _bind(host: str) -> socket.socket:
    """A socket with a port of its own. It does not listen: a rank that is ahead would speak to it, and be lost."""
    holder = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        holder.bind((host, 0))
    except OSError:
        holder.bind(("", 0))  # behind an address translation a host does not have the address that it is reached by
    return holder


@functools.cache
def settle() -> None:
    """Once, after the first task has loaded what tasks need: spare it the collection that Spark runs after each task.

    That took 12 ms of every task, most of what a short one costs in Python.
    """
    gc.collect()
    gc.freeze()


def _begin(context: Any, partition: Iterable[Any]) -> None:
    collections.deque(partition, maxlen=0)  # Spark keeps a worker for the next task only if its input was read
    num_threads = str(context.cpus())
    os.environ[THREADS_VARIABLE] = num_threads
    os.environ.setdefault("OMP_NUM_THREADS", num_threads)
