"""A run's metrics in MLflow, beside metrics.jsonl."""

from __future__ import annotations

import time

from manyeyes import storage
from manyeyes.config import flatten
from manyeyes.errors import MissingExtraError, UsageError
from manyeyes.training.run import Run

EXPERIMENT = "manyeyes"
# Marks the MLflow run of a run directory, so that a resumed run goes on in it.
_URI_TAG = "manyeyes.run"
_MAX_PARAM_LENGTH = 500


class MlflowTracker:
    """Logs to one MLflow run, which a resumed run finds again.

    Args:
        run: whose settings become the parameters.
        tracking_uri: of MLflow: a server, or a database as MLflow writes it.

    Raises:
        MissingExtraError: MLflow is not installed.
        UsageError: the tracking URI can't be used.
    """

    def __init__(self, run: Run, tracking_uri: str) -> None:
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ModuleNotFoundError:
            raise MissingExtraError("Logging to MLflow", "mlflow") from None
        uri = storage.absolute(run.uri)
        try:
            self._client = MlflowClient(tracking_uri)
            found = self._client.get_experiment_by_name(EXPERIMENT)
            experiment_id = found.experiment_id if found else self._client.create_experiment(EXPERIMENT)
            runs = self._client.search_runs([experiment_id], f"tags.`{_URI_TAG}` = '{uri}'", max_results=1)
            if runs:
                self._run_id = runs[0].info.run_id
                self._client.update_run(self._run_id, status="RUNNING")
                return
            name = uri.rstrip("/").rpartition("/")[2]
            self._run_id = self._client.create_run(experiment_id, tags={_URI_TAG: uri}, run_name=name).info.run_id
            for key, value in flatten(run.settings).items():
                self._client.log_param(self._run_id, key, str(value)[:_MAX_PARAM_LENGTH])
        except (MlflowException, OSError) as error:
            raise UsageError(
                f"train.mlflow={tracking_uri} can't be used: {error}. Is the tracking URI right?"
            ) from error

    def log(self, scalars: dict[str, float], global_step: int) -> None:
        """Add values of metrics; what is not a number is left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now, global_step) for name, value in scalars.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Say that the session is over."""
        self._client.set_terminated(self._run_id)
