"""The jobs of DiLoCo: a map_reduce over the slices; of one that fails, what is left again, without lost slices."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from manyeyes.engines.base import Engine
from manyeyes.errors import TaskError, TrainingError
from manyeyes.training.diloco_files import RoundFiles
from manyeyes.training.diloco_task import LocalSteps, Measure, Reports, merge, read_result, run_item
from manyeyes.training.events import Notice, OnEvent
from manyeyes.training.restarts import wait_to_restart
from manyeyes.training.session import Job


class SliceJobs:
    """Runs tasks of slices on an engine.

    An engine ends a whole job when one task failed on every attempt. What slices had published by then stays, and only
    the others are run again.

    Args:
        engine: that runs them.
        job: as tasks get it.
        files: of the rounds.
        notify: is told of what failed.
    """

    def __init__(self, engine: Engine, job: Job, files: RoundFiles, notify: OnEvent) -> None:
        self._engine = engine
        self._settings = job.settings.strategy
        self._files = files
        self._notify = notify
        # The same function for every job, so that engines may keep the processes that have it.
        self._task = functools.partial(run_item, job, engine.name != "inline")

    def run(self, items: Sequence[LocalSteps | Measure], max_lost: int = 0) -> Reports:
        """The reports of all slices, but for at most `max_lost` whose tasks failed on every attempt.

        Raises:
            TrainingError: more failed, and strategy.max_restarts did not help.
            ManyeyesError: raised by a task on purpose, or by an engine that can't run the job.
        """
        reports: Reports = {}
        lost: list[int] = []
        num_restarts = 0
        missing = list(items)
        while missing:
            try:
                found: Reports | None = self._engine.map_reduce(self._task, merge, missing)
                reports |= found or {}
            except TaskError as error:
                failed = None if error.index is None else missing[error.index].slice
                reports |= self._published(missing)
                if failed is not None and failed not in reports and len(lost) < max_lost:
                    lost.append(failed)
                    self._notify(
                        Notice(
                            f"Slice {failed} failed on every attempt, so the average of this round is over the others "
                            f"(lost {len(lost)} of at most {max_lost}). {error.message}"
                        )
                    )
                else:
                    num_restarts += 1
                    wait_to_restart(
                        self._settings,
                        num_restarts,
                        error.message if failed is None else f"Slice {failed} failed: {error.message}",
                        "What is missing of the round starts again",
                        error,
                        self._notify,
                        "; or let rounds do without slices that fail, by strategy.max_lost_workers",
                    )
            missing = [item for item in items if item.slice not in reports and item.slice not in lost]
        if not reports:
            raise TrainingError("All slices of a round failed, so there is nothing to average; the notices say why.")
        return reports

    def _published(self, items: Sequence[LocalSteps | Measure]) -> Reports:
        """Of a job that failed: the reports of the slices that had come to the end of their steps."""
        reports = {}
        for item in items:
            if isinstance(item, LocalSteps):
                result = read_result(self._files.result(item.global_step, item.slice), item)
                if result is not None:
                    reports[item.slice] = result[0]
        return reports
