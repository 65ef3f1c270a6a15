"""Metrics in MLflow, in a database of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("mlflow")

from mlflow import MlflowClient

from manyeyes.errors import UsageError
from manyeyes.training.events import EpochEnd, Event
from manyeyes.training.settings import TrainSettings
from manyeyes.training.trainer import train

TINY = ("model.options={width=4, stages=2, convolutions=1}", "train.epochs=2", "train.global_batch_size=16")


class StopNowError(Exception):
    """Raised by a watcher, as if the process had died."""


def test_a_run_and_its_resumption_are_one_run_of_mlflow(small_dataset: str, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    settings = TrainSettings.load(None, [*TINY, f"train.mlflow={uri}", "train.log_every_steps=3"])

    def stop_after_first(event: Event) -> None:
        if isinstance(event, EpochEnd):
            raise StopNowError

    with pytest.raises(StopNowError):
        train(small_dataset, str(tmp_path / "run"), settings, on_event=stop_after_first)
    result = train(small_dataset, str(tmp_path / "run"), resume=True)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("manyeyes")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.global_batch_size"] == "16"
    assert run.data.metrics["epoch/val_loss"] == pytest.approx(result.val_loss)
    history = client.get_metric_history(run.info.run_id, "epoch/loss")
    assert [metric.step for metric in history] == [6, 12]


def test_a_tracking_uri_that_can_not_be_used_is_said_in_one_line(small_dataset: str, tmp_path: Path) -> None:
    settings = TrainSettings.load(None, [*TINY, f"train.mlflow=file://{tmp_path}/mlruns"])
    with pytest.raises(UsageError, match=r"train\.mlflow=file:.* can't be used: ") as caught:
        train(small_dataset, str(tmp_path / "run"), settings)
    assert "\n" not in str(caught.value)
