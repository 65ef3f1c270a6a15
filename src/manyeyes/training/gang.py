"""The driver of a training on several workers: starts the gang, shows its reports, starts it again when it fails."""

from __future__ import annotations

import dataclasses
import functools
import time

from manyeyes.engines.base import Engine
from manyeyes.errors import TaskError, TrainingError
from manyeyes.training import checkpoint
from manyeyes.training.events import Notice, OnEvent
from manyeyes.training.interrupts import StopWish
from manyeyes.training.reporting import EXIT_HANGS, FrontDesk
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
    newest = _step_of(job.checkpoint)
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
                num_restarts = 0 if _step_of(found) > newest else num_restarts
                newest = max(newest, _step_of(found))
                if wish:
                    front_desk.finish()
                    if found is None:
                        raise
                    return _interrupted(job, found, wish)
                if num_restarts >= settings.max_restarts:
                    raise TrainingError(
                        f"{cause} That was attempt {num_restarts + 1} without a new checkpoint, and "
                        f"strategy.max_restarts={settings.max_restarts} allows no further one. Mend the cause, then go "
                        f"on with --resume.\n{error.remote_traceback}".rstrip()
                    ) from error
                wait = settings.restart_seconds * 2**num_restarts
                num_restarts += 1
                notify(
                    Notice(
                        f"{cause} All workers start again from step {max(0, _step_of(found))} in {wait:.0f} s (restart "
                        f"{num_restarts} of {settings.max_restarts} without a new checkpoint)."
                    )
                )
                _sleep(wait, wish)
                if wish and found:
                    front_desk.finish()
                    return _interrupted(job, found, wish)
                front_desk.forget()
                job = dataclasses.replace(job, checkpoint=found)


def _interrupted(job: Job, name: str, wish: StopWish) -> Outcome:
    """What a run came to whose workers were gone when it was to stop: its newest checkpoint."""
    found = checkpoint.load(job.run.checkpoints_uri, name)
    return Outcome(
        state=found.state,
        num_parameters=sum(array.size for array in found.arrays["model"].values()),
        seconds=0.0,
        images_per_second=0.0,
        input_wait_share=0.0,
        interrupted_by=wish.signal_number,
    )


def _step_of(name: str | None) -> int:
    return -1 if name is None else checkpoint.step_of_name(name)


def _cause(error: TaskError, front_desk: FrontDesk, timeout_seconds: float) -> str:
    if f"exit code {EXIT_HANGS}" not in error.message:
        return error.message
    noticed = f"No step ended within strategy.step_timeout_seconds={timeout_seconds:g}: a worker hangs."
    return f"{noticed} {front_desk.explain()}".rstrip()


def _sleep(seconds: float, wish: StopWish) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not wish:
        time.sleep(0.1)
