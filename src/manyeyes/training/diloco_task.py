"""What of DiLoCo runs in a task: a slice's local steps of one round, or its part of the val split.

A task is a pure function of its item and of the files that the item names, whichever worker runs it, so it may be tried
again or run twice. Whatever this module imports, workers import before TensorFlow is made ready.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.engines.base import GangContext
from manyeyes.errors import CheckpointError, UsageError
from manyeyes.training import backend, weights
from manyeyes.training.diloco_files import RoundFiles, decode, encode, publish, sha256_of
from manyeyes.training.plan import Plan
from manyeyes.training.reporting import Life, ends_when_it_hangs
from manyeyes.training.session import Job, pipelines
from manyeyes.training.strategy import Totals

DELTA, VALUE = "delta/", "value/"


@dataclass(frozen=True)
class LocalSteps:
    """What one slice does in a round.

    Attributes:
        slice: its number; it trains on part `slice` of every global batch.
        epoch, start_step, num_steps: which steps of the epoch.
        global_step: steps of the run that are done.
        weights_sha256: of the weights' file of the round.
        inner_sha256: of the file with the state of the slice's optimizer; "" starts it afresh.
    """

    slice: int
    epoch: int
    start_step: int
    num_steps: int
    global_step: int
    weights_sha256: str
    inner_sha256: str = ""


@dataclass(frozen=True)
class Measure:
    """A slice's part of the val split, with the weights of the file at `uri`."""

    slice: int
    uri: str
    sha256: str


@dataclass(frozen=True)
class Report:
    """What a task came to.

    Attributes:
        totals: sums over its examples.
        sha256: of the file with what the slice came to.
        inner_sha256: of the file with the state of its optimizer at the end of the round; "" where none is kept.
        first_bad_step: the first global_step whose loss was not finite, or None.
        lost_inner: whether the state that its optimizer was to start with was missing or damaged.
        sent_bytes: that this worker read from and wrote to the run directory.
        readings: as Clock.readings gives them, without the step in which the step is compiled.
    """

    totals: Totals
    sha256: str = ""
    inner_sha256: str = ""
    first_bad_step: int | None = None
    lost_inner: bool = False
    sent_bytes: int = 0
    readings: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


Reports = dict[int, Report]


def merge(left: Reports, right: Reports) -> Reports:
    """The reduce function: reports by slice."""
    return {**left, **right}


def run_item(job: Job, may_exit: bool, item: LocalSteps | Measure) -> Reports:
    """The map function.

    Args:
        may_exit: end the process when no step ends within strategy.step_timeout_seconds, so that the engine tries the
            task again. Not where it is the driver's.

    Raises:
        UsageError: this worker does not see the run directory.
        DatasetError: the dataset is missing or damaged.
    """
    life = Life()
    with ends_when_it_hangs(life, job.settings.strategy.step_timeout_seconds if may_exit else 0):
        bench = _Bench.of(job, item.slice)
        if isinstance(item, Measure):
            report = _measure(bench, item, life)
        else:
            report = _take_steps(bench, RoundFiles(job.run.uri), item, life)
    if report.first_bad_step is not None:
        _Bench.last = None  # it remembers the step
    return {item.slice: report}


def read_result(uri: str, item: LocalSteps) -> tuple[Report, dict[str, np.ndarray], dict[str, np.ndarray]] | None:
    """What a slice came to from these weights: its report, pseudogradients and statistics; None where it did not yet.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return None
    arrays, note = decode(content, uri)
    if note["item"] != dataclasses.asdict(item):
        return None
    bad_step, inner_sha256 = note["first_bad_step"], note["inner_sha256"]
    report = Report(Totals(*note["totals"]), sha256_of(content), inner_sha256, bad_step, note["lost_inner"])
    deltas, values = (
        {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
        for prefix in (DELTA, VALUE)
    )
    return report, deltas, values


class _Bench:
    """What a process needs to train and is slow to make; kept for the next task, as engines reuse processes."""

    last: _Bench | None = None

    def __init__(self, key: tuple[str, ...], job: Job, slice_: int) -> None:
        settings = dataclasses.replace(job.settings, optimizer=dataclasses.replace(job.settings.optimizer, ema=0.0))
        num_slices = job.settings.strategy.virtual_workers
        assert num_slices is not None
        # Tasks know nothing of each other. Where a machine has several GPUs, neighbouring slices begin on other ones.
        place = GangContext(slice_, num_slices, ("",) * num_slices)
        num_threads, xla = settings.strategy.threads_per_virtual_worker, settings.train.xla
        backend.prepare(settings.train.seed, num_threads, place, deterministic=not xla)
        from manyeyes.training.building import build_replica

        self.key = key
        self.settings = settings
        data = Dataset(job.dataset, verify="auto")
        self.train_pipeline, self.val_pipeline = pipelines(data, job.run, settings, world_size=num_slices)
        self.replica = build_replica(job.run, settings, data)
        self.plan = Plan(settings, self.train_pipeline.steps_per_epoch)
        self.is_warm = False
        variables = self.replica.model.variables
        self.statistics = {
            key
            for key, variable in weights.keyed_variables(variables).items()
            if any(variable is statistic for statistic in self.replica.statistics)
        }
        self._others = {key: a for key, a in weights.arrays_of(variables).items() if a.dtype.kind != "f"}
        self._fresh = weights.arrays_of(self.replica.optimizer.variables)
        self._dtypes = {key: str(variable.dtype) for key, variable in weights.keyed_variables(variables).items()}

    @classmethod
    def of(cls, job: Job, slice_: int) -> _Bench:
        """The one of this process, made anew for another run."""
        key = (job.dataset, job.run.dataset_fingerprint, job.run.settings_fingerprint, job.run.precision)
        if cls.last is None or cls.last.key != key:
            cls.last = None  # frees its memory first
            cls.last = cls(key, job, slice_)
        return cls.last

    def load_weights(self, arrays: dict[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
        """Set all floating variables of the model; returns what they are now."""
        cast = {key: array.astype(self._dtypes.get(key, array.dtype), copy=False) for key, array in arrays.items()}
        weights.assign(self.replica.model.variables, {**self._others, **cast}, what)
        return cast

    def load_inner(self, arrays: dict[str, np.ndarray] | None, what: str) -> None:
        """Set the optimizer, or start it afresh."""
        weights.assign(self.replica.optimizer.variables, self._fresh if arrays is None else arrays, what)


def _take_steps(bench: _Bench, files: RoundFiles, item: LocalSteps, life: Life) -> Report:
    started = time.perf_counter()
    strategy, replica = bench.settings.strategy, bench.replica
    uri = files.weights(item.global_step)
    content = _read_weights(uri, item.weights_sha256)
    sent_bytes = len(content)
    replica.let_learn(bench.plan.learning(item.epoch))
    start = bench.load_weights(decode(content, uri)[0], uri)
    inner = _read_inner(files.inner(item.global_step, item.slice), item.inner_sha256)
    sent_bytes += inner[1]
    bench.load_inner(inner[0], f"The inner state of slice {item.slice}")
    replica.set_totals(Totals())
    loaded_seconds = time.perf_counter() - started

    steps_seconds, wait_seconds, num_examples = _run_steps(bench, item, life)

    started = time.perf_counter()
    totals, bad_step = replica.totals(), replica.first_bad_step()
    end = item.global_step + item.num_steps
    inner_sha256 = ""
    if strategy.keep_inner_state:
        content = encode(weights.arrays_of(replica.optimizer.variables))
        inner_sha256 = publish(files.inner(end, item.slice), content)
        sent_bytes += len(content)
    now = weights.arrays_of(replica.model.variables)
    arrays = {
        f"{VALUE}{key}" if key in bench.statistics else f"{DELTA}{key}": (
            now[key] if key in bench.statistics else start[key] - now[key]
        )
        for key in start
    }
    lost_inner = inner[0] is None and bool(item.inner_sha256)
    note = {
        "item": dataclasses.asdict(item),
        "totals": dataclasses.astuple(totals) if bad_step is None else (0, 0, 0),  # JSON has no NaN
        "first_bad_step": bad_step,
        "inner_sha256": inner_sha256,
        "lost_inner": lost_inner,
    }
    # Statistics are few, and a rounded variance could become negative when it is put together again.
    content = encode(arrays, strategy.wire, {key for key in arrays if key.startswith(VALUE)}, note)
    sha256 = publish(files.result(item.global_step, item.slice), content)
    communication_seconds = loaded_seconds + time.perf_counter() - started
    return Report(
        totals,
        sha256,
        inner_sha256,
        bad_step,
        lost_inner,
        sent_bytes + len(content),
        (steps_seconds + communication_seconds, wait_seconds, communication_seconds, num_examples),
    )


def _run_steps(bench: _Bench, item: LocalSteps, life: Life) -> tuple[float, float, float]:
    """Returns the seconds of the steps, those of them that waited for input, and the number of examples."""
    from manyeyes.training.device_feed import on_device

    seconds = wait_seconds = num_examples = 0.0
    stop_step = item.start_step + item.num_steps
    pipeline = bench.train_pipeline.of_rank(item.slice)
    with contextlib.closing(on_device(pipeline.batches(item.epoch, item.start_step, stop_step))) as batches:
        asked = time.perf_counter()
        for batch in batches:
            waited = time.perf_counter() - asked
            if len(batch):
                # Nobody else has a part in this step: the mean is over this part.
                alone = dataclasses.replace(batch, global_size=len(batch))
                rate = bench.plan.learning_rate(item.epoch, batch.step)
                bench.replica.step(alone, rate, item.global_step + batch.step - item.start_step, item.slice)
            life.beat("compute")
            now = time.perf_counter()
            if bench.is_warm:
                seconds, wait_seconds, num_examples = (
                    seconds + now - asked,
                    wait_seconds + waited,
                    num_examples + len(batch),
                )
            bench.is_warm, asked = True, now
    return seconds, wait_seconds, num_examples


def _measure(bench: _Bench, item: Measure, life: Life) -> Report:
    from manyeyes.training.device_feed import on_device

    content = _read_weights(item.uri, item.sha256)
    bench.load_weights(decode(content, item.uri)[0], item.uri)
    assert bench.val_pipeline is not None

    def beating(batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            life.beat("evaluation")
            yield batch

    with contextlib.closing(on_device(bench.val_pipeline.of_rank(item.slice).batches(0))) as batches:
        return Report(bench.replica.evaluate(beating(batches)), sent_bytes=len(content))


def _read_weights(uri: str, sha256: str) -> bytes:
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        raise UsageError(
            f"A worker does not find {uri}, which the driver wrote. Put the run where all workers reach it: on HDFS, "
            "S3 or a shared disk."
        ) from None
    if sha256_of(content) != sha256:
        raise CheckpointError(f"{uri} fails its checksum. Does another training write into this run?")
    return content


def _read_inner(uri: str, sha256: str) -> tuple[dict[str, np.ndarray] | None, int]:
    """The arrays and the size of the file; None where there is none, or not the one that was asked for."""
    if not sha256:
        return None, 0
    try:
        content = storage.read_bytes(uri)
    except FileNotFoundError:
        return None, 0
    return (decode(content, uri)[0] if sha256_of(content) == sha256 else None), len(content)
