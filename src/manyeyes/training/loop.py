"""The training loop: steps, metrics, validation, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from typing import Any

import numpy as np

from manyeyes.errors import NonFiniteLossError
from manyeyes.training import checkpoint
from manyeyes.training.checkpoint import TrainState
from manyeyes.training.events import EpochEnd, OnEvent, Progress, Saved
from manyeyes.training.interrupts import StopWish
from manyeyes.training.journal import Journal
from manyeyes.training.plan import Plan
from manyeyes.training.run import Run
from manyeyes.training.settings import TrainSettings
from manyeyes.training.strategy import Strategy, Totals

# How often the loss is fetched to see whether it is finite: a fetch waits for the device.
CHECK_EVERY_STEPS = 10
SECONDS_BETWEEN_PROGRESS = 0.25


class Loop:
    """Runs epochs from a state to the end, to an early stop, or to a signal.

    Attributes:
        last_train, last_val: totals of the last epoch that ended here, or None.
        interrupted_by: the number of the signal that ended it, or None.
    """

    def __init__(
        self, run: Run, settings: TrainSettings, strategy: Strategy, notify: OnEvent, wish: StopWish | None = None
    ) -> None:
        self.run = run
        self.settings = settings
        self.strategy = strategy
        self.notify = notify
        self.plan = Plan(settings, strategy.steps_per_epoch)
        self.last_train: Totals | None = None
        self.last_val: Totals | None = None
        self.interrupted_by: int | None = None
        self._wish = StopWish() if wish is None else wish

    def run_from(self, state: TrainState) -> TrainState:
        """Do what is left of the run after `state`; returns the state of the last checkpoint.

        Raises:
            NonFiniteLossError: the loss became NaN or infinite; no checkpoint is written then.
        """
        self._saved_at = time.monotonic()
        self._saved_step = state.global_step or None
        self._shown_at = -SECONDS_BETWEEN_PROGRESS
        train = self.settings.train
        self._journal = (
            Journal(self.run, state.global_step, train.tensorboard, train.mlflow) if self.strategy.is_chief else None
        )
        with contextlib.closing(self._journal) if self._journal else contextlib.nullcontext():
            is_interrupted = False
            while not state.finished and not is_interrupted:
                state, is_interrupted = self._run_epoch(state)
            if self._journal:
                self._journal.is_finished = state.finished
        if is_interrupted:
            # Where another worker got the signal, this one has none.
            self.interrupted_by = self._wish.signal_number or signal.SIGINT
        return state

    def _run_epoch(self, state: TrainState) -> tuple[TrainState, bool]:
        """Returns the state at the end, and whether a wish ended it; the last checkpoint is that of the state."""
        started = time.perf_counter()
        self.strategy.set_totals(Totals(*state.totals))
        self._logged = Totals(*state.logged)
        sent_bytes = self._logged_bytes = self.strategy.sent_bytes
        must_stop = False
        with contextlib.closing(self.strategy.steps(state.epoch, state.step, state.global_step)) as steps:
            for num_steps in steps:
                before = state
                state = dataclasses.replace(
                    state, step=state.step + num_steps, global_step=state.global_step + num_steps
                )
                must_stop = self.strategy.must_stop(bool(self._wish), state.step)
                if num_steps:
                    self._watch(state, before)
                if state.step < self.strategy.steps_per_epoch:
                    is_saved = state.global_step == self._saved_step
                    if not is_saved and (must_stop or self._is_checkpoint_due(state, before)):
                        self._save(state)
                    if must_stop:
                        return state, True
        state = self._end_epoch(state, started, sent_bytes)
        return state, not state.finished and self.strategy.must_stop(must_stop or bool(self._wish), 0)

    def _end_epoch(self, state: TrainState, started: float, sent_bytes: int | None) -> TrainState:
        train = self.last_train = self._checked_totals(state)
        learning_rate = self.plan.learning_rate(state.epoch, state.step - 1)
        self.strategy.check()
        val = self.last_val = self.strategy.evaluate()
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
        self._write(
            kind="epoch",
            epoch=epoch,
            global_step=state.global_step,
            loss=train.mean_loss,
            accuracy=train.accuracy,
            val_loss=val.mean_loss if val else None,
            val_accuracy=val.accuracy if val else None,
            learning_rate=learning_rate,
            seconds=seconds,
            **self._sent_since(sent_bytes),
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

    def _write(self, **values: Any) -> None:
        if self._journal is not None:
            self._journal.write(**values)

    def _sent_since(self, before: int | None) -> dict[str, int]:
        now = self.strategy.sent_bytes
        return {} if now is None or before is None else {"sent_bytes": now - before}

    def _watch(self, state: TrainState, before: TrainState) -> None:
        logs = _crosses(before.step, state.step, self.settings.train.log_every_steps)
        now = time.perf_counter()
        shows = now - self._shown_at >= SECONDS_BETWEEN_PROGRESS
        if not (logs or shows or _crosses(before.step, state.step, CHECK_EVERY_STEPS)):
            return
        totals = self._checked_totals(state)
        learning_rate = self.plan.learning_rate(state.epoch, state.step - 1)
        workers = self.strategy.workers
        if logs:
            recent, self._logged = totals.since(self._logged), totals
            self._write(
                kind="step",
                epoch=state.epoch + 1,
                step=state.step,
                global_step=state.global_step,
                loss=recent.mean_loss,
                accuracy=recent.accuracy,
                learning_rate=learning_rate,
                images_per_second=self.strategy.clock.images_per_second,
                input_wait_share=self.strategy.clock.input_wait_share,
                **({"workers": [dataclasses.asdict(each) for each in workers]} if workers else {}),
                **self._sent_since(self._logged_bytes),
            )
            self._logged_bytes = self.strategy.sent_bytes
        if shows:
            self._shown_at = now
            num_steps = self.settings.train.epochs * self.strategy.steps_per_epoch
            self.notify(
                Progress(
                    epoch=state.epoch + 1,
                    step=state.step,
                    global_step=state.global_step,
                    loss=totals.mean_loss,
                    accuracy=totals.accuracy,
                    learning_rate=learning_rate,
                    images_per_second=self.strategy.clock.images_per_second,
                    input_wait_share=self.strategy.clock.input_wait_share,
                    remaining_seconds=(num_steps - state.global_step) * self.strategy.clock.seconds_per_step,
                    workers=workers,
                )
            )

    def _checked_totals(self, state: TrainState) -> Totals:
        totals = self.strategy.totals()
        bad_step = self.strategy.first_bad_step()
        if bad_step is not None:
            raise self._non_finite("The loss became NaN or infinite", bad_step)
        return totals

    def _non_finite(self, what: str, global_step: int) -> NonFiniteLossError:
        epoch, step = divmod(global_step, self.strategy.steps_per_epoch)
        advice = "Try a lower optimizer.learning_rate, a longer schedule.warmup_epochs, or optimizer.clip_norm=1"
        if self.run.precision != "float32":
            advice += ", or train.precision=float32"
        return NonFiniteLossError(
            f"{what} in step {step + 1} of epoch {epoch + 1} (global step {global_step + 1}) at learning rate "
            f"{self.plan.learning_rate(epoch, step):.3g}. {advice}."
        )

    def _is_checkpoint_due(self, state: TrainState, before: TrainState) -> bool:
        every_steps, every_seconds = (
            self.settings.train.checkpoint_every_steps,
            self.settings.train.checkpoint_every_seconds,
        )
        by_steps = every_steps > 0 and _crosses(before.global_step, state.global_step, every_steps)
        return by_steps or 0 < every_seconds <= time.monotonic() - self._saved_at

    def _save(self, state: TrainState) -> None:
        totals = self._checked_totals(state)
        if state.step:
            state = dataclasses.replace(
                state, totals=dataclasses.astuple(totals), logged=dataclasses.astuple(self._logged)
            )
        if not self.strategy.is_chief:
            self._saved_at = time.monotonic()
            return  # it has the same weights
        arrays = self.strategy.arrays()
        for key, array in arrays["model"].items():
            if not np.isfinite(array).all():
                raise self._non_finite(f"The weight {key} became NaN or infinite", state.global_step - 1)
        checkpoint.save(self.run.checkpoints_uri, state, arrays)
        checkpoint.prune(self.run.checkpoints_uri, self.settings.train.keep_checkpoints, state.best_step)
        self._saved_at, self._saved_step = time.monotonic(), state.global_step
        self.notify(Saved(state.global_step))


def _crosses(before: int, after: int, every: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; a round is many steps at once."""
    return after // every > before // every
