"""Training on several workers that take every step together: what they reach, and what kills them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyeyes.engines.registry import create_engine
from manyeyes.errors import TrainingError, UsageError
from manyeyes.training import checkpoint, scaling
from manyeyes.training.clock import speeds_of
from manyeyes.training.events import Event, Notice, Progress, Started
from manyeyes.training.run import Run
from manyeyes.training.scaling import Measured, verify_scaling
from manyeyes.training.settings import OptimizerSettings, TrainSettings
from manyeyes.training.trainer import train

COMMAND = (sys.executable, "-m", "manyeyes.cli.main")
TINY = (
    "model.options={width=4, stages=2, convolutions=1}",
    "model.dropout=0.2",
    "train.epochs=2",
    "train.global_batch_size=16",
    "train.precision=float32",
    "train.tensorboard=false",
    "train.log_every_steps=5",
    "optimizer.name=sgd",
    "optimizer.learning_rate=0.02",
    "augment.shift=0.1",
    "mix.mixup=0.3",
)


# Long enough that something can happen to it.
LIKE_ALONE = ("strategy.virtual_workers=2", "train.epochs=10")


def settings(*assignments: str) -> TrainSettings:
    return TrainSettings.load(None, [*TINY, *assignments])


def files_of_last_checkpoint(out: Path) -> dict[str, bytes]:
    last = out / "checkpoints" / checkpoint.names(str(out / "checkpoints"))[-1]
    return {path.name: path.read_bytes() for path in last.iterdir() if path.name != "state.json"}


def lines_of(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def train_alone(dataset: str, out: Path, *assignments: str, resume: bool = False) -> dict[str, Any]:
    """One worker in a process of its own: in this one TensorFlow may have run with another number of threads."""
    arguments = ["--resume"] if resume else [arg for one in (*TINY, *assignments) for arg in ("--set", one)]
    done = subprocess.run(
        [*COMMAND, "train", dataset, "--out", str(out), "--workers", "1", "--json", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def alone(small_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One worker, with two virtual ones."""
    out = tmp_path_factory.mktemp("alone") / "run"
    return out, train_alone(small_dataset, out, *LIKE_ALONE)


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_examples_gradients_and_weights() -> None:
    done = subprocess.run(
        [*COMMAND, "verify-scaling", "--workers", "1,2,4", "--json"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["holds"]
    assert [check["allowed"] for check in report["checks"]] == [0.0, 1e-5, 1e-9, 0.0, 0.0]
    # In float64 and float32 the sums of 1 and 2 workers are not the same bits: something was really compared.
    assert all(0 < check["found"] <= check["allowed"] for check in report["checks"][1:3])


@pytest.mark.parametrize("field", ["digests", "gradient", "weights", "exact_weights"])
def test_verify_scaling_fails_where_workers_differ(field: str, small_dataset: str) -> None:
    true = Measured([(0, 1, "a")], np.ones(3, np.float32), np.ones(3), b"\0\0\x80\x3f", {}, 1.0, 1.0)
    other = {
        "digests": [(0, 1, "a"), (0, 1, "a")],
        "gradient": np.array([1, 1, 1.001], np.float32),
        "weights": np.array([1, 1, 1 + 1e-7]),
        "exact_weights": b"\x01\0\x80\x3f",
    }

    class Engine:
        name, num_workers = "scripted", 2

        def gang(self, fn: Callable[..., Any], world_size: int) -> list[Measured | None]:
            wrong = world_size == 2
            return [dataclasses.replace(true, **({field: other[field]} if wrong else {})), *[None] * (world_size - 1)]

    report = verify_scaling(Engine(), (1, 2), small_dataset)  # type: ignore[arg-type]
    assert not report.holds
    assert sum(not check.holds for check in report.checks) == 1
    with pytest.raises(UsageError, match="leaves nothing to compare"):
        verify_scaling(Engine(), (2,), small_dataset)  # type: ignore[arg-type]


@pytest.mark.slow
def test_two_workers_reach_the_bytes_of_one_and_tell_the_same(
    alone: tuple[Path, dict[str, Any]], small_dataset: str, tmp_path: Path
) -> None:
    out, expected = alone
    events: list[Event] = []
    result = train(
        small_dataset, str(tmp_path / "run"), settings(*LIKE_ALONE), num_workers=2,
        on_event=events.append,
    )  # fmt: skip
    assert files_of_last_checkpoint(tmp_path / "run") == files_of_last_checkpoint(out)
    assert (result.val_accuracy, result.global_step) == (expected["val_accuracy"], expected["global_step"])
    # The val split is shared out, and each of its 45 examples counts once.
    for line, expected_line in zip(lines_of(tmp_path / "run", "epoch"), lines_of(out, "epoch"), strict=True):
        assert line["val_accuracy"] == expected_line["val_accuracy"]
        assert line["val_loss"] == pytest.approx(expected_line["val_loss"], rel=1e-12)
    assert [event.world_size for event in events if isinstance(event, Started)] == [2]
    assert any(isinstance(event, Progress) for event in events)


@pytest.mark.slow
def test_workers_tell_how_fast_they_are_and_what_they_wait_for(small_dataset: str, tmp_path: Path) -> None:
    events: list[Event] = []
    assignments = settings("train.epochs=12", "train.log_every_steps=10", "train.global_batch_size=8")
    train(small_dataset, str(tmp_path / "run"), assignments, num_workers=2, on_event=events.append)
    (*_, line) = [line for line in lines_of(tmp_path / "run", "step") if line.get("workers")]
    assert [worker["rank"] for worker in line["workers"]] == [0, 1]
    for worker in line["workers"]:
        shares = [worker[f"{name}_share"] for name in ("compute", "communication", "input_wait")]
        assert sum(shares) == pytest.approx(1, abs=0.01)
        assert worker["images_per_second"] > 0
        assert worker["communication_share"] > 0
    shown = [event for event in events if isinstance(event, Progress) and event.workers]
    assert shown
    assert [worker.rank for worker in shown[-1].workers] == [0, 1]


@pytest.mark.slow
def test_two_workers_learn_what_one_does_where_the_last_batch_is_too_small_for_both(tmp_path: Path) -> None:
    dataset = scaling._generate(str(tmp_path))
    made = [*TINY, "model.dropout=0", "train.epochs=1", "train.global_batch_size=32", "optimizer.clip_norm=0.5"]
    made += ["optimizer.ema=0.9", "mix.mixup=0"]
    for workers in (1, 2):
        train(dataset, str(tmp_path / str(workers)), TrainSettings.load(None, made), num_workers=workers)
    one, two = (Run.open(str(tmp_path / str(workers))).checkpoint("last").arrays for workers in (1, 2))
    assert (one["ema"].keys(), len(one["ema"])) == (two["ema"].keys(), len(two["ema"]))
    for part in ("model", "ema", "optimizer"):
        for key, array in one[part].items():
            np.testing.assert_allclose(two[part][key], array, rtol=1e-3, atol=1e-4, err_msg=key)
    (line,), (expected,) = (lines_of(tmp_path / str(workers), "epoch") for workers in (2, 1))
    assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)


def test_the_worker_that_the_others_wait_for_is_the_straggler() -> None:
    # (seconds of steps, waiting for input, exchanges with the wait for others, own images)
    speeds = speeds_of([(10.0, 0.0, 6.0, 500.0), (10.0, 0.0, 0.5, 500.0), (10.0, 1.0, 5.5, 500.0)])
    assert [speed.is_straggler for speed in speeds] == [False, True, False]
    assert [speed.images_per_second for speed in speeds] == [50, 50, 50]
    assert speeds[0].communication_share == pytest.approx(0.6)
    assert speeds_of([(10.0, 0.0, 6.0, 500.0)]) == ()


def test_xla_is_refused_where_workers_exchange_inside_of_a_step(small_dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"train\.xla=true can't compile exchanges"):
        train(small_dataset, str(tmp_path / "run"), settings("train.xla=true"), num_workers=2)


def test_accumulated_parts_learn_what_the_whole_batch_does(small_dataset: str, tmp_path: Path) -> None:
    # A model without batch normalisation, whose moments are those of a part.
    plain = ("model.name=gru", "model.options={}", "model.dropout=0", "train.epochs=1")
    for name, more in (("whole", ()), ("parts", ("strategy.accumulate_steps=4",))):
        train(small_dataset, str(tmp_path / name), settings(*plain, *more))
    whole, parts = (Run.open(str(tmp_path / name)).checkpoint("last").arrays["model"] for name in ("whole", "parts"))
    for key, array in whole.items():
        np.testing.assert_allclose(parts[key], array, rtol=1e-4, atol=1e-6)


def test_learning_rate_follows_the_batch_size_by_its_rule() -> None:
    rate = 0.1
    for rule, expected in (("none", 0.1), ("linear", 0.4), ("sqrt", 0.2)):
        made = OptimizerSettings(learning_rate=rate, learning_rate_rule=rule)  # type: ignore[arg-type]
        assert made.peak_learning_rate(256) == pytest.approx(expected)


def test_more_workers_than_parts_and_uneven_parts_are_refused(small_dataset: str, tmp_path: Path) -> None:
    for assignments, workers, message in (
        (["strategy.virtual_workers=2"], 3, "gives 3 workers too little"),
        (["train.global_batch_size=15"], 2, "is not divisible by the 2 parts"),
    ):
        with pytest.raises(UsageError, match=message):
            train(small_dataset, str(tmp_path / "run"), settings(*assignments), num_workers=workers)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.slow
def test_a_worker_that_hangs_is_noticed_and_the_run_goes_on(
    alone: tuple[Path, dict[str, Any]], small_dataset: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    events: list[Event] = []
    hung: list[int] = []

    def stop_worker_1(event: Event) -> None:
        events.append(event)
        if isinstance(event, Progress) and not hung:
            hung.extend(gang_processes(os.getpid())[1:])
            os.kill(hung[0], signal.SIGSTOP)

    made = settings(*LIKE_ALONE, "strategy.step_timeout_seconds=20")
    train(small_dataset, str(out), made, num_workers=2, on_event=stop_worker_1)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert any("a worker hangs. Worker 1 gave no sign of life for" in text for text in told), told
    assert files_of_last_checkpoint(out) == files_of_last_checkpoint(alone[0])
    assert not Path(f"/proc/{hung[0]}").exists()


@pytest.mark.slow
def test_workers_that_always_die_end_the_run_with_the_cause(small_dataset: str, tmp_path: Path) -> None:
    def kill_one(event: Event) -> None:
        if isinstance(event, Started):
            os.kill(gang_processes(os.getpid())[0], signal.SIGKILL)

    made = settings("strategy.max_restarts=1", "strategy.restart_seconds=0.1", "train.epochs=50")
    with pytest.raises(TrainingError, match=r"killed by SIGKILL.*strategy\.max_restarts=1 allows no further"):
        train(small_dataset, str(tmp_path / "run"), made, num_workers=2, on_event=kill_one)


def gang_processes(driver: int) -> list[int]:
    """The worker processes of a driver's gang, by rank."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            # Spawned workers are told apart from the resource tracker by what they run.
            if parent == driver and b"spawn_main" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return sorted(found)


NUM_KILLS = 20


@pytest.mark.slow
def test_a_run_killed_at_20_random_points_reaches_the_bytes_of_an_uninterrupted_one(
    small_dataset: str, tmp_path: Path
) -> None:
    """One worker, all or the driver are killed; the driver starts workers again, --resume starts a driver again."""
    draw = random.Random(20)
    long = ("train.epochs=60", "train.checkpoint_every_steps=5", "strategy.max_restarts=5")
    long += ("strategy.restart_seconds=0.1", "strategy.virtual_workers=2", "train.keep_checkpoints=5")
    whole, out = tmp_path / "whole", tmp_path / "killed"
    train_alone(small_dataset, whole, *long)
    num_steps = 60 * 6

    def start(resume: bool) -> subprocess.Popen[str]:
        arguments = [arg for one in (*TINY, *long) for arg in ("--set", one)] if not resume else ["--resume"]
        # An uneven number of workers of a resumed run is part of the test.
        workers = 2 if not resume else draw.choice([1, 1, 1, 2])
        return subprocess.Popen(
            [*COMMAND, "train", small_dataset, "--out", str(out), "--workers", str(workers), *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )

    def newest() -> int:
        names = checkpoint.names(str(out / "checkpoints"))
        return checkpoint.step_of_name(names[-1]) if names else 0

    driver = start(resume=False)
    for kill in range(NUM_KILLS):
        # Spread over the run, so that the last kill is near its end; a little later than the checkpoint, at random.
        target = num_steps * (kill + draw.random()) / (NUM_KILLS + 2)
        deadline = time.monotonic() + 120
        while newest() < target and driver.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        assert driver.poll() is None, (kill, driver.communicate()[1][-2000:])
        time.sleep(draw.random() * 0.1)
        workers = gang_processes(driver.pid)
        victim = draw.choice(["driver", "driver", "one", "all"]) if workers else "driver"
        for process in {"driver": [driver.pid], "one": workers[:1] or workers, "all": workers}[victim]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        if victim == "driver":
            driver.communicate()
            driver = start(resume=True)
    _, errors = driver.communicate(timeout=300)
    assert driver.returncode == 0, errors[-2000:]
    assert files_of_last_checkpoint(out) == files_of_last_checkpoint(whole)
    # Every line of the metrics stands once, as if nothing had happened.
    assert [line["global_step"] for line in lines_of(out, "epoch")] == list(range(6, num_steps + 1, 6))


@pytest.mark.slow
def test_ctrl_c_stops_all_workers_with_a_checkpoint_that_one_worker_goes_on_from(
    alone: tuple[Path, dict[str, Any]], small_dataset: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    arguments = [arg for one in (*TINY, *LIKE_ALONE) for arg in ("--set", one)]
    driver = subprocess.Popen(
        [*COMMAND, "train", small_dataset, "--out", str(out), "--workers", "2", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / "config.json").exists():
        assert driver.poll() is None, driver.communicate()[1]
        time.sleep(0.01)
    os.killpg(driver.pid, signal.SIGINT)
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 130, errors
    assert "Go on with: manyeyes train" in errors
    assert 0 < checkpoint.step_of_name(checkpoint.names(str(out / "checkpoints"))[-1]) < 60
    train_alone(small_dataset, out, resume=True)
    assert files_of_last_checkpoint(out) == files_of_last_checkpoint(alone[0])


@pytest.mark.slow
def test_spark_workers_reach_the_bytes_of_local_ones_and_survive_a_kill(
    alone: tuple[Path, dict[str, Any]], small_dataset: str, spark_cluster: Any, tmp_path: Path
) -> None:
    out, killed, told = tmp_path / "run", [], []

    def kill_one(event: Event) -> None:
        if isinstance(event, Notice):
            told.append(event.text)
        if isinstance(event, Progress) and not killed:
            killed.append(spark_ranks()[0])
            os.kill(killed[0], signal.SIGKILL)

    engine = create_engine("spark", 2, {"master": spark_cluster.master, "executor_memory": "512m"})
    made = settings(*LIKE_ALONE, "strategy.restart_seconds=0.1")
    train(small_dataset, str(out), made, engine=engine, num_workers=2, on_event=kill_one)
    assert killed
    assert any("died (killed by SIGKILL" in text and "restart 1 of" in text for text in told), told
    assert files_of_last_checkpoint(out) == files_of_last_checkpoint(alone[0])


def spark_ranks() -> list[int]:
    """The processes of a gang's ranks on this machine's executors."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
            is_rank = b"spawn_main" in (path / "cmdline").read_bytes()
            if is_rank and b"pyspark" in Path(f"/proc/{parent}/cmdline").read_bytes():
                found.append(int(path.name))
    return sorted(found)


def test_a_gang_is_refused_where_the_engine_has_none(small_dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="inline engine runs one worker, not 2"):
        train(small_dataset, str(tmp_path / "run"), settings(), engine=create_engine("inline"), num_workers=2)
