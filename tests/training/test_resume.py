"""`manyeyes train` in processes of its own, killed and interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from manyeyes.training import checkpoint

COMMAND = (sys.executable, "-m", "manyeyes.cli.main", "train")
SETTINGS = (
    "model.options={width=4, stages=2, convolutions=1}",
    "model.dropout=0.2",
    "mix.mixup=0.3",
    "mix.cutmix=1.0",
    "augment.rotate_degrees=10",
    "augment.flip_horizontal=0.5",
    "augment.brightness=0.2",
    "optimizer.momentum=0.9",
    "optimizer.ema=0.99",
    "train.checkpoint_every_steps=7",
    "train.log_every_steps=3",
    "train.tensorboard=false",
)
NUM_EPOCHS, STEPS_PER_EPOCH = 12, 20


def start(dataset: str, out: Path, *, resume: bool) -> subprocess.Popen[str]:
    arguments = ["--resume", "--json"]
    if not resume:
        arguments = ["--optimizer", "sgd", "--batch-size", "5", "--epochs", str(NUM_EPOCHS), "--precision", "float32"]
        arguments += ["--json", *(part for setting in SETTINGS for part in ("--set", setting))]
    return subprocess.Popen(
        [*COMMAND, dataset, "--out", str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


def newest_step(out: Path) -> int:
    return max((int(name[5:]) for name in checkpoint.names(str(out / "checkpoints"))), default=0)


def stop_when(process: subprocess.Popen[str], out: Path, step: int, number: int) -> tuple[int, str]:
    """Send a signal as soon as a checkpoint of at least `step` stands; returns the exit code and standard error."""
    while newest_step(out) < step:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.003)
    process.send_signal(number)
    _, errors = process.communicate()
    return process.returncode, errors


def files_of_last_checkpoint(out: Path) -> dict[str, bytes]:
    last = out / "checkpoints" / checkpoint.names(str(out / "checkpoints"))[-1]
    return {path.name: path.read_bytes() for path in last.iterdir()}


def metrics(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_second", "input_wait_share")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


@pytest.mark.slow
def test_a_killed_and_interrupted_run_reaches_the_bytes_of_an_uninterrupted_one(
    small_dataset: str, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = start(small_dataset, whole, resume=False)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert json.loads(output)["global_step"] == NUM_EPOCHS * STEPS_PER_EPOCH

    plan = [(35, signal.SIGKILL), (80, signal.SIGINT), (125, signal.SIGKILL), (170, signal.SIGTERM)]
    for session, (step, number) in enumerate(plan):
        exit_code, errors = stop_when(start(small_dataset, parts, resume=session > 0), parts, step, number)
        assert newest_step(parts) < NUM_EPOCHS * STEPS_PER_EPOCH
        if number == signal.SIGKILL:
            assert exit_code == -signal.SIGKILL
        else:
            assert exit_code == 128 + number
            assert f"manyeyes train {small_dataset} --out {parts} --resume" in errors
    process = start(small_dataset, parts, resume=True)
    output, errors = process.communicate()
    assert process.returncode == 0, errors

    assert json.loads(output)["epochs"] == NUM_EPOCHS
    assert files_of_last_checkpoint(parts) == files_of_last_checkpoint(whole)
    assert metrics(parts) == metrics(whole)
