"""The training loop: steps, metrics, validation, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import numpy as np

from manyeyes.data.dataset import Dataset
from manyeyes.data.pipeline import Batch, InputPipeline
from manyeyes.errors import NonFiniteLossError
from manyeyes.models.registry import build
from manyeyes.training import checkpoint
from manyeyes.training.checkpoint import TrainState
from manyeyes.training.events import EpochEnd, OnEvent, Progress
from manyeyes.training.interrupts import StopWish, stop_on_signals
from manyeyes.training.journal import Journal
from manyeyes.training.optimizers import create_optimizer
from manyeyes.training.run import Run
from manyeyes.training.schedules import scale_at
from manyeyes.training.settings import TrainSettings
from manyeyes.training.step import Loss
from manyeyes.training.strategy import Part, SingleWorker, Strategy, Totals

# How often the loss is fetched to see whether it is finite: a fetch waits for the device.
CHECK_EVERY_STEPS = 10
SECONDS_BETWEEN_PROGRESS = 0.25


def create_strategy(run: Run, settings: TrainSettings, data: Dataset) -> SingleWorker:
    """The strategy with the model and the optimizer of a run."""
    weighted = settings.train.class_weights == "balanced"
    loss = Loss(
        num_classes=len(run.class_names),
        label_smoothing=settings.train.label_smoothing,
        class_weights=balanced_weights(data.manifest.counts.written[settings.data.train_split]) if weighted else (),
    )
    strategy = SingleWorker(loss, settings.optimizer.ema)
    strategy.build(
        lambda: build(run.model, run.precision),
        lambda model: create_optimizer(settings.optimizer, model, loss_scaling=run.precision == "float16"),
    )
    return strategy


def balanced_weights(num_by_label: list[int]) -> tuple[float, ...]:
    """num_examples / (num_classes * examples of the class): all classes weigh the same in sum; 0 where none."""
    total, num_classes = sum(num_by_label), len(num_by_label)
    return tuple(total / (num_classes * num) if num else 0.0 for num in num_by_label)


class Clock:
    """How fast a session goes, and how long its steps wait for input."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._step_seconds = 0.0
        self._wait_seconds = 0.0
        self._num_examples = 0
        self._num_steps = 0

    @property
    def seconds(self) -> float:
        """Since the session began."""
        return time.perf_counter() - self._start

    @property
    def images_per_second(self) -> float:
        """Over all steps but the first, in which the step is compiled."""
        return self._num_examples / self._step_seconds if self._step_seconds else 0.0

    @property
    def seconds_per_step(self) -> float:
        """Over all steps but the first."""
        return self._step_seconds / max(1, self._num_steps - 1)

    @property
    def input_wait_share(self) -> float:
        """Share of the steps' time spent waiting for input."""
        return self._wait_seconds / self._step_seconds if self._step_seconds else 0.0

    def timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches and time the waiting for them and what is done with them."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            got = time.perf_counter()
            yield batch
            if self._num_steps:
                self._wait_seconds += got - asked
                self._step_seconds += time.perf_counter() - asked
                self._num_examples += batch.global_size
            self._num_steps += 1


class Loop:
    """Runs epochs from a state to the end, to an early stop, or to a signal.

    Attributes:
        last_train, last_val: totals of the last epoch that ended here, or None.
        interrupted_by: the number of the signal that ended it, or None.
        clock: of this session.
    """

    def __init__(
        self,
        run: Run,
        settings: TrainSettings,
        strategy: Strategy,
        train_pipeline: InputPipeline,
        val_pipeline: InputPipeline | None,
        notify: OnEvent,
    ) -> None:
        self.run = run
        self.settings = settings
        self.strategy = strategy
        self.train_pipeline = train_pipeline
        self.val_pipeline = val_pipeline
        self.notify = notify
        self.last_train: Totals | None = None
        self.last_val: Totals | None = None
        self.interrupted_by: int | None = None

    def run_from(self, state: TrainState) -> TrainState:
        """Do what is left of the run after `state`; returns the state of the last checkpoint.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; no checkpoint is written then.
        """
        self.clock = Clock()
        self.journal = Journal(self.run.uri, state.global_step, self.settings.train.tensorboard)
        self._saved_at = time.monotonic()
        self._shown_at = -SECONDS_BETWEEN_PROGRESS
        with contextlib.closing(self.journal), stop_on_signals() as wish:
            while not state.finished and not wish:
                state = self._run_epoch(state, wish)
        self.interrupted_by = None if state.finished else wish.signal_number
        return state

    def _run_epoch(self, state: TrainState, wish: StopWish) -> TrainState:
        started = time.perf_counter()
        self.strategy.let_learn(self._learning_part(state.epoch))
        if 0 < state.epoch == self.settings.train.freeze_backbone_epochs and state.step == 0:
            self.strategy.reset_optimizer()
        self.strategy.set_totals(Totals(*state.totals))
        self._logged = Totals(*state.logged)
        with contextlib.closing(self.train_pipeline.batches(state.epoch, state.step)) as batches:
            for batch in self.clock.timed(batches):
                self.strategy.step(batch, self._learning_rate(batch.epoch, batch.step), state.global_step)
                state = dataclasses.replace(state, step=state.step + 1, global_step=state.global_step + 1)
                self._watch(state)
                if state.step < self.train_pipeline.steps_per_epoch:
                    if wish or self._is_checkpoint_due(state):
                        self._save(state)
                    if wish:
                        return state
        return self._end_epoch(state, started)

    def _end_epoch(self, state: TrainState, started: float) -> TrainState:
        train = self.last_train = self._checked_totals(state)
        learning_rate = self._learning_rate(state.epoch, state.step - 1)
        val = self.last_val = self._validate()
        if val is not None and not np.isfinite(val.loss):
            raise self._non_finite("The val loss became NaN or infinite", state.global_step - 1)
        is_best = val is not None and (state.best_val_accuracy is None or val.accuracy > state.best_val_accuracy)
        epoch = state.epoch + 1
        state = dataclasses.replace(
            state,
            epoch=epoch,
            step=0,
            totals=(0.0, 0.0, 0.0),
            logged=(0.0, 0.0, 0.0),
            epochs_without_gain=state.epochs_without_gain + 1,
        )
        if is_best and val is not None:
            state = dataclasses.replace(
                state,
                best_step=state.global_step,
                best_epoch=epoch - 1,
                best_val_accuracy=val.accuracy,
                epochs_without_gain=0,
            )
        patience = self.settings.train.early_stop_epochs
        gives_up = val is not None and 0 < patience <= state.epochs_without_gain
        state = dataclasses.replace(state, finished=gives_up or epoch == self.settings.train.epochs)
        seconds = time.perf_counter() - started
        self.journal.write(
            kind="epoch",
            epoch=epoch,
            global_step=state.global_step,
            loss=train.mean_loss,
            accuracy=train.accuracy,
            val_loss=val.mean_loss if val else None,
            val_accuracy=val.accuracy if val else None,
            learning_rate=learning_rate,
            seconds=seconds,
        )
        self._save(state)
        self.notify(
            EpochEnd(
                epoch=epoch,
                epochs=self.settings.train.epochs,
                loss=train.mean_loss,
                accuracy=train.accuracy,
                val_loss=val.mean_loss if val else None,
                val_accuracy=val.accuracy if val else None,
                is_best=is_best,
                seconds=seconds,
            )
        )
        return state

    def _validate(self) -> Totals | None:
        if self.val_pipeline is None:
            return None
        with contextlib.closing(self.val_pipeline.batches(0)) as batches:
            return self.strategy.evaluate(batches)

    def _watch(self, state: TrainState) -> None:
        logs = state.step % self.settings.train.log_every_steps == 0
        now = time.perf_counter()
        shows = now - self._shown_at >= SECONDS_BETWEEN_PROGRESS
        if not (logs or shows or state.step % CHECK_EVERY_STEPS == 0):
            return
        totals = self._checked_totals(state)
        learning_rate = self._learning_rate(state.epoch, state.step - 1)
        if logs:
            recent, self._logged = totals.since(self._logged), totals
            self.journal.write(
                kind="step",
                epoch=state.epoch + 1,
                step=state.step,
                global_step=state.global_step,
                loss=recent.mean_loss,
                accuracy=recent.accuracy,
                learning_rate=learning_rate,
                images_per_second=self.clock.images_per_second,
                input_wait_share=self.clock.input_wait_share,
            )
        if shows:
            self._shown_at = now
            num_steps = self.settings.train.epochs * self.train_pipeline.steps_per_epoch
            self.notify(
                Progress(
                    epoch=state.epoch + 1,
                    step=state.step,
                    global_step=state.global_step,
                    loss=totals.mean_loss,
                    accuracy=totals.accuracy,
                    learning_rate=learning_rate,
                    images_per_second=self.clock.images_per_second,
                    input_wait_share=self.clock.input_wait_share,
                    remaining_seconds=(num_steps - state.global_step) * self.clock.seconds_per_step,
                )
            )

    def _checked_totals(self, state: TrainState) -> Totals:
        totals = self.strategy.totals()
        bad_step = self.strategy.first_bad_step()
        if bad_step is not None:
            raise self._non_finite("The loss became NaN or infinite", bad_step)
        return totals

    def _non_finite(self, what: str, global_step: int) -> NonFiniteLossError:
        epoch, step = divmod(global_step, self.train_pipeline.steps_per_epoch)
        advice = "Try a lower optimizer.learning_rate, a longer schedule.warmup_epochs, or optimizer.clip_norm=1"
        if self.run.precision != "float32":
            advice += ", or train.precision=float32"
        return NonFiniteLossError(
            f"{what} in step {step + 1} of epoch {epoch + 1} (global step {global_step + 1}) at learning rate "
            f"{self._learning_rate(epoch, step):.3g}. {advice}."
        )

    def _is_frozen(self, epoch: int) -> bool:
        return epoch < self.settings.train.freeze_backbone_epochs

    def _learning_part(self, epoch: int) -> Part:
        if self._is_frozen(epoch):
            return "head"
        settings = self.settings.train
        return "all_but_norms" if settings.freeze_backbone_epochs and settings.freeze_norms else "all"

    def _learning_rate(self, epoch: int, step: int) -> float:
        settings, steps_per_epoch = self.settings, self.train_pipeline.steps_per_epoch
        scale = scale_at(settings.schedule, epoch + step / steps_per_epoch, settings.train.epochs, 1 / steps_per_epoch)
        if settings.train.freeze_backbone_epochs and not self._is_frozen(epoch):
            scale *= settings.train.unfrozen_scale
        return settings.optimizer.peak_learning_rate * scale

    def _is_checkpoint_due(self, state: TrainState) -> bool:
        every_steps, every_seconds = (
            self.settings.train.checkpoint_every_steps,
            self.settings.train.checkpoint_every_seconds,
        )
        by_steps = every_steps > 0 and state.global_step % every_steps == 0
        return by_steps or 0 < every_seconds <= time.monotonic() - self._saved_at

    def _save(self, state: TrainState) -> None:
        totals = self._checked_totals(state)
        if state.step:
            state = dataclasses.replace(
                state, totals=dataclasses.astuple(totals), logged=dataclasses.astuple(self._logged)
            )
        arrays = self.strategy.arrays()
        for key, array in arrays["model"].items():
            if not np.isfinite(array).all():
                raise self._non_finite(f"The weight {key} became NaN or infinite", state.global_step - 1)
        checkpoint.save(self.run.checkpoints_uri, state, arrays)
        checkpoint.prune(self.run.checkpoints_uri, self.settings.train.keep_checkpoints, state.best_step)
        self._saved_at = time.monotonic()
