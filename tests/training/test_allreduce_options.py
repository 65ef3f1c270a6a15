"""Options of training that several workers have to agree on, and a run directory that lies on a server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.training import checkpoint
from manyeyes.training.building import build_replica
from manyeyes.training.checkpoint import TrainState
from manyeyes.training.run import Run, describe_run
from manyeyes.training.settings import TrainSettings
from manyeyes.training.trainer import train

pytestmark = pytest.mark.slow

COMMAND = (sys.executable, "-m", "manyeyes.cli.main")
TINY = (
    "model.options={width=4, stages=2, convolutions=1}",
    "train.global_batch_size=16",
    "train.tensorboard=false",
    "optimizer.name=sgd",
    "optimizer.learning_rate=0.02",
)
# The backbone is frozen for two epochs of four, of six steps each.
FROZEN = (
    *TINY,
    "model.dropout=0.2",
    "train.epochs=4",
    "train.precision=float32",
    "train.freeze_backbone_epochs=2",
    "train.checkpoint_every_steps=3",
    "train.keep_checkpoints=9",
    "strategy.virtual_workers=2",
)


def train_command(dataset: str, out: str, num_workers: int, *, resume: bool = False) -> list[str]:
    arguments = ["--resume"] if resume else [arg for one in FROZEN for arg in ("--set", one)]
    return [*COMMAND, "train", dataset, "--out", out, "--workers", str(num_workers), *arguments]


def files_of_last_checkpoint(out: str) -> dict[str, bytes]:
    directory = storage.join(out, checkpoint.CHECKPOINTS)
    last = storage.join(directory, checkpoint.names(directory)[-1])
    return {name: storage.read_bytes(storage.join(last, name)) for name in storage.list_files(last)}


@pytest.fixture(scope="module")
def frozen_alone(small_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One worker, with two virtual ones, in a process of its own, as TensorFlow's threads are fixed once."""
    out = str(tmp_path_factory.mktemp("alone") / "run")
    done = subprocess.run(train_command(small_dataset, out, 1), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_a_backbone_is_frozen_and_freed_on_two_workers_as_on_one(
    frozen_alone: str, small_dataset: str, tmp_path: Path
) -> None:
    out = str(tmp_path / "run")
    train(small_dataset, out, TrainSettings.load(None, FROZEN), num_workers=2)
    assert files_of_last_checkpoint(out) == files_of_last_checkpoint(frozen_alone)
    directory = Run.open(out).checkpoints_uri
    frozen, free = (checkpoint.load(directory, f"step-{step:08d}").arrays["model"] for step in (12, 24))
    start = checkpoint.load(directory, "step-00000003").arrays["model"]
    kernel = "stage1_0_conv/kernel"
    np.testing.assert_array_equal(frozen[kernel], start[kernel])
    assert not np.array_equal(free[kernel], start[kernel])


def test_a_run_of_two_workers_on_s3_that_is_killed_goes_on_to_the_bytes_of_one(
    frozen_alone: str, small_dataset: str, s3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    out = f"{s3.bucket_uri}/allreduce-{os.getpid()}"
    directory = storage.join(out, checkpoint.CHECKPOINTS)
    driver = subprocess.Popen(train_command(small_dataset, out, 2), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not checkpoint.names(directory) and driver.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    driver.kill()
    _, errors = driver.communicate()
    assert driver.returncode == -signal.SIGKILL, errors
    reached = checkpoint.step_of_name(checkpoint.names(directory)[-1])
    assert 0 < reached < 24

    resumed = [*train_command(small_dataset, out, 2, resume=True), "--json"]
    done = subprocess.run(resumed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["global_step"] == 24
    assert files_of_last_checkpoint(out) == files_of_last_checkpoint(frozen_alone)
    metrics = [json.loads(line) for line in storage.read_bytes(storage.join(out, "metrics.jsonl")).splitlines()]
    assert [line["global_step"] for line in metrics if line["kind"] == "epoch"] == list(range(6, 25, 6))


def test_float16_on_two_workers_is_float16_on_one_but_for_rounding(small_dataset: str, tmp_path: Path) -> None:
    made = TrainSettings.load(None, [*TINY, "train.epochs=2", "train.precision=float16"])
    for workers in (1, 2):
        train(small_dataset, str(tmp_path / str(workers)), made, num_workers=workers)
    one, two = (Run.open(str(tmp_path / str(workers))).checkpoint("last").arrays["model"] for workers in (1, 2))
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-3, atol=2e-3, err_msg=name)


def test_steps_that_overflow_float16_are_skipped_by_two_workers_as_by_one(small_dataset: str, tmp_path: Path) -> None:
    """Both begin with a loss scale that is far too high, which is halved until gradients are finite."""
    data = Dataset(small_dataset)
    assignments = [*TINY, "train.epochs=3", "train.precision=float16", "strategy.virtual_workers=2"]
    made = TrainSettings.load(None, assignments).for_split(96, num_parts=2)
    run = describe_run(data, str(tmp_path / "1"), made)
    run.save()
    arrays = build_replica(run, made, data).arrays()
    optimizer = dict(arrays["optimizer"])
    (key,) = [key for key in optimizer if key.endswith("dynamic_scale")]
    too_high = np.float32(2**22)
    start = TrainState(0, 0, 0, made.train.seed, run.settings_fingerprint, run.dataset_fingerprint)
    checkpoint.save(run.checkpoints_uri, start, {**arrays, "optimizer": {**optimizer, key: np.array(too_high)}})
    shutil.copytree(tmp_path / "1", tmp_path / "2")

    alone = train_command(small_dataset, str(tmp_path / "1"), 1, resume=True)
    done = subprocess.run(alone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    train(small_dataset, str(tmp_path / "2"), resume=True, num_workers=2)
    assert files_of_last_checkpoint(str(tmp_path / "2")) == files_of_last_checkpoint(str(tmp_path / "1"))
    reached = Run.open(str(tmp_path / "2")).checkpoint("last").arrays
    assert too_high / 2**12 < reached["optimizer"][key] < too_high  # of 18 steps some overflowed, and some did not
    kernel = "logits/kernel"
    assert np.abs(reached["model"][kernel] - arrays["model"][kernel]).max() > 0.01
