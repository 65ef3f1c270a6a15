"""Folds on clusters, with everything on HDFS."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from manyeyes import storage
from manyeyes.evaluation.crossval import load_crossval

pytestmark = pytest.mark.slow

RECIPE = (
    "model.options={width=4, stages=2, convolutions=1}",
    "train.epochs=1",
    "train.tensorboard=false",
    "optimizer.learning_rate=0.02",
)
# A process of its own, as one Spark session is all that a process has.
DRIVER = """
import json, os, signal, sys
from manyeyes.engines.registry import create_engine
from manyeyes.evaluation.crossval import crossval
from manyeyes.evaluation.folds import FoldSettings
from manyeyes.training.settings import TrainSettings

dataset, out, recipe, dies, name, settings = json.loads(sys.argv[1])

def watch(num_done, num_all, last):
    if dies and num_done == 1:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    engine = create_engine(name, 2, settings)
    folds = FoldSettings(folds=2, val=0)
    crossval(dataset, out, TrainSettings.load(None, recipe), folds, engine=engine, on_fold=watch)
"""


def drive(*request: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(request)], capture_output=True, text=True, timeout=300, check=False
    )


def test_a_cross_validation_that_dies_on_spark_goes_on_on_hadoop_with_the_fold_that_is_left(
    small_dataset, spark_cluster, hadoop, monkeypatch
):
    for name, value in hadoop.environment.items():
        monkeypatch.setenv(name, value)
    out = f"{hadoop.hdfs}/crossval-{os.getpid()}"
    passed = {"pass_environment": ["HADOOP_CONF_DIR"]}
    died = drive(small_dataset, out, RECIPE, True, "spark", {"master": spark_cluster.master, **passed})
    assert died.returncode == -signal.SIGKILL, died.stderr
    folds = [f"{out}/folds/repeat-0-fold-{fold}/fold.json" for fold in range(2)]
    before = {fold: storage.read_json(uri) for fold, uri in enumerate(folds) if storage.exists(uri)}
    assert before

    ended = drive(small_dataset, out, RECIPE, False, "hadoop", passed)
    assert ended.returncode == 0, ended.stderr
    result = load_crossval(out)
    for fold, found in before.items():
        assert result.folds[fold].seconds == found["seconds"]  # it was not done again
    assert result.pooled.num_examples == sum(fold.num_held_out for fold in result.folds) == 141
