"""`manyeyes train` on the command line, in a process of its own."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from manyeyes.training.events import EpochEnd, Notice, Progress, Started
from manyeyes.training.live import live_line

TINY = ("--set", "model.options={width=4, stages=2, convolutions=1}", "--set", "train.tensorboard=false")


def run_train(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manyeyes.cli.main", "train", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_newcomer_gets_a_run_and_the_next_command(small_dataset: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = run_train(small_dataset, "--out", str(out), "--epochs", "2", "--batch-size", "16", *TINY)
    assert done.returncode == 0, done.stderr
    assert "val accuracy" in done.stdout
    assert f"Next: manyeyes evaluate {out} {small_dataset}" in done.stdout
    assert "epoch 2/2" in done.stderr
    assert json.loads((out / "config.json").read_text())["command"][:2] == ["manyeyes", "train"]

    again = run_train(small_dataset, "--out", str(out), "--resume", "--json")
    assert json.loads(again.stdout)["global_step"] == 12
    changed = run_train(small_dataset, "--out", str(out), "--resume", "--epochs", "3")
    assert changed.returncode == 2
    assert "train.epochs differ" in changed.stderr


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_train(str(tmp_path / "none"), "--out", str(tmp_path / "run"), "--set", "train.epoch=3")
    assert done.returncode == 2
    assert done.stderr == "manyeyes: error: Unknown setting train.epoch. Did you mean epochs?\n"
    assert done.stdout == ""


def test_a_terminal_shows_where_the_training_is() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, width=200, highlight=False)
    with live_line(console) as show:
        show(Started("runs/a", "cnn", 4200, "float32", 960, 10, 3, 96, 20))
        show(Progress(3, 5, 25, 0.5, 0.9, 0.01, 1234.0, 0.02, 75.0))
        show(Notice("nothing is measured"))
        show(EpochEnd(3, 3, 0.4, 0.91, 0.3, 0.95, True, 61.0))
    text = written.getvalue()
    assert (
        "cnn (4,200 parameters, float32): 3 x 960 examples, 10 steps an epoch with 96 each, going on after step 20"
        in text
    )
    assert "1,234 images/s" in text
    assert "left 1:15" in text[: text.index("1,234 images/s")]  # a narrow terminal cuts off the end
    assert "input wait 2%" in text
    assert "note: nothing is measured" in text
    assert "val accuracy 95.00% (best)  1:01" in text
