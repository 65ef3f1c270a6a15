"""A run's metrics in MLflow, beside metrics.jsonl."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time

from manyeyes import storage
from manyeyes.config import flatten
from manyeyes.errors import MissingExtraError, UsageError
from manyeyes.training.run import Run

EXPERIMENT = "manyeyes"
# Marks the MLflow run of a run directory, so that a resumed run goes on in it.
_MARK_TAG = "manyeyes.run"
_MAX_PARAM_LENGTH = 500
_MAX_PARAMS = 100
_log = logging.getLogger("manyeyes.training")


class MlflowTracker:
    """Logs to one MLflow run, which a resumed run finds again.

    Args:
        run: whose settings become the parameters.
        tracking_uri: of MLflow: a server, or a database as MLflow writes it.
        resumed: whether the run has steps behind it, and so an MLflow run of its own.

    Raises:
        MissingExtraError: MLflow is not installed.
        UsageError: the tracking URI can't be used.
    """

    def __init__(self, run: Run, tracking_uri: str, resumed: bool) -> None:
        self._is_away = False
        # A server that is away must not hold up a training for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Param
            from mlflow.exceptions import MlflowException
        except ModuleNotFoundError:
            raise MissingExtraError("Logging to MLflow", "mlflow") from None
        self._failure = MlflowException
        # A hash, as a path may have characters that a search can't quote.
        mark = hashlib.sha256(storage.absolute(run.uri).encode()).hexdigest()[:16]
        try:
            self._client = MlflowClient(tracking_uri)
            found = self._client.get_experiment_by_name(EXPERIMENT)
            experiment_id = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
            search = f"tags.`{_MARK_TAG}` = '{mark}'"
            runs = self._client.search_runs([experiment_id], search, max_results=1) if resumed else []
            if runs:
                self._run_id = runs[0].info.run_id
                self._client.update_run(self._run_id, status="RUNNING")
                return
            name = run.uri.rstrip("/").rpartition("/")[2]
            self._run_id = self._client.create_run(experiment_id, tags={_MARK_TAG: mark}, run_name=name).info.run_id
            params = [Param(key, str(value)[:_MAX_PARAM_LENGTH]) for key, value in flatten(run.settings).items()]
            for start in range(0, len(params), _MAX_PARAMS):
                self._client.log_batch(self._run_id, params=params[start : start + _MAX_PARAMS])
        except (MlflowException, OSError) as error:
            raise UsageError(
                f"train.mlflow={tracking_uri} can't be used: {error}. Is the tracking URI right?"
            ) from error

    def log(self, scalars: dict[str, float], global_step: int) -> None:
        """Add values of metrics. A server that is away is told once, and the training goes on without it."""
        from mlflow.entities import Metric

        if self._is_away:
            return
        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, global_step) for name, value in scalars.items()]
        try:
            self._client.log_batch(self._run_id, metrics=metrics)
        except (self._failure, OSError) as error:
            self._is_away = True
            _log.warning("MLflow takes no more metrics: %s. They go on in metrics.jsonl.", error)

    def close(self, *, is_finished: bool) -> None:
        """Say that the session is over, and whether the run is."""
        if not self._is_away:
            with contextlib.suppress(self._failure, OSError):
                self._client.set_terminated(self._run_id, "FINISHED" if is_finished else "KILLED")
