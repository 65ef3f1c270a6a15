"""DiLoCo: slices of the data train apart, and once a round the driver brings their weights together.

Each round is one map_reduce of the engine: in every slice some local steps from the weights of the round (diloco_task),
then one step of the outer optimizer in the driver (diloco_outer). Weights travel as files (diloco_files). The driver
averages in the order of the slices, so that the engine, the number of workers and the order in which tasks end don't
change a bit (docs/decisions/0101).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.engines.base import Engine, kept_workers
from manyeyes.errors import CheckpointError, TrainingError
from manyeyes.training import backend, checkpoint, weights
from manyeyes.training.checkpoint import Arrays
from manyeyes.training.clock import Clock, WorkerSpeed, speeds_of
from manyeyes.training.diloco_files import RoundFiles, encode, publish
from manyeyes.training.diloco_jobs import SliceJobs
from manyeyes.training.diloco_outer import OuterOptimizer, mean_of, moved_average
from manyeyes.training.diloco_task import LocalSteps, Measure, Report, Reports, read_result
from manyeyes.training.events import Notice, OnEvent
from manyeyes.training.interrupts import InterruptedByWishError, StopWish, interruptible
from manyeyes.training.loop import Loop
from manyeyes.training.plan import Plan
from manyeyes.training.run import config_without_weights
from manyeyes.training.session import Job, Outcome, begin, outcome_of, pipelines, started_event
from manyeyes.training.settings import TrainSettings
from manyeyes.training.strategy import Totals

_DIGEST_BYTES = 32


def run_rounds(engine: Engine, job: Job, notify: OnEvent, wish: StopWish) -> Outcome:
    """Train in rounds on an engine, from the job's checkpoint or the start.

    Raises:
        TrainingError: more slices failed than the settings allow.
        ManyeyesError: as session.run_session does.
    """
    settings = job.settings
    num_slices = settings.strategy.virtual_workers
    assert num_slices is not None  # TrainSettings.for_workers has filled it in
    num_threads, xla = settings.strategy.threads_per_virtual_worker, settings.train.xla
    backend.prepare(settings.train.seed, num_threads, deterministic=not xla)
    data = Dataset(job.dataset, verify="auto")
    train_pipeline, val_pipeline = pipelines(data, job.run, settings, world_size=num_slices)
    strategy = DiLoCo(engine, job, data, train_pipeline.steps_per_epoch, val_pipeline is not None, notify, wish)
    state = begin(job, strategy)
    world_size = min(engine.num_workers, num_slices)
    notify(started_event(job.run, settings, strategy.num_parameters, train_pipeline, state, world_size))
    loop = Loop(job.run, settings, strategy, notify, wish)
    with kept_workers(engine):
        state = loop.run_from(state)
    strategy.prune()
    return outcome_of(loop, state)


@dataclass(frozen=True)
class _Start:
    """What a model starts with, by key: what learns by gradients, the other floats (statistics), and the rest."""

    weights: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    others: dict[str, np.ndarray]
    num_parameters: int

    @classmethod
    def of(cls, job: Job, settings: TrainSettings, data: Dataset) -> _Start:
        """Those of a model that is built for this and then dropped: the driver needs none."""
        import tensorflow as tf

        from manyeyes.training.building import build_replica

        with tf.device("CPU"):  # a GPU's memory is for the workers
            model = build_replica(job.run, settings, data).model
        keyed = weights.keyed_variables(model.variables)
        learning = {id(variable) for variable in model.trainable_variables}
        parts: list[dict[str, np.ndarray]] = [{}, {}, {}]
        for key, array in weights.arrays_of(model.variables).items():
            place = 2 if array.dtype.kind != "f" else 0 if id(keyed[key]) in learning else 1
            parts[place][key] = array
        return cls(parts[0], parts[1], parts[2], int(model.count_params()))


class DiLoCo:
    """See strategy.Strategy.

    Args:
        engine: that runs the rounds.
        job: the session; its checkpoint is not looked at.
        data: the dataset of the job.
        steps_per_epoch: global batches in an epoch.
        has_val: whether there is a val split.
        notify: is told of slices that failed.
        wish: to stop; it cuts a round short.
    """

    def __init__(
        self,
        engine: Engine,
        job: Job,
        data: Dataset,
        steps_per_epoch: int,
        has_val: bool,
        notify: OnEvent,
        wish: StopWish,
    ) -> None:
        self.is_chief = True
        self.steps_per_epoch = steps_per_epoch
        self.clock = Clock()
        self.workers: tuple[WorkerSpeed, ...] = ()
        self.sent_bytes: int | None = 0
        self._notify, self._wish = notify, wish
        self._settings = job.settings
        self._strategy = job.settings.strategy
        self._has_val = has_val
        # Tasks get weights by files, and reach those from wherever they run.
        run = dataclasses.replace(
            job.run, uri=storage.absolute(job.run.uri), model=config_without_weights(job.run.model)
        )
        self._checkpoints_uri = run.checkpoints_uri
        sent = dataclasses.replace(job, run=run, checkpoint=None)
        self._files = RoundFiles(run.uri)
        self._jobs = SliceJobs(engine, sent, self._files, notify)
        self._plan = Plan(job.settings, steps_per_epoch)
        start = _Start.of(job, job.settings, data)
        self.num_parameters = start.num_parameters
        self._weights, self._statistics, self._others = start.weights, start.statistics, start.others
        strategy = self._strategy
        self._outer = OuterOptimizer(strategy.outer_learning_rate, strategy.outer_momentum, start.weights)
        self._average = self._floats if job.settings.optimizer.ema else {}
        self._inner_sha256 = [""] * (strategy.virtual_workers or 1)
        self._totals = Totals()
        self._first_bad_step: int | None = None
        self._global_step = 0
        self._published: tuple[int, str] | None = None

    def steps(self, epoch: int, start_step: int, global_step: int) -> Generator[int, None, None]:
        """See Strategy.steps; yields after every round."""
        self._global_step = global_step
        if start_step == 0 and self._plan.frees_backbone(epoch):
            self._outer.reset()
            self._inner_sha256 = [""] * len(self._inner_sha256)
        step = start_step
        while step < self.steps_per_epoch:
            num_steps = min(self._strategy.local_steps, self.steps_per_epoch - step)
            try:
                with interruptible(self._wish):
                    self._run_round(epoch, step, num_steps)
            except InterruptedByWishError:
                num_steps = 0
            step += num_steps
            yield num_steps

    def must_stop(self, wish: bool, step: int) -> bool:
        """See Strategy.must_stop."""
        return wish

    def totals(self) -> Totals:
        """See Strategy.totals."""
        return self._totals

    def set_totals(self, totals: Totals) -> None:
        """See Strategy.set_totals."""
        self._totals = totals

    def first_bad_step(self) -> int | None:
        """See Strategy.first_bad_step."""
        return self._first_bad_step

    def evaluate(self) -> Totals | None:
        """See Strategy.evaluate: one map_reduce over the slices of the val split."""
        if not self._has_val:
            return None
        # What is measured is what a checkpoint holds, so it does not travel in fewer bits.
        if self._average or self._strategy.wire != "float32":
            uri = self._files.measured(self._global_step)
            sha256 = publish(uri, encode(self._average or self._floats))
        else:
            uri, sha256 = self._files.weights(self._global_step), self._publish_weights()
        reports = self._run([Measure(slice_, uri, sha256) for slice_ in range(len(self._inner_sha256))])
        return _sum(report.totals for report in _in_order(reports))

    def check(self) -> None:
        """See Strategy.check: the weights are in one place."""

    def arrays(self) -> Arrays:
        """See Strategy.arrays: the optimizer is the outer one. Inner states stay in files, told by their checksums."""
        parts: dict[str, dict[str, np.ndarray]] = {
            "model": {**self._floats, **self._others},
            "optimizer": {**self._outer.momentum, "num_rounds": np.array(self._outer.num_rounds, np.int64)},
        }
        if self._average:
            parts["ema"] = dict(self._average)
        if self._strategy.keep_inner_state:
            digests = [
                np.frombuffer(bytes.fromhex(each).ljust(_DIGEST_BYTES, b"\0"), np.uint8) for each in self._inner_sha256
            ]
            parts["inner"] = {"sha256": np.stack(digests)}
        return parts

    def load_arrays(self, arrays: Arrays, what: str) -> None:
        """See Strategy.load_arrays."""
        expected = self.arrays()
        for part, values in expected.items():
            found = arrays.get(part, {})
            for key in sorted({*values, *found}):
                if key not in values or key not in found or _form(values[key]) != _form(found[key]):
                    raise CheckpointError(f"{what} ({part}) is of another model or strategy: see {key}.")
        model, outer = arrays["model"], arrays["optimizer"]
        self._weights = {key: model[key] for key in self._weights}
        self._statistics = {key: model[key] for key in self._statistics}
        self._others = {key: model[key] for key in self._others}
        self._outer.momentum = {key: outer[key] for key in self._outer.momentum}
        self._outer.num_rounds = int(outer["num_rounds"])
        if self._average:
            self._average = dict(arrays["ema"])
        if self._strategy.keep_inner_state:
            digests = [row.tobytes() for row in arrays["inner"]["sha256"]]
            self._inner_sha256 = [digest.hex() if any(digest) else "" for digest in digests]
        self._published = None

    def prune(self, step: int | None = None) -> None:
        """Remove files that neither the round that starts after `step` nor a resumed run needs."""
        names = checkpoint.names(self._checkpoints_uri) if self._strategy.keep_inner_state else []
        self._files.prune(step, [checkpoint.step_of_name(name) for name in names])

    @property
    def _floats(self) -> dict[str, np.ndarray]:
        return {**self._weights, **self._statistics}

    def _run_round(self, epoch: int, step: int, num_steps: int) -> None:
        """Do one round; nothing is changed before all of it is done."""
        started = time.perf_counter()
        self.prune(self._global_step)
        sha256 = self._publish_weights()
        items = [
            LocalSteps(slice_, epoch, step, num_steps, self._global_step, sha256, inner)
            for slice_, inner in enumerate(self._inner_sha256)
        ]
        reports = self._run(items, self._strategy.max_lost_workers)
        deltas, values = self._averages_of(reports, items)
        for slice_, report in sorted(reports.items()):
            if report.lost_inner:
                self._notify(
                    Notice(
                        f"{self._files.inner(self._global_step, slice_)} is missing or damaged: the optimizer of slice "
                        f"{slice_} starts afresh, so the weights will not be those of an uninterrupted run."
                    )
                )
        weights_after = self._outer.step(self._weights, deltas)
        statistics = {key: values[key].astype(old.dtype, copy=False) for key, old in self._statistics.items()}
        # From here on in one go: a wish may come in between.
        self._wish.interrupts = False
        self._weights, self._statistics = weights_after, statistics
        self._inner_sha256 = [reports[i].inner_sha256 if i in reports else "" for i in range(len(items))]
        bad_steps = [report.first_bad_step for report in reports.values() if report.first_bad_step is not None]
        self._first_bad_step = min(bad_steps, default=None)
        self._totals = _sum([self._totals, *(report.totals for report in _in_order(reports))])
        if self._average:
            decay = self._settings.optimizer.ema
            self._average = moved_average(self._average, self._floats, decay, self._global_step, num_steps)
        self._global_step += num_steps
        self._tell_time(reports, num_steps, time.perf_counter() - started)

    def _averages_of(
        self, reports: Reports, items: Sequence[LocalSteps]
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Means of pseudogradients and of statistics over the slices that saw an example, in their order."""

        def results() -> Iterator[dict[str, np.ndarray]]:
            for slice_, report in sorted(reports.items()):
                if report.totals.num_examples == 0 and report.first_bad_step is None:
                    continue  # the last batch of an epoch had none for it, so that it has nothing to say
                uri = self._files.result(self._global_step, slice_)
                found = read_result(uri, items[slice_])
                if found is None or found[0].sha256 != report.sha256:
                    raise TrainingError(f"{uri} is not what slice {slice_} wrote. Does another training write there?")
                _, deltas, values = found
                yield {**deltas, **values}

        means = mean_of(results())
        return {key: means[key] for key in self._weights}, {key: means[key] for key in self._statistics}

    def _publish_weights(self) -> str:
        """Publish the weights for the round that comes next, once; returns their SHA-256."""
        if self._published is None or self._published[0] != self._global_step:
            content = encode(self._floats, self._strategy.wire, self._statistics)
            self._published = self._global_step, publish(self._files.weights(self._global_step), content)
        return self._published[1]

    def _run(self, items: Sequence[LocalSteps | Measure], max_lost: int = 0) -> Reports:
        reports = self._jobs.run(items, max_lost)
        assert self.sent_bytes is not None
        self.sent_bytes += sum(report.sent_bytes for report in reports.values())
        return reports

    def _tell_time(self, reports: Reports, num_steps: int, seconds: float) -> None:
        """Count what a round took: as the tasks saw it where processes were started and models compiled in it."""
        readings = {slice_: report.readings for slice_, report in reports.items()}
        if self.clock.num_timed_steps == 0:
            seconds = max(each[0] for each in readings.values())
            num_examples = sum(each[3] for each in readings.values())
        else:
            num_examples = sum(report.totals.num_examples for report in reports.values())
        waits = [wait / of for of, wait, _, _ in readings.values() if of]
        communications = [communication / of for of, _, communication, _ in readings.values() if of]
        self.clock.add(
            seconds=seconds,
            wait_seconds=seconds * float(np.mean(waits or [0.0])),
            num_examples=int(num_examples),
            num_own_examples=int(num_examples),
            num_steps=num_steps,
            communication_seconds=seconds * float(np.mean(communications or [0.0])),
        )
        speeds = speeds_of([readings[slice_] for slice_ in sorted(readings)])
        self.workers = tuple(
            dataclasses.replace(speed, rank=slice_) for slice_, speed in zip(sorted(readings), speeds, strict=False)
        )


def _sum(totals: Any) -> Totals:
    return functools.reduce(
        lambda a, b: Totals(*map(operator.add, dataclasses.astuple(a), dataclasses.astuple(b))), totals, Totals()
    )


def _in_order(reports: Reports) -> list[Report]:
    return [reports[slice_] for slice_ in sorted(reports)]


def _form(array: np.ndarray) -> tuple[tuple[int, ...], str]:
    return array.shape, str(array.dtype)
