"""Rounds on clusters, with the run on HDFS."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from manyeyes import storage
from manyeyes.training import checkpoint

pytestmark = pytest.mark.slow

SETTINGS = (
    "model.options={width=4, stages=2, convolutions=1}",
    "model.dropout=0.2",
    "train.epochs=2",
    "train.global_batch_size=10",
    "train.precision=float32",
    "train.tensorboard=false",
    "optimizer.learning_rate=0.02",
    "strategy.name=diloco",
    "strategy.virtual_workers=2",
    "strategy.local_steps=10",
)
# A process of its own, as one Spark session is all that a process has.
DRIVER = """
import json, os, signal, sys
from manyeyes.engines.registry import create_engine
from manyeyes.training.events import Saved
from manyeyes.training.settings import TrainSettings
from manyeyes.training.trainer import train

dataset, out, assignments, dies, name, settings = json.loads(sys.argv[1])

def watch(event):
    if dies and isinstance(event, Saved):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    chosen = TrainSettings.load(None, assignments) if assignments else None
    engine = create_engine(name, 2, settings)
    train(dataset, out, chosen, resume=chosen is None, engine=engine, num_workers=2, on_event=watch)
"""


def drive(*request: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(request)], capture_output=True, text=True, timeout=500, check=False
    )


def files_of_last_checkpoint(out: str) -> dict[str, bytes]:
    directory = storage.join(out, checkpoint.CHECKPOINTS)
    last = storage.join(directory, checkpoint.names(directory)[-1])
    return {name: storage.read_bytes(storage.join(last, name)) for name in storage.list_files(last)}


def test_a_run_that_dies_on_spark_goes_on_on_hadoop_to_the_bytes_of_one_process(
    small_dataset, spark_cluster, hadoop, tmp_path, monkeypatch
):
    for name, value in hadoop.environment.items():
        monkeypatch.setenv(name, value)
    whole, parts = str(tmp_path / "run"), f"{hadoop.hdfs}/diloco-{os.getpid()}"
    alone = drive(small_dataset, whole, SETTINGS, False, "inline", {})
    assert alone.returncode == 0, alone.stderr

    passed = {"pass_environment": ["HADOOP_CONF_DIR"]}
    died = drive(small_dataset, parts, SETTINGS, True, "spark", {"master": spark_cluster.master, **passed})
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert checkpoint.names(storage.join(parts, "checkpoints")) == ["step-00000010"]
    ended = drive(small_dataset, parts, None, False, "hadoop", passed)
    assert ended.returncode == 0, ended.stderr

    assert files_of_last_checkpoint(parts) == files_of_last_checkpoint(whole)
