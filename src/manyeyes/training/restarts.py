"""What failed starts again, after a wait that doubles each time, as often as the settings allow."""

from __future__ import annotations

import time

from manyeyes.errors import TaskError, TrainingError
from manyeyes.training.events import Notice, OnEvent
from manyeyes.training.settings import StrategySettings


def wait_to_restart(
    settings: StrategySettings, number: int, cause: str, again: str, error: TaskError, notify: OnEvent, hint: str = ""
) -> None:
    """Tell of a failure and wait before the restart that comes after it.

    Args:
        number: of the restart, from 1.
        cause: what failed, in sentences.
        again: what starts again, as the beginning of a sentence.
        error: what the engine said.
        hint: what else to do where no further restart is allowed, as the end of a sentence.

    Raises:
        TrainingError: strategy.max_restarts allows no further one.
    """
    if number > settings.max_restarts:
        raise TrainingError(
            f"{cause} That was attempt {number} without a new checkpoint, and strategy.max_restarts="
            f"{settings.max_restarts} allows no further one. Mend the cause, then go on with --resume{hint}.\n"
            f"{error.remote_traceback}".rstrip()
        ) from error
    wait = settings.restart_seconds * 2 ** (number - 1)
    notify(
        Notice(
            f"{cause} {again} in {wait:.0f} s (restart {number} of {settings.max_restarts} without a new checkpoint)."
        )
    )
    time.sleep(wait)
