"""What runs in a container of YARN: `python -m manyeyes.engines.hadoop.task map|reduce JOB`, by Hadoop Streaming.

The container's process talks to HDFS; a worker process under it applies the functions. So a function that kills its
process takes no finished result with it, harms no other task, and is named.
"""

from __future__ import annotations

import functools
import os
import pickle
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from manyeyes.engines.failures import Failure
from manyeyes.engines.hadoop.job import Attempt, Entry, JobFolder, Record, Work
from manyeyes.engines.worker import STARTED, Worker, start_worker, stop_workers

# A mapper publishes what it has when this much time went by since the last time: soon at first, so that short jobs show
# progress, then at a twentieth of its age, so that long jobs don't fill HDFS with small files.
_FIRST_PUBLISH_SECONDS = 0.5
_LAST_PUBLISH_SECONDS = 10.0
# A partial result is kept in the process for longer: the driver does not wait for it.
_PARTIAL_PUBLISH_SECONDS = 60.0
_PUBLISH_BYTES = 16 << 20
# Results of a map_reduce are reduced when this many are at hand, so that few are held.
_REDUCE_AT = 16
# Hadoop ends tasks that are silent for ten minutes.
_STATUS_SECONDS = 10.0


class Functions:
    """What a worker applies: the function to a pickled item, or the reduce function to a list of pickled results."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._fn: Any = None

    def __call__(self, request: bytes | list[bytes]) -> bytes:
        """Answer a request by a pickled result."""
        if isinstance(request, bytes):
            self._fn = self._fn or pickle.loads(self._work.fn)
            result = self._fn(pickle.loads(request))
        else:
            assert self._work.reduce_fn is not None
            result = functools.reduce(pickle.loads(self._work.reduce_fn), map(pickle.loads, request))
        return pickle.dumps(result, protocol=pickle.HIGHEST_PROTOCOL)


class _Runner:
    """Hands requests to a worker process, and replaces it when it dies."""

    def __init__(self, work: Work) -> None:
        self._content = pickle.dumps(Functions(work))
        self._num_threads = work.num_threads
        self._worker: Worker | None = None
        self._last_status = 0.0

    def run(self, request: bytes | list[bytes], seconds: float = 1.0) -> bytes | Failure | str | None:
        """Return the pickled result, or the failure, or how the worker died; None when `seconds` passed before that.

        After None call `wait`, not `run`.
        """
        if self._worker is None:
            self._worker = start_worker(self._content, "manyeyes-task", self._num_threads)
        self._worker.send(pickle.dumps(request))
        return self.wait(seconds)

    def wait(self, seconds: float = 1.0) -> bytes | Failure | str | None:
        """Return the outcome of the request that runs, or None as `run` does."""
        worker = self._worker
        assert worker is not None
        deadline = time.monotonic() + seconds
        while worker.connection.poll(max(0.0, deadline - time.monotonic())):
            try:
                outcome = worker.receive()
            except (EOFError, OSError):
                worker.process.join(timeout=5)
                cause = worker.cause_of_death()
                self.stop()
                return cause
            if outcome is not STARTED:
                return outcome
        if time.monotonic() - self._last_status > _STATUS_SECONDS:
            self._last_status = time.monotonic()
            _report("status:a task runs")
        return None

    def stop(self) -> None:
        """End the worker process."""
        if self._worker is not None:
            stop_workers([self._worker])
            self._worker = None


class _Mapper:
    """One attempt at the tasks of one map."""

    def __init__(self, job: JobFolder, attempt: Attempt) -> None:
        self._job = job
        self._attempt = attempt
        self._work = job.read_work()
        self._runner = _Runner(self._work)
        self._records: list[Record] = []
        self._num_bytes = 0
        self._results: list[bytes] = []
        self._reduced_indexes: list[int] = []
        self._num_published = 0
        self._started = self._published_records = self._published_partial = time.monotonic()
        self._failed = False
        self._num_finished = 0
        self.partials: list[str] = []

    def run(self, entries: Sequence[Entry]) -> bool:
        """Run the tasks that no earlier attempt finished; returns whether all that are left now are finished."""
        finished = self._finished_before()
        pending = [entry for entry in entries if entry.index not in finished]
        try:
            for index, item in self._job.read_items(pending):
                if self._attempt.number > 0:
                    self._job.mark_begun(self._attempt, index)
                if self._take(index, self._wait_for(item)):
                    return True  # said on purpose: the driver ends the job, and no attempt is to follow
                self._publish_records_if_due()
            self._publish_partial()
            self._publish_records()
        finally:
            self._runner.stop()
        _report(f"counter:Manyeyes,Tasks finished,{self._num_finished}")
        return not self._failed

    def _finished_before(self) -> set[int]:
        if self._attempt.number == 0:
            return set()
        folder = "records" if self._work.reduce_fn is None else "partials"
        finished: set[int] = set()
        for name in self._job.names(folder, self._attempt.task):
            indexes = {
                index
                for record in self._job.read(folder, name)
                if isinstance(record.outcome, bytes)
                for index in record.indexes
            }
            # Two attempts that overlapped may both have reduced a result; it counts once.
            if folder == "records" or not indexes & finished:
                finished |= indexes
                self.partials.append(name)
        return finished

    def _wait_for(self, item: bytes) -> bytes | Failure | str:
        if time.monotonic() - self._published_partial > _PARTIAL_PUBLISH_SECONDS:
            self._publish_partial()
        outcome = self._runner.run(item, seconds=_FIRST_PUBLISH_SECONDS)
        while outcome is None:
            self._publish_records_if_due()
            outcome = self._runner.wait()
        return outcome

    def _take(self, index: int, outcome: bytes | Failure | str) -> bool:
        """Keep the outcome of a task; returns whether it ends the job."""
        self._num_finished += isinstance(outcome, bytes)
        if isinstance(outcome, bytes) and self._work.reduce_fn is not None:
            self._results.append(outcome)
            self._reduced_indexes.append(index)
            if len(self._results) >= _REDUCE_AT:
                self._reduce()
            return False
        self._records.append(Record((index,), outcome))
        if isinstance(outcome, bytes):
            self._num_bytes += len(outcome)
            return False
        self._failed = True
        print(outcome.traceback if isinstance(outcome, Failure) else outcome, file=sys.stderr)
        if isinstance(outcome, Failure) and outcome.error is not None:
            self._publish_records()
            return True
        return False

    def _reduce(self) -> None:
        outcome = self._runner.run(self._results)
        while outcome is None:
            outcome = self._runner.wait()
        if isinstance(outcome, bytes):
            self._results = [outcome]
            return
        self._results, self._reduced_indexes = [], []
        self._records.append(Record((), outcome))
        self._failed = True

    def _publish_partial(self) -> None:
        if len(self._results) > 1:
            self._reduce()
        if self._results:
            record = Record(tuple(self._reduced_indexes), self._results[0])
            self.partials.append(self._publish("partials", [record]))
        self._results, self._reduced_indexes = [], []
        self._published_partial = time.monotonic()

    def _publish_records_if_due(self) -> None:
        now = time.monotonic()
        age = min(max((now - self._started) / 20, _FIRST_PUBLISH_SECONDS), _LAST_PUBLISH_SECONDS)
        if now - self._published_records > age or self._num_bytes > _PUBLISH_BYTES:
            self._publish_records()

    def _publish_records(self) -> None:
        if self._records:
            self._publish("records", self._records)
        self._records, self._num_bytes = [], 0
        self._published_records = time.monotonic()

    def _publish(self, folder: str, records: Sequence[Record]) -> str:
        self._num_published += 1
        return self._job.publish(folder, self._attempt, self._num_published, records)


def run_mapper(job: JobFolder, attempt: Attempt, entries: Sequence[Entry], output: TextIO) -> int:
    """Run a map; returns the exit code, which is not 0 where Hadoop is to try it again.

    A map of a map_reduce writes the names of its partial results to `output`, for the reducer.
    """
    mapper = _Mapper(job, attempt)
    if not mapper.run(entries):
        return 1
    if job.read_work().reduce_fn is not None:
        for name in mapper.partials:
            output.write(f"0\t{name}\n")
        output.flush()
    return 0


def run_reducer(job: JobFolder, attempt: Attempt, names: Sequence[str]) -> int:
    """Reduce the partial results with these names to the one of the job; returns the exit code."""
    runner = _Runner(job.read_work())
    results: list[bytes] = []
    try:
        for position, name in enumerate(names, start=1):
            results += [record.outcome for record in job.read("partials", name) if isinstance(record.outcome, bytes)]
            if len(results) > 1 and (len(results) >= _REDUCE_AT or position == len(names)):
                outcome = runner.run(results)
                while outcome is None:
                    outcome = runner.wait()
                if not isinstance(outcome, bytes):
                    job.publish("records", attempt, 0, [Record((), outcome)])
                    on_purpose = isinstance(outcome, Failure) and outcome.error is not None
                    return 0 if on_purpose else 1
                results = [outcome]
    finally:
        runner.stop()
    if results:
        job.write_reduced(results[0])
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run as a mapper or as a reducer of Hadoop Streaming."""
    # YARN runs containers as one user of the system for all; USER is who submitted the job.
    if os.environ.get("USER"):
        os.environ.setdefault("HADOOP_USER_NAME", os.environ["USER"])
    # What a function prints is for the log and not for the reducer.
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    role, uri = arguments
    job, attempt = JobFolder(uri), Attempt.from_environment()
    if role == "map":
        return run_mapper(job, attempt, [Entry.parse(line) for line in sys.stdin.buffer], output)
    return run_reducer(job, attempt, [line.split("\t")[1].strip() for line in sys.stdin])


def _report(message: str) -> None:
    """Tell Hadoop something, in the way of Streaming: by a line on standard error."""
    sys.stderr.write(f"reporter:{message}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
