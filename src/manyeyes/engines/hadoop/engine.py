"""The hadoop engine: map and map_reduce as jobs of Hadoop Streaming on YARN (docs/decisions/0090)."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import pickle
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from manyeyes import config, storage
from manyeyes.engines.base import MAX_ATTEMPTS, GangContext, Item, Result, collect, describe_failure, with_environment
from manyeyes.engines.environment import node_python, pack_environment
from manyeyes.engines.failures import Failure, death_error, pickle_item, pickle_value
from manyeyes.engines.hadoop.client import Client
from manyeyes.engines.hadoop.installation import Installation, find_installation
from manyeyes.engines.hadoop.job import JobFolder, Record, Work
from manyeyes.errors import EngineError, ManyeyesError, TaskError, UsageError

# How many maps there are for each container that the cluster holds: a container costs seconds to start, and with only
# one for each the slowest is waited for.
_MAPS_PER_WORKER = 4
# How long a job may take to end after the last attempt at one of its tasks failed.
_ENDING_SECONDS = 3.0
# Where an environment that was sent lies in a container's folder.
_SHIPPED = "manyeyes-environment"
_COPY_BYTES = 8 << 20
_MIN_POLL_SECONDS = 0.1
_MAX_POLL_SECONDS = 2.0
_log = logging.getLogger("manyeyes.engines")


@dataclass(frozen=True)
class HadoopSettings:
    """Settings of the hadoop engine.

    Attributes:
        hadoop: the command that submits jobs; default: of HADOOP_HOME, else on the PATH.
        streaming_jar: the path of hadoop-streaming-*.jar; default: that of the installation of the command.
        work_dir: a folder on HDFS for the folders of jobs; default: /tmp/manyeyes-USER on the cluster's file system.
        python: the Python of the tasks, as a path on every node; default: the driver's own path, or with `ship_env` the
            nodes' own python3.N.
        queue: of YARN.
        map_memory_mb: the memory of a container, in MiB; default: the cluster's.
        num_threads: the cores of a container, and the threads that a task may use.
        tasks_per_map: how many tasks run in one container, one after the other; default: as many as make one container
            for each of `num_workers`, or, where that was not given, four for each container that the cluster holds.
        pass_environment: the driver's environment variables that tasks get, by name or pattern: ["AWS_*"].
        ship_env: send this environment's packages to nodes that do not have them: once to HDFS, and from there once to
            each node.
        ship_extras: the extras of Manyeyes that are sent with it; default: those that tasks may need, as installed.
        properties: of Hadoop, for the job, e.g. {"mapreduce.job.priority" = "HIGH"}.
    """

    hadoop: str | None = None
    streaming_jar: str | None = None
    work_dir: str | None = None
    python: str | None = None
    queue: str | None = None
    map_memory_mb: int | None = None
    num_threads: int = 1
    tasks_per_map: int | None = None
    pass_environment: tuple[str, ...] = ()
    ship_env: bool = False
    ship_extras: tuple[str, ...] | None = None
    properties: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("map_memory_mb", "num_threads", "tasks_per_map"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} is below 1. Give at least 1.")


class HadoopEngine:
    """Runs tasks in containers of YARN, at most `num_workers` at once where that is given.

    YARN tries failed containers again. What goes to the tasks and comes back goes through a folder on HDFS.
    """

    name = "hadoop"

    def __init__(self, num_workers: int | None, settings: HadoopSettings, installation: Installation) -> None:
        self._settings = settings
        self._installation = installation
        self._limit = num_workers
        self._work_dir = settings.work_dir or installation.default_work_dir()
        self.num_workers = num_workers or installation.num_containers(settings.map_memory_mb, settings.num_threads)

    def map(
        self,
        fn: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        on_result: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """See Engine.map; all items are drawn and lie on HDFS before the first task starts."""
        return collect(self._run(fn, None, items), on_result)

    def map_reduce(
        self, map_fn: Callable[[Item], Result], reduce_fn: Callable[[Result, Result], Result], items: Iterable[Item]
    ) -> Result | None:
        """See Engine.map_reduce; each map reduces its own results, and one reducer those of all maps."""
        reduced = collect(self._run(map_fn, reduce_fn, items), None)
        return reduced[0] if reduced else None

    def gang(self, fn: Callable[[GangContext], Result], world_size: int) -> list[Result]:
        """See Engine.gang; MapReduce has none."""
        raise UsageError(
            f"The hadoop engine can't run a gang of {world_size} workers: MapReduce starts tasks as containers come "
            "free, and not all at once. Use --engine spark, which also runs on YARN, or --engine local."
        )

    def _run(
        self, fn: Callable[..., Any], reduce_fn: Callable[..., Any] | None, items: Iterable[Any]
    ) -> Generator[tuple[int, Any], None, None]:
        """Yield (index, result) as results are published; of a map_reduce, the one result."""
        pickled = (pickle_item(fn, index, item) for index, item in enumerate(items))
        first = next(pickled, None)
        if first is None:
            return
        work = Work(
            _pickle_function(fn, self._settings.pass_environment),
            _pickle_function(reduce_fn, self._settings.pass_environment) if reduce_fn is not None else None,
            self._settings.num_threads,
        )
        self._installation.check_resource_manager()
        folder = JobFolder.new(self._work_dir, is_own=self._settings.work_dir is None)
        with contextlib.closing(Client(folder.uri, self._installation.kill, self._installation.environment)) as client:
            folder.write_work(work)
            num_tasks = folder.write_items(itertools.chain([first], pickled))
            client.submit(self._command(fn, folder, num_tasks, with_reducer=reduce_fn is not None))
            ledger = _Ledger(fn, reduce_fn)
            try:
                for index, content in _follow(client, folder, ledger):
                    yield index, pickle.loads(content)
            except ManyeyesError:
                # Mostly the job ends by itself in a moment, which is quicker than to end it.
                client.wait(_ENDING_SECONDS)
                raise
            if client.exit_code != 0 and (reduce_fn is not None or len(ledger.finished) < num_tasks):
                raise ledger.why_it_failed(client, folder)
            if reduce_fn is not None:
                yield 0, pickle.loads(folder.read_reduced())

    def _ship_environment(self) -> str:
        """Put this environment's packages on HDFS, unless they are there, and return the archive's URI."""
        archive = pack_environment(self._settings.ship_extras)
        uri = storage.join(self._work_dir, "environments", archive.name)
        if not storage.exists(uri):
            _log.info("Sending %s to %s, once", archive.name, uri)
            with open(archive, "rb") as source, storage.publish(uri) as target:
                shutil.copyfileobj(source, target, _COPY_BYTES)
        return uri

    def _command(self, fn: Callable[..., Any], folder: JobFolder, num_tasks: int, with_reducer: bool) -> list[str]:
        settings = self._settings
        # Hadoop's own limit of maps at once (mapreduce.job.running.map.limit) can't be used: with it, a failed map may
        # wait for its next container for ever (seen in 3.4.2). So a limit is kept by having no more maps.
        num_maps = self._limit or self.num_workers * _MAPS_PER_WORKER
        properties: dict[str, Any] = {
            "mapreduce.job.name": f"manyeyes {describe_failure(fn)}",
            "mapreduce.job.reduces": int(with_reducer),
            "mapreduce.input.lineinputformat.linespermap": settings.tasks_per_map or math.ceil(num_tasks / num_maps),
            "stream.map.input.ignoreKey": "true",
            "mapreduce.map.maxattempts": MAX_ATTEMPTS,
            "mapreduce.reduce.maxattempts": MAX_ATTEMPTS,
            # Tasks may run twice, but there is no need for it.
            "mapreduce.map.speculative": "false",
            "mapreduce.reduce.speculative": "false",
            "mapreduce.map.cpu.vcores": settings.num_threads,
        }
        if settings.queue is not None:
            properties["mapreduce.job.queuename"] = settings.queue
        if settings.map_memory_mb is not None:
            properties["mapreduce.map.memory.mb"] = settings.map_memory_mb
        properties |= config.flatten(settings.properties)
        python = shlex.quote(settings.python or (node_python() if settings.ship_env else sys.executable))
        task = f"{python} -m manyeyes.engines.hadoop.task"
        command = [self._installation.hadoop, "jar", self._installation.streaming_jar]
        for key, value in properties.items():
            command += ["-D", f"{key}={value}"]
        if settings.ship_env:
            command += ["-archives", f"{self._ship_environment()}#{_SHIPPED}"]
        command += ["-input", folder.index, "-output", folder.output]
        command += ["-inputformat", "org.apache.hadoop.mapred.lib.NLineInputFormat"]
        command += ["-outputformat", "org.apache.hadoop.mapred.lib.NullOutputFormat"]
        uri = shlex.quote(folder.uri)
        command += ["-mapper", f"{task} map {uri}"]
        if settings.ship_env:
            command += ["-cmdenv", f"PYTHONPATH={_SHIPPED}"]
        if with_reducer:
            command += ["-reducer", f"{task} reduce {uri}"]
        return command


def create(num_workers: int | None, settings: Mapping[str, Any]) -> HadoopEngine:
    """Make the engine: with the settings of HadoopSettings, and without a number of workers as many as YARN holds.

    Raises:
        UsageError: Hadoop's command or its streaming jar is not there, or a setting is wrong.
    """
    made = config.from_dict(HadoopSettings, settings)
    return HadoopEngine(num_workers, made, find_installation(made.hadoop, made.streaming_jar))


class _Ledger:
    """What is known of a job's tasks."""

    def __init__(self, fn: Callable[..., Any], reduce_fn: Callable[..., Any] | None) -> None:
        self._fn = fn
        self._reduce_fn = reduce_fn
        self.finished: set[int] = set()
        self._num_attempts: dict[int, int] = {}
        self._last: dict[int, Failure | str] = {}

    def take(self, record: Record) -> Iterator[tuple[int, bytes]]:
        """Yield what a record finishes. Raises what a task said on purpose, and a TaskError on its last attempt."""
        if isinstance(record.outcome, bytes):
            for index in record.indexes:
                if index not in self.finished:
                    self.finished.add(index)
                    self._last.pop(index, None)
                    yield index, record.outcome
            return
        if isinstance(record.outcome, Failure):
            record.outcome.raise_if_on_purpose()
        index = record.indexes[0] if record.indexes else -1
        self._num_attempts[index] = self._num_attempts.get(index, 0) + 1
        self._last[index] = record.outcome
        if self._num_attempts[index] >= MAX_ATTEMPTS:
            raise self._error(index)

    def why_it_failed(self, client: Client, folder: JobFolder) -> EngineError:
        """The error of a job that ended too early: the first task that failed, or what Hadoop says."""
        # A container that is ended from outside takes its records with it, but from its second attempt on tasks left
        # marks. It ended in the last one: those before may have finished, and only their results were lost.
        begun = {index: count for index, count in folder.begun().items() if index not in self.finished}
        unrecorded = [index for index, count in begun.items() if count >= MAX_ATTEMPTS - 1]
        was_killed = client.state == "KILLED"
        where = f"See: yarn logs -applicationId {(client.job_id or 'job_ID').replace('job', 'application')}"
        if self._last and not was_killed:
            return self._error(min(self._last))
        if unrecorded and not was_killed:
            cause = "its container was ended, mostly for using too much memory: set map_memory_mb"
            return death_error(self._fn, max(unrecorded), MAX_ATTEMPTS, cause, where)
        if client.job_id is None:
            return EngineError(f"Hadoop took no job: {client.reason or f'its client ended with {client.exit_code}'}.")
        if client.missing_program is not None:
            return EngineError(
                f"The nodes have no {client.missing_program}. Name their Python by the setting python. {where}"
            )
        hint = "" if was_killed or folder.names("records") else "If the nodes' Python lacks Manyeyes, add --ship-env. "
        return EngineError(f"Hadoop ended {client.job_id}: {client.reason or 'it said no reason'}. {hint}{where}")

    def _error(self, index: int) -> TaskError:
        outcome, num_attempts = self._last[index], self._num_attempts[index]
        if index < 0:
            assert self._reduce_fn is not None
            name = describe_failure(self._reduce_fn)
            if isinstance(outcome, str):
                return TaskError(f"Reducing ({name}) ended its worker {num_attempts} times (last: {outcome}).")
            return TaskError(f"Reducing ({name}) failed {num_attempts} times: {outcome.summary}", outcome.traceback)
        if isinstance(outcome, Failure):
            return outcome.task_error(self._fn, index, num_attempts)
        return death_error(self._fn, index, num_attempts, outcome)


def _follow(client: Client, folder: JobFolder, ledger: _Ledger) -> Iterator[tuple[int, bytes]]:
    """Yield results as they are published, until the job ended; say what is to be said of it meanwhile."""
    seen: set[str] = set()
    running = True
    while running:
        running = client.exit_code is None
        started = time.monotonic()
        for name in folder.names("records"):
            if name not in seen:
                seen.add(name)
                for record in folder.read("records", name):
                    yield from ledger.take(record)
        for message in client.messages():
            _log.info(message)
        # Listing a folder of many files takes its time: a tenth of the driver's is enough for it.
        pause = 10 * (time.monotonic() - started)
        client.wait(min(max(pause, _MIN_POLL_SECONDS), _MAX_POLL_SECONDS))
    if client.job_id is None:
        return
    counters = client.counters
    _log.info(
        f"Hadoop ended {client.job_id}: {counters.get('Launched map tasks', 0)} map containers, "
        f"{counters.get('Failed map tasks', 0)} failed, {counters.get('Killed map tasks', 0)} killed; "
        f"{counters.get('Total time spent by all map tasks (ms)', 0) / 1000:.0f} s in them."
    )


def _pickle_function(fn: Callable[..., Any], pass_environment: Sequence[str]) -> bytes:
    name = describe_failure(fn)
    if getattr(getattr(fn, "func", fn), "__module__", None) == "__main__":
        raise EngineError(
            f"{name} can't be sent to a worker: it stands in the script that runs, which the cluster's nodes can't "
            "import. Move it to a module that is installed there."
        )
    return pickle_value(with_environment(fn, pass_environment), name)
