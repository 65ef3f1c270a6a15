"""Steps that XLA compiles, on the CPU; on a GPU: test_gpu.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from manyeyes.errors import UsageError
from manyeyes.training import backend
from manyeyes.training.settings import TrainSettings
from manyeyes.training.trainer import train

SETTINGS = (
    "model.options={width=4, stages=2, convolutions=1}",
    "train.epochs=2",
    "train.global_batch_size=16",
    "train.precision=float32",
    "train.tensorboard=false",
    "optimizer.learning_rate=0.02",
)


@pytest.mark.slow
def test_xla_changes_what_a_model_learns_by_rounding_only(small_dataset: str, tmp_path: Path) -> None:
    losses = []
    for xla in ("false", "true"):
        arguments = ["train", small_dataset, "--out", str(tmp_path / xla), "--workers", "1", "--json"]
        arguments += [part for each in (*SETTINGS, f"train.xla={xla}") for part in ("--set", each)]
        done = subprocess.run(
            [sys.executable, "-m", "manyeyes.cli.main", *arguments],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(done.stdout)["loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_xla_says_why_it_cannot_compile_a_model(small_dataset: str, tmp_path: Path) -> None:
    backend.prepare(0)  # from now on all operations of this process give the same bits again
    settings = TrainSettings.load(None, [*SETTINGS, "train.xla=true"])
    with pytest.raises(
        UsageError, match=r"can't compile cnn: .*MaxPool.*\. Train in a process that has trained nothing"
    ):
        train(small_dataset, str(tmp_path / "run"), settings, num_workers=1)
