"""The Spark engine: every task is a Spark job of one task, every gang a barrier stage."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import pickle
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manyeyes.config import from_dict
from manyeyes.engines.base import (
    MAX_ATTEMPTS,
    GangContext,
    Item,
    Result,
    collect,
    describe_failure,
    reduce_outcomes,
    with_environment,
)
from manyeyes.engines.failures import Failure, death_error, pickle_item, pickle_value
from manyeyes.engines.spark_errors import cause_of_death, is_death, job_error, message_of, session_ended
from manyeyes.engines.spark_session import SparkSettings, attempts_of_spark, connect, is_alive, is_local, num_slots
from manyeyes.engines.spark_tasks import Work, failed_rank, run_rank, run_task
from manyeyes.errors import EngineError, TaskError, UsageError

if TYPE_CHECKING:
    from pyspark import SparkContext

# Larger functions and items travel as broadcasts, which Spark moves in blocks and which can be freed at once.
_INLINE_BYTES = 256 << 10
# Jobs beyond the slots, so that a slot that comes free finds the next task already there.
_MIN_AHEAD = 2
# How often the executors are counted while a job runs.
_COUNT_SECONDS = 2.0
# How long a gang waits for executors that a cluster is still starting.
_GANG_PATIENCE_SECONDS = 15.0
# How soon a dead Java is seen to be dead.
_DEATH_SECONDS = 1.0
# After which a job that waits for its first executor says so.
_NO_EXECUTOR_SECONDS = 15.0
_CANCEL_PATIENCE_SECONDS = 10.0
_log = logging.getLogger("manyeyes.engines")


class SparkEngine:
    """Runs tasks on the executors of a Spark session: the running one, or one that is made on first use.

    A Spark job ends when its last task ends, and its results come then. So that items can be drawn one by one, and
    results reported one by one, each task is a job of its own; as many jobs run at once as there are slots.
    """

    name = "spark"

    def __init__(self, num_workers: int | None = None, settings: SparkSettings | None = None) -> None:
        self.settings = settings or SparkSettings()
        self._num_workers = num_workers
        self._context: SparkContext | None = None

    @property
    def num_workers(self) -> int:
        """Tasks at once: as asked for, else the slots of the executors that are there now."""
        return self._num_workers or max(1, num_slots(self.context))

    @property
    def context(self) -> SparkContext:
        """The SparkContext, made on first use. One that was stopped or died meanwhile is replaced."""
        if self._context is None or not is_alive(self._context):
            self._context = connect(self.settings, self._num_workers)
        return self._context

    @property
    def driver_host(self) -> str:
        """The address under which executors reach this process."""
        return self.context.getConf().get("spark.driver.host") or "127.0.0.1"

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
        """See Engine.map_reduce; the driver reduces results as they come and holds one per job that runs at most."""
        return reduce_outcomes(self._run(map_fn, items), reduce_fn)

    def gang(self, fn: Callable[[GangContext], Result], world_size: int) -> list[Result]:
        """See Engine.gang: a barrier stage. Its ranks are told each other's addresses by the barrier."""
        if world_size < 1:
            raise UsageError(f"A gang of {world_size} workers is not possible. Ask for at least 1.")
        content = self._pickle_function(fn)
        context = self.context
        _check_slots(context, world_size)
        group = _JobGroup(context, f"gang of {describe_failure(fn)}")
        outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def run() -> None:
            group.enter()
            try:
                ranks = context.parallelize(range(world_size), world_size).barrier()
                outcome.put(ranks.mapPartitions(functools.partial(run_rank, content)).collect())
            except Exception as error:
                outcome.put(error)

        thread = _start_thread(run)
        try:
            # In a thread, so that Ctrl-C is heard while Spark works.
            results = outcome.get()
        finally:
            group.cancel([thread])
        if isinstance(results, Exception):
            raise _gang_error(results, context)
        return [pickle.loads(result) for result in results]

    def _run(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> Generator[tuple[int, Result], None, None]:
        """Yield (index, result) as tasks end. An item is drawn only when its job can start."""
        function = self._pickle_function(fn)
        tasks = (_Task(index, pickle_item(fn, index, item)) for index, item in enumerate(items))
        first = next(tasks, None)
        if first is None:
            return  # Spark is not started for nothing
        tasks = itertools.chain([first], tasks)  # type: ignore[assignment]
        del first
        context = self.context
        with contextlib.closing(_Jobs(context, describe_failure(fn), function, self._num_workers)) as jobs:
            jobs.fill(tasks)
            while jobs.num_running:
                task = jobs.next_ended()
                if task is None:
                    jobs.fill(tasks)
                elif isinstance(task.outcome, bytes):
                    # The next job is on its way before the driver spends time on this result.
                    jobs.fill(tasks)
                    yield task.index, pickle.loads(task.outcome)
                else:
                    _judge(fn, task, context)
                    jobs.start(task)

    def _pickle_function(self, fn: Callable[..., Any]) -> bytes:
        return pickle_value(with_environment(fn, self.settings.pass_environment), describe_failure(fn))


def create(num_workers: int | None, settings: Mapping[str, Any]) -> SparkEngine:
    """Make the engine; Spark starts when the first job does.

    Raises:
        ConfigError: an unknown setting, or one of a wrong type.
        UsageError: a setting has a value that can't be.
    """
    return SparkEngine(num_workers, from_dict(SparkSettings, settings))


@dataclass
class _Task:
    """A pickled item on its way.

    Attributes:
        num_failed: the attempts in Spark jobs that are over.
        outcome: of the last job: the pickled result, why the task failed, or what became of the job.
    """

    index: int
    item: bytes
    num_failed: int = 0
    outcome: bytes | Failure | Exception | None = None


class _Jobs:
    """The Spark jobs of one map, each run by a thread, because Spark's own call waits for the end of its job."""

    def __init__(self, context: SparkContext, what: str, function: bytes, num_workers: int | None) -> None:
        self.num_running = 0
        self._context = context
        self._group = _JobGroup(context, what)
        self._function = _parcel(context, function)
        self._one = context.parallelize([0], 1)
        self._num_attempts = min(MAX_ATTEMPTS, attempts_of_spark(context))
        self._slots = _Slots(context, num_workers)
        self._waiting: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._ended: queue.SimpleQueue[_Task] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def fill(self, tasks: Iterator[_Task]) -> None:
        """Draw and start as many tasks as may run now."""
        while self.num_running < self._slots.num_jobs():
            task = next(tasks, None)
            if task is None:
                return
            self.start(task)

    def start(self, task: _Task) -> None:
        """Start the job of a task, for the first time or again."""
        task.outcome = None
        self.num_running += 1
        if self.num_running > len(self._threads):
            self._threads.append(_start_thread(self._serve))
        self._waiting.put(task)

    def next_ended(self) -> _Task | None:
        """Wait for the next job that ends; None now and then, because executors may have come meanwhile."""
        try:
            task = self._ended.get(timeout=_COUNT_SECONDS)
        except queue.Empty:
            return None
        self.num_running -= 1
        return task

    def close(self) -> None:
        """Cancel what still runs and free what was sent."""
        for _ in self._threads:
            self._waiting.put(None)
        self._group.cancel(self._threads)
        _destroy(self._function)

    def _serve(self) -> None:
        self._group.enter()
        while (task := self._waiting.get()) is not None and not self._group.is_cancelled:
            try:
                task.outcome = self._attempt(task)
            except Exception as error:
                task.outcome = error
            self._ended.put(task)
            del task

    def _attempt(self, task: _Task) -> bytes | Failure:
        item = _parcel(self._context, task.item)
        work = Work(self._function, item, task.num_failed, self._num_attempts)
        try:
            is_done, content, *attempts = self._one.mapPartitions(functools.partial(run_task, work)).collect()
        finally:
            _destroy(item)
        if is_done:
            return content
        (task.num_failed,) = attempts
        return pickle.loads(content)


class _JobGroup:
    """Jobs that are cancelled together, without harm to other jobs of the session."""

    def __init__(self, context: SparkContext, description: str) -> None:
        self.is_cancelled = False
        self._context = context
        self._id = f"manyeyes-{uuid.uuid4().hex[:12]}"
        self._description = f"manyeyes: {description}"

    def enter(self) -> None:
        """Make the jobs of this thread ones of the group; Spark interrupts their tasks when they are cancelled."""
        self._context.setJobGroup(self._id, self._description, interruptOnCancel=True)

    def cancel(self, threads: Sequence[threading.Thread]) -> None:
        """Cancel the jobs of the group until no thread has one. A thread may be about to start its job."""
        self.is_cancelled = True
        deadline = time.monotonic() + _CANCEL_PATIENCE_SECONDS
        while time.monotonic() < deadline and any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(timeout=0.01)
            if any(thread.is_alive() for thread in threads):
                with contextlib.suppress(Exception):  # the session is gone, and its jobs with it
                    self._context.cancelJobGroup(self._id)


class _Slots:
    """How many jobs may run at once, as executors come and go."""

    def __init__(self, context: SparkContext, num_workers: int | None) -> None:
        self._context = context
        self._num_workers = num_workers
        self._num_slots = num_slots(context)
        self._counted_at = self._none_since = time.monotonic()

    def num_jobs(self) -> int:
        """Enough that no slot waits, and no more tasks at once than were asked for."""
        self._count()
        if self._num_workers is not None and self._num_workers < self._num_slots:
            return self._num_workers
        return self._num_slots + max(_MIN_AHEAD, self._num_slots // 2)

    def _count(self) -> None:
        if time.monotonic() < self._counted_at + _COUNT_SECONDS:
            return
        try:
            now, self._counted_at = num_slots(self._context), time.monotonic()
        except Exception as error:
            raise session_ended() from error
        if now < self._num_slots:
            _log.info(
                "Spark lost executors: %d of %d slots are left. Their tasks are tried again.", now, self._num_slots
            )
        self._num_slots = now
        if now:
            self._none_since = self._counted_at
        elif self._counted_at > self._none_since + _NO_EXECUTOR_SECONDS:
            self._none_since = self._counted_at
            _log.info("Spark has given no executor yet. Is the cluster busy, or too small for what is asked of it?")


def _parcel(context: SparkContext, content: bytes) -> Any:
    return content if len(content) <= _INLINE_BYTES else context.broadcast(content)


def _destroy(parcel: Any) -> None:
    if not isinstance(parcel, bytes):
        with contextlib.suppress(Exception):  # the session is gone, and what was sent with it
            parcel.destroy()


def _start_thread(target: Callable[[], None]) -> threading.Thread:
    from pyspark import InheritableThread

    # Inherits what the user has set for jobs of the calling thread, such as a scheduler pool.
    thread = InheritableThread(target=target, daemon=True)
    thread.start()
    return thread


def _judge(fn: Callable[..., Any], task: _Task, context: SparkContext) -> None:
    """Raise when a task that was not done is not to be tried again."""
    if isinstance(task.outcome, Failure):
        task.outcome.raise_if_on_purpose()
        if task.num_failed >= MAX_ATTEMPTS:
            raise task.outcome.task_error(fn, task.index, task.num_failed)
        return
    assert isinstance(task.outcome, Exception)
    message = message_of(task.outcome)
    if not is_death(message):
        raise _job_error(task.outcome, context) from task.outcome
    times = re.search(r"failed (\d+) times", message)
    task.num_failed += int(times[1]) if times else 1
    if task.num_failed >= MAX_ATTEMPTS:
        raise death_error(fn, task.index, task.num_failed, cause_of_death(message))


def _check_slots(context: SparkContext, world_size: int) -> None:
    """Wait a little for executors that are starting; Spark itself waits for hours for slots that never come."""
    deadline = time.monotonic() + (0 if is_local(context) else _GANG_PATIENCE_SECONDS)
    while (found := num_slots(context)) < world_size:
        if time.monotonic() > deadline:
            raise UsageError(
                f"A gang of {world_size} workers needs that many slots at once; Spark has {found} ({context.master}). "
                "Ask for fewer, or give it more executors or cores."
            )
        time.sleep(0.2)


def _gang_error(error: Exception, context: SparkContext) -> Exception:
    message = message_of(error)
    found = failed_rank(message)
    if found is not None:
        rank, failure = found
        return failure.gang_error(rank)
    rank_of_task = re.search(r"ResultTask\(\d+, (\d+)\)", message)
    if rank_of_task and is_death(message):
        return TaskError(f"Worker {rank_of_task[1]} of the gang died ({cause_of_death(message)}).")
    return _job_error(error, context)


def _job_error(error: Exception, context: SparkContext) -> EngineError:
    """What a job that failed by no task's fault means: whatever Java's death breaks first, it ends the session."""
    deadline = time.monotonic() + _DEATH_SECONDS
    while is_alive(context):
        if time.monotonic() > deadline:
            return job_error(error)
        time.sleep(0.05)
    return session_ended()
