"""Rounds of local steps, averaged: what they come to, on which engine, and after which faults."""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from manyeyes.data.dataset import Dataset
from manyeyes.data.pipeline import InputPipeline
from manyeyes.engines.base import Engine
from manyeyes.engines.inline import InlineEngine
from manyeyes.engines.registry import create_engine
from manyeyes.errors import NonFiniteLossError, TrainingError
from manyeyes.training import checkpoint, weights
from manyeyes.training.building import build_replica
from manyeyes.training.diloco_files import decode, encode
from manyeyes.training.events import Event, Notice, Progress, Saved
from manyeyes.training.plan import Plan
from manyeyes.training.reporting import EXIT_HANGS
from manyeyes.training.run import Run
from manyeyes.training.settings import TrainSettings
from manyeyes.training.trainer import TrainResult, train

TINY = (
    "model.options={width=4, stages=2, convolutions=1}",
    "model.dropout=0.2",
    "train.epochs=2",
    "train.global_batch_size=10",
    "train.precision=float32",
    "train.tensorboard=false",
    "train.log_every_steps=4",
    "optimizer.learning_rate=0.02",
    "augment.shift=0.1",
    "mix.mixup=0.2",
    "strategy.name=diloco",
    "strategy.virtual_workers=2",
    "strategy.local_steps=4",
    "strategy.restart_seconds=0.01",
)
AVERAGING = ("strategy.outer_learning_rate=1", "strategy.outer_momentum=0")
PLAIN = ("optimizer.name=sgd", "optimizer.momentum=0.9", "schedule.warmup_epochs=0")


class StopNowError(Exception):
    """Raised by a watcher, as if the process had died."""


def run_tiny(dataset: str, out: Path, *assignments: str, engine: Engine | None = None, **arguments: Any) -> TrainResult:
    settings = TrainSettings.load(None, [*TINY, *assignments])
    return train(dataset, str(out), settings, engine=engine or InlineEngine(), **arguments)


def files_of_last_checkpoint(out: Path) -> dict[str, bytes]:
    last = out / "checkpoints" / checkpoint.names(str(out / "checkpoints"))[-1]
    return {path.name: path.read_bytes() for path in last.iterdir()}


def last_arrays(out: Path) -> dict[str, np.ndarray]:
    return dict(Run.open(str(out)).checkpoint("last").arrays["model"])


def lines(out: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


@pytest.fixture(scope="module")
def finished(small_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    out = tmp_path_factory.mktemp("diloco") / "run"
    return out, run_tiny(small_dataset, out)


def test_a_run_learns_and_loads_like_any_other(finished: tuple[Path, TrainResult], small_dataset: str) -> None:
    out, result = finished
    assert (result.epochs, result.global_step, result.interrupted_by) == (2, 20, None)
    assert result.val_accuracy is not None
    assert result.val_accuracy > 0.8
    model = Run.open(str(out)).load_model("best")
    (batch,) = InputPipeline(Dataset(small_dataset), "val", global_batch_size=45, shuffle=False).batches(0)
    right = model.predict(batch.images, verbose=0).argmax(axis=1) == batch.labels
    assert right.mean() == result.val_accuracy
    assert [line["global_step"] for line in lines(out, "step")] == [4, 8, 14, 18]
    assert all([worker["rank"] for worker in line["workers"]] == [0, 1] for line in lines(out, "step"))
    # Nothing is left of the rounds but what a resumed run needs.
    left = {path.relative_to(out / "rounds").as_posix() for path in (out / "rounds").rglob("*.safetensors")}
    assert left == {f"step-000000{step}/inner-{slice_}.safetensors" for step in (10, 20) for slice_ in (0, 1)}


def test_outer_learning_rate_1_without_momentum_is_local_sgd(small_dataset: str, tmp_path: Path) -> None:
    run_tiny(small_dataset, tmp_path / "run", *AVERAGING, *PLAIN, "train.epochs=1")

    run = Run.open(str(tmp_path / "run"))
    settings = TrainSettings.load(base=run.settings)
    data = Dataset(small_dataset)
    keras.utils.set_random_seed(settings.train.seed)
    replicas = [build_replica(run, settings, data) for _ in range(2)]
    replicas[1].load_arrays(replicas[0].arrays(), "the start")
    plan = Plan(settings, 10)
    pipelines = [
        InputPipeline(
            data,
            "train",
            global_batch_size=10,
            augmentation=settings.augment,
            mix=settings.mix,
            rank=rank,
            world_size=2,
        )
        for rank in range(2)
    ]
    epochs = [pipeline.batches(0) for pipeline in pipelines]
    for step in range(10):
        for rank, replica in enumerate(replicas):
            batch = next(epochs[rank])
            alone = dataclasses.replace(batch, global_size=len(batch))
            replica.step(alone, plan.learning_rate(0, step), step, rank)
        if step in (3, 7, 9):
            first, second = (weights.arrays_of(replica.model.variables) for replica in replicas)
            means = {key: (first[key] + second[key]) / 2 if "random" not in key else first[key] for key in first}
            for replica in replicas:
                weights.assign(replica.model.variables, means, "the mean")

    found = last_arrays(tmp_path / "run")
    assert found.keys() == means.keys()
    for key, mean in means.items():
        np.testing.assert_allclose(found[key], mean, atol=2e-6, err_msg=key)


def test_one_slice_with_one_local_step_is_plain_training(small_dataset: str, tmp_path: Path) -> None:
    single = (*AVERAGING, *PLAIN, "train.epochs=1", "strategy.local_steps=1", "strategy.virtual_workers=1")
    run_tiny(small_dataset, tmp_path / "rounds", *single)
    alone = ("strategy.name=allreduce", *PLAIN, "train.epochs=1", "strategy.virtual_workers=1")
    run_tiny(small_dataset, tmp_path / "steps", *alone)
    expected = last_arrays(tmp_path / "steps")
    for key, array in last_arrays(tmp_path / "rounds").items():
        np.testing.assert_allclose(array, expected[key], atol=1e-6, err_msg=key)


def test_one_shot_averaging_is_a_single_round(small_dataset: str, tmp_path: Path) -> None:
    run_tiny(small_dataset, tmp_path / "run", *AVERAGING, "train.epochs=1", "strategy.local_steps=1000")
    assert Run.open(str(tmp_path / "run")).checkpoint("last").arrays["optimizer"]["num_rounds"] == 1


class HastyEngine(InlineEngine):
    """Runs every task twice and from the last to the first, and reduces in that order."""

    def map_reduce(self, map_fn: Callable[[Any], Any], reduce_fn: Callable[[Any, Any], Any], items: Any) -> Any:
        backwards = list(items)[::-1]
        return super().map_reduce(map_fn, reduce_fn, [*backwards, *backwards])


def test_tasks_that_run_twice_and_in_another_order_change_nothing(
    finished: tuple[Path, TrainResult], small_dataset: str, tmp_path: Path
) -> None:
    run_tiny(small_dataset, tmp_path / "run", engine=HastyEngine())
    assert files_of_last_checkpoint(tmp_path / "run") == files_of_last_checkpoint(finished[0])


@pytest.mark.slow
def test_one_process_that_is_killed_in_a_round_makes_the_bytes_of_two(small_dataset: str, tmp_path: Path) -> None:
    run_tiny(small_dataset, tmp_path / "two", engine=create_engine("local", 2), num_workers=2)
    assert multiprocessing.active_children() == []
    killed = []

    def watch(event: Event) -> None:
        if isinstance(event, Progress) and not killed:
            killed.append(multiprocessing.active_children()[0].pid)
            # In a while, so that the next round runs.
            threading.Timer(0.02, os.kill, (killed[0], signal.SIGKILL)).start()

    run_tiny(small_dataset, tmp_path / "one", engine=create_engine("local", 1), num_workers=1, on_event=watch)
    assert killed
    assert files_of_last_checkpoint(tmp_path / "one") == files_of_last_checkpoint(tmp_path / "two")


class MortalEngine(InlineEngine):
    """Dies with the driver when a round is to start after `step`."""

    def __init__(self, step: int) -> None:
        self._step = step

    def map_reduce(self, map_fn: Callable[[Any], Any], reduce_fn: Callable[[Any, Any], Any], items: Any) -> Any:
        if getattr(items[0], "global_step", None) == self._step:
            raise StopNowError
        return super().map_reduce(map_fn, reduce_fn, items)


@pytest.mark.parametrize(
    "settings",
    [
        ("optimizer.ema=0.9", "train.freeze_backbone_epochs=1"),
        ("strategy.keep_inner_state=false", "strategy.wire=bfloat16"),
    ],
)
def test_a_run_that_died_rounds_after_a_checkpoint_resumes_to_the_same_bytes(
    small_dataset: str, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    often = (*settings, "train.checkpoint_every_steps=7", "strategy.local_steps=2")
    run_tiny(small_dataset, tmp_path / "whole", *often)
    with pytest.raises(StopNowError):
        run_tiny(small_dataset, tmp_path / "parts", *often, engine=MortalEngine(18))
    assert checkpoint.names(str(tmp_path / "parts/checkpoints"))[-1] == "step-00000014"
    train(small_dataset, str(tmp_path / "parts"), resume=True, engine=HastyEngine(), num_workers=4)
    assert files_of_last_checkpoint(tmp_path / "parts") == files_of_last_checkpoint(tmp_path / "whole")


def test_an_inner_state_that_is_gone_is_told_on_resume(
    finished: tuple[Path, TrainResult], small_dataset: str, tmp_path: Path
) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Saved):
            raise StopNowError

    with pytest.raises(StopNowError):
        run_tiny(small_dataset, tmp_path / "run", on_event=stop)
    (tmp_path / "run/rounds/step-00000010/inner-1.safetensors").unlink()
    events: list[Event] = []
    train(small_dataset, str(tmp_path / "run"), resume=True, engine=InlineEngine(), on_event=events.append)
    told = [event.text for event in events if isinstance(event, Notice)]
    assert any("inner-1.safetensors is missing or damaged" in text for text in told)


def test_ctrl_c_cuts_a_round_short_and_the_run_resumes_to_the_same_bytes(
    finished: tuple[Path, TrainResult], small_dataset: str, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and not timer.is_alive() and event.global_step < 10:
            timer.start()

    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGINT))
    result = run_tiny(small_dataset, tmp_path / "run", on_event=interrupt)
    assert result.interrupted_by == signal.SIGINT
    assert 0 < result.global_step < 20
    train(small_dataset, str(tmp_path / "run"), resume=True, engine=InlineEngine())
    assert files_of_last_checkpoint(tmp_path / "run") == files_of_last_checkpoint(finished[0])


class FaultyEngine(InlineEngine):
    """Fails the tasks of a slice."""

    def __init__(self, slice_: int) -> None:
        self._slice = slice_

    def map_reduce(self, map_fn: Callable[[Any], Any], reduce_fn: Callable[[Any, Any], Any], items: Any) -> Any:
        return super().map_reduce(functools.partial(self._fail, map_fn), reduce_fn, items)

    def _fail(self, fn: Callable[[Any], Any], item: Any) -> Any:
        if item.slice == self._slice and hasattr(item, "num_steps"):
            raise RuntimeError("the machine is gone")
        return fn(item)


@pytest.mark.parametrize("slice_", [0, 1])
def test_a_slice_that_fails_is_left_out_by_option_and_named(small_dataset: str, tmp_path: Path, slice_: int) -> None:
    events: list[Event] = []
    tolerant = ("strategy.max_lost_workers=1", "train.epochs=1", "strategy.local_steps=100", *AVERAGING)
    run_tiny(small_dataset, tmp_path / "run", *tolerant, engine=FaultyEngine(slice_), on_event=events.append)
    (told,) = [event.text for event in events if isinstance(event, Notice)]
    assert f"Slice {slice_} failed on every attempt" in told and "the machine is gone" in told
    assert lines(tmp_path / "run", "epoch")[0]["accuracy"] > 0


def test_a_slice_that_fails_ends_the_run_without_the_option(small_dataset: str, tmp_path: Path) -> None:
    events: list[Event] = []
    with pytest.raises(TrainingError, match=r"the machine is gone.*max_restarts=1.*--resume.*max_lost_workers"):
        run_tiny(
            small_dataset,
            tmp_path / "run",
            "strategy.max_restarts=1",
            engine=FaultyEngine(1),
            on_event=events.append,
        )
    assert any(isinstance(event, Notice) and "restart 1 of 1" in event.text for event in events)


def test_a_loss_that_is_not_finite_stops_the_run(small_dataset: str, tmp_path: Path) -> None:
    wild = ("optimizer.name=sgd", "optimizer.learning_rate=1e30", "schedule.name=constant", "schedule.warmup_epochs=0")
    for name in ("once", "again"):  # in one process, which must forget it
        with pytest.raises(NonFiniteLossError, match=r"in step \d+ of epoch 1"):
            run_tiny(small_dataset, tmp_path / name, *wild)
    run_tiny(small_dataset, tmp_path / "tame", "train.epochs=1")


def test_fewer_bits_on_the_wire_learn_and_send_half_the_bytes(small_dataset: str, tmp_path: Path) -> None:
    sent = {}
    for wire in ("float32", "bfloat16", "float16"):
        wide = ("model.options={width=32, stages=2, convolutions=1}", "strategy.keep_inner_state=false")
        result = run_tiny(small_dataset, tmp_path / wire, *wide, f"strategy.wire={wire}", "train.epochs=3")
        assert (result.val_accuracy or 0) > 0.8
        sent[wire] = sum(line["sent_bytes"] for line in lines(tmp_path / wire, "step"))
    assert sent["bfloat16"] < 0.6 * sent["float32"]
    assert sent["float16"] < 0.6 * sent["float32"]


@given(
    arrays(np.float32, st.integers(0, 20), elements=st.floats(-(2.0**120), 2.0**120, width=32)),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_what_travels_keeps_its_values_to_the_bits_of_the_wire(array: np.ndarray, wire: Any) -> None:
    found, note = decode(encode({"a": array, "exact": array}, wire, {"exact"}, {"x": [1]}), "it")
    np.testing.assert_array_equal(found["exact"], array)
    assert note == {"x": [1]}
    largest = np.abs(array).max(initial=0)
    error = {"float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}[wire]
    # In float16 what is below the largest by more than 2**29 is lost, as it is next to it in float32.
    absolute = largest * 2.0**-38 if wire == "float16" else 2.0**-133
    assert (np.abs(found["a"] - array) <= error * np.abs(array) + absolute).all()


def test_a_task_that_hangs_ends_its_process() -> None:
    code = (
        "import time; from manyeyes.training.reporting import Life\n"
        "from manyeyes.training.reporting import ends_when_it_hangs\n"
        "with ends_when_it_hangs(Life(), 0.2): time.sleep(60)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=50, check=False).returncode == EXIT_HANGS


def command(*arguments: str) -> subprocess.Popen[str]:
    # A process of its own: in this one TensorFlow may have its threads already, and sums depend on their number.
    return subprocess.Popen(
        [sys.executable, "-m", "manyeyes.cli.main", "train", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )


@pytest.mark.slow
def test_a_killed_driver_resumes_in_one_process_to_the_bytes_of_two(small_dataset: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    often = ("train.epochs=8", "train.checkpoint_every_steps=4")
    run_tiny(small_dataset, whole, *often, engine=create_engine("local", 2), num_workers=2)
    settings = [part for setting in (*TINY, *often) for part in ("--set", setting)]
    process = command(small_dataset, "--out", str(parts), "--engine", "inline", *settings)
    while not (parts / "checkpoints/step-00000014").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.003)
    process.kill()
    process.communicate()
    assert checkpoint.names(str(parts / "checkpoints"))[-1] < "step-00000080"
    process = command(small_dataset, "--out", str(parts), "--engine", "inline", "--resume")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert files_of_last_checkpoint(parts) == files_of_last_checkpoint(whole)
