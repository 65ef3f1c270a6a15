"""The driver of a training on several workers: starts the gang, shows its reports, starts it again when it fails."""

from __future__ import annotations

import contextlib
import dataclasses
import functools

from manyeyes.engines.base import Engine
from manyeyes.errors import TaskError
from manyeyes.training import checkpoint
from manyeyes.training.checkpoint import TrainState
from manyeyes.training.events import Notice, OnEvent
from manyeyes.training.interrupts import InterruptedByWishError, StopWish, interruptible
from manyeyes.training.reporting import EXIT_HANGS, FrontDesk
from manyeyes.training.restarts import wait_to_restart
from manyeyes.training.session import Job, Outcome, run_worker


def run_gang(engine: Engine, job: Job, world_size: int, notify: OnEvent, wish: StopWish) -> Outcome:
    """Train on `world_size` workers of an engine.

    When a worker dies or hangs, the engine stops the others and all start again from the newest checkpoint, as often as
    strategy.max_restarts says without a new checkpoint in between.

    Raises:
        TrainingError: it failed too often; carries what the engine said last.
        ManyeyesError: raised by a worker on purpose, or by an engine that has no gang.
    """
    settings = job.settings.strategy
    newest = -1 if job.checkpoint is None else checkpoint.step_of_name(job.checkpoint)
    num_restarts = 0

    with FrontDesk(notify, wish, getattr(engine, "driver_host", "127.0.0.1")) as front_desk:
        while True:
            try:
                sent = dataclasses.replace(job, desk=front_desk.desk)
                outcome = engine.gang(functools.partial(run_worker, sent), world_size)[0]
                front_desk.finish()
                return outcome
            except TaskError as error:
                cause = _cause(error, front_desk, settings.step_timeout_seconds)
                found = checkpoint.newest_whole(job.run.checkpoints_uri, lambda text: notify(Notice(text)))
                step = -1 if found is None else found.global_step
                num_restarts = 1 if step > newest else num_restarts + 1
                newest = max(newest, step)
                with contextlib.suppress(InterruptedByWishError), interruptible(wish):
                    again = f"All workers start again from step {max(0, step)}"
                    wait_to_restart(settings, num_restarts, cause, again, error, notify)
                if wish:
                    front_desk.finish()
                    if found is None:
                        raise
                    return _interrupted(job, found, wish)
                front_desk.forget()
                job = dataclasses.replace(job, checkpoint=None if found is None else found.name)


def _interrupted(job: Job, state: TrainState, wish: StopWish) -> Outcome:
    """What a run came to whose workers were gone when it was to stop: its newest checkpoint."""
    found = checkpoint.load(job.run.checkpoints_uri, state.name)
    return Outcome(
        state=state,
        num_parameters=sum(array.size for array in found.arrays["model"].values()),
        seconds=0.0,
        images_per_second=0.0,
        input_wait_share=0.0,
        interrupted_by=wish.signal_number,
    )


def _cause(error: TaskError, front_desk: FrontDesk, timeout_seconds: float) -> str:
    if f"exit code {EXIT_HANGS}" not in error.message:
        return error.message
    noticed = f"No step ended within strategy.step_timeout_seconds={timeout_seconds:g}: a worker hangs."
    return f"{noticed} {front_desk.explain()}".rstrip()
