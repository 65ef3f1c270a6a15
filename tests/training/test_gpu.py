"""Training on an NVIDIA GPU. Each test is a process of its own, or several, as TensorFlow takes a GPU once and for all.

Where there is none, all of these are skipped; docs/guides/gpu.md says where and when they were run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyeyes import diagnosis
from manyeyes.training import backend, checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not backend.num_gpus(), reason="TensorFlow sees no GPU on this machine"),
]

SMALL = (
    "model.options={width=8, stages=2, convolutions=1}",
    "model.dropout=0.2",
    "train.epochs=6",
    "train.global_batch_size=16",
    "train.precision=float32",
    "train.tensorboard=false",
    "train.checkpoint_every_steps=4",
    "optimizer.name=sgd",
    "optimizer.learning_rate=0.03",
    "optimizer.ema=0.9",
    "augment.shift=0.1",
    "mix.mixup=0.3",
)
STEPS_PER_EPOCH = 6

# Trains by the arguments in the JSON of sys.argv[1]; dies as by SIGKILL after the checkpoint of step `dies_after`.
TRAIN = """
import dataclasses, json, os, sys

def main():
    from manyeyes.training import events, trainer
    from manyeyes.training.settings import TrainSettings

    job = json.loads(sys.argv[1])
    if not job["feeds_ahead"]:
        from manyeyes.training import device_feed
        device_feed._ahead = lambda batches: batches

    def watch(event):
        if isinstance(event, events.Saved) and event.global_step == job["dies_after"]:
            os._exit(9)

    settings = None if job["resume"] else TrainSettings.load(None, job["settings"])
    result = trainer.train(
        job["dataset"], job["out"], settings, resume=job["resume"], num_workers=job["num_workers"], on_event=watch
    )
    import tensorflow as tf
    has_gpu = job["num_workers"] == 1 and bool(tf.config.get_visible_devices("GPU"))
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"] if has_gpu else 0
    listed = os.popen("nvidia-smi --query-gpu=memory.used,memory.total --format=csv,noheader,nounits").read()
    used, total = (float(number) for number in listed.splitlines()[0].split(","))
    told = {"peak_gpu_bytes": peak, "used_share": used / total}
    print(json.dumps(dataclasses.asdict(result) | told))

if __name__ == "__main__":
    main()
"""

GRADIENT = """
import contextlib, json, sys
import numpy as np
from manyeyes.training import backend

dataset, out, *settings = sys.argv[1:]
backend.prepare(1)
import tensorflow as tf
from manyeyes.data.dataset import Dataset
from manyeyes.engines.base import GangContext
from manyeyes.training.building import build_allreduce
from manyeyes.training.collective import Collective
from manyeyes.training.run import describe_run
from manyeyes.training.settings import TrainSettings

data = Dataset(dataset)
settings = TrainSettings.load(None, settings)
strategy = build_allreduce(
    describe_run(data, "", settings), settings, data, Collective(GangContext(0, 1, ()))
)
with contextlib.closing(strategy.train_pipeline.batches(0)) as batches:
    packed = strategy.summed(next(batches), 0)
np.save(out, packed.numpy())
print(json.dumps({"device": packed.device}))
"""


def run(code: str, *arguments: str, on_cpu: bool = False) -> subprocess.CompletedProcess[str]:
    """In a process that is a file's, so that its workers can be spawned."""
    hidden = {"CUDA_VISIBLE_DEVICES": "-1"} if on_cpu else {}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **hidden},
    )


def train(dataset: str, out: Path, *settings: str, on_cpu: bool = False, **job: Any) -> dict[str, Any]:
    """Train by SMALL and `settings`, in a process of its own; what it came to and what it took of the GPU."""
    job = {
        "dataset": dataset,
        "out": str(out),
        "settings": [*SMALL, *settings],
        "resume": False,
        "num_workers": 1,
        "dies_after": 0,
        "feeds_ahead": True,
        **job,
    }
    done = run(TRAIN, json.dumps(job), on_cpu=on_cpu)
    assert done.returncode == (9 if job["dies_after"] else 0), done.stdout + done.stderr
    return json.loads(done.stdout) if done.stdout else {}


def last_checkpoint(out: Path) -> dict[str, bytes]:
    last = out / "checkpoints" / checkpoint.names(str(out / "checkpoints"))[-1]
    return {path.name: path.read_bytes() for path in last.iterdir() if path.name != "state.json"}


@pytest.fixture(scope="module")
def on_gpu(small_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run on the GPU from its first step to its last."""
    out = tmp_path_factory.mktemp("on_gpu") / "run"
    return out, train(small_dataset, out)


def test_training_on_a_gpu_reaches_the_accuracy_of_the_cpu(
    on_gpu: tuple[Path, dict[str, Any]], small_dataset: str, tmp_path: Path
) -> None:
    _, found = on_gpu
    expected = train(small_dataset, tmp_path / "run", on_cpu=True)
    assert found["peak_gpu_bytes"] > 0
    assert expected["peak_gpu_bytes"] == 0
    assert expected["val_accuracy"] > 0.9
    assert found["val_accuracy"] == pytest.approx(expected["val_accuracy"], abs=0.05)
    # Order, augmentation, mix and dropout are the same draws on both.
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert found["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-3)


@pytest.mark.parametrize("model", ["cnn", "resnet18", "gru"])
def test_the_gradients_of_a_float32_step_on_a_gpu_are_those_of_the_cpu(
    model: str, small_dataset: str, tmp_path: Path
) -> None:
    options = {"cnn": "{width=8}", "resnet18": "{width=8}", "gru": "{units=16}"}[model]
    settings = (
        f"model.name={model}",
        f"model.options={options}",
        "train.global_batch_size=32",
        "train.precision=float32",
    )
    packed = {}
    for device, on_cpu in (("GPU", False), ("CPU", True)):
        path = tmp_path / f"{device}.npy"
        done = run(GRADIENT, small_dataset, str(path), *settings, on_cpu=on_cpu)
        assert done.returncode == 0, done.stderr
        assert f"device:{device}" in json.loads(done.stdout)["device"]
        packed[device] = np.load(path).astype(np.float64)
    # 24 bits of mantissa; TensorFloat-32 has 11 and would be off by a few 1e-4.
    difference = np.linalg.norm(packed["GPU"] - packed["CPU"]) / np.linalg.norm(packed["CPU"])
    assert 0 < difference < 2e-5


def test_a_process_takes_no_more_memory_of_a_gpu_than_it_needs(on_gpu: tuple[Path, dict[str, Any]]) -> None:
    # Unless told otherwise TensorFlow takes nearly all.
    assert on_gpu[1]["used_share"] < 0.5


def test_float16_learns_with_a_scaled_loss(small_dataset: str, tmp_path: Path) -> None:
    found = train(small_dataset, tmp_path / "run", "train.precision=float16")
    assert (found["precision"], found["peak_gpu_bytes"] > 0) == ("float16", True)
    assert found["val_accuracy"] > 0.9
    directory = str(tmp_path / "run" / "checkpoints")
    saved = checkpoint.load(directory, checkpoint.names(directory)[-1]).arrays["optimizer"]
    assert [float(array) > 1 for key, array in saved.items() if key.endswith("dynamic_scale")] == [True]


def test_the_precision_is_bfloat16_where_a_gpu_computes_it_and_learns(small_dataset: str, tmp_path: Path) -> None:
    listed = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=True
    )
    found = train(small_dataset, tmp_path / "run", "train.precision=auto")
    assert found["precision"] == ("bfloat16" if float(listed.stdout.split()[0]) >= 8 else "float32")
    assert found["val_accuracy"] > 0.9


def test_xla_compiles_the_step_and_changes_no_more_than_rounding(small_dataset: str, tmp_path: Path) -> None:
    # Without dropout, as XLA draws other numbers for it.
    plain = train(small_dataset, tmp_path / "plain", "model.dropout=0.0")
    found = train(small_dataset, tmp_path / "run", "model.dropout=0.0", "train.xla=true")
    assert found["peak_gpu_bytes"] > 0
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert last_checkpoint(tmp_path / "run") != last_checkpoint(tmp_path / "plain")


def test_a_run_killed_within_an_epoch_on_a_gpu_reaches_the_bytes_of_an_uninterrupted_one(
    on_gpu: tuple[Path, dict[str, Any]], small_dataset: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert 16 % STEPS_PER_EPOCH
    train(small_dataset, out, dies_after=16)
    found = train(small_dataset, out, resume=True)
    assert found["epochs"] == 6
    assert last_checkpoint(out) == last_checkpoint(on_gpu[0])


def test_copying_images_ahead_changes_no_bit(
    on_gpu: tuple[Path, dict[str, Any]], small_dataset: str, tmp_path: Path
) -> None:
    train(small_dataset, tmp_path / "run", feeds_ahead=False)
    assert last_checkpoint(tmp_path / "run") == last_checkpoint(on_gpu[0])


def test_two_workers_that_share_a_gpu_reach_the_bytes_of_one_with_virtual_workers(
    small_dataset: str, tmp_path: Path
) -> None:
    for num_workers in (1, 2):
        out = tmp_path / str(num_workers)
        found = train(small_dataset, out, "strategy.virtual_workers=2", num_workers=num_workers)
        assert found["val_accuracy"] > 0.9
    assert last_checkpoint(tmp_path / "1") == last_checkpoint(tmp_path / "2")


def test_two_workers_that_share_a_gpu_normalise_over_the_global_batch(
    on_gpu: tuple[Path, dict[str, Any]], small_dataset: str, tmp_path: Path
) -> None:
    # NCCL refuses two workers on one GPU; left to themselves, they take sockets.
    found = train(small_dataset, tmp_path / "run", "model.dropout=0.0", num_workers=2)
    alone = train(small_dataset, tmp_path / "alone", "model.dropout=0.0")
    assert found["val_accuracy"] > 0.9
    assert found["loss"] == pytest.approx(alone["loss"], rel=1e-3)


def test_a_run_begun_on_a_gpu_goes_on_on_the_cpu(small_dataset: str, tmp_path: Path) -> None:
    train(small_dataset, tmp_path / "run", dies_after=16)
    found = train(small_dataset, tmp_path / "run", resume=True, on_cpu=True)
    assert (found["epochs"], found["peak_gpu_bytes"]) == (6, 0)
    assert found["val_accuracy"] > 0.9


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_long_recurrent_network_trained_on_a_gpu_can_be_exported_there(
    precision: str, small_dataset: str, tmp_path: Path
) -> None:
    # More rows than are unrolled (models.rnn), for which Keras has a kernel of the GPU that ONNX does not know.
    settings = ("model.name=gru", "model.options={units=16}", "data.image_size=[72, 60]", "optimizer.name=adamw")
    settings += ("optimizer.learning_rate=0.01", "augment.shift=0.0", f"train.precision={precision}")
    found = train(small_dataset, tmp_path / "run", *settings)
    assert found["val_accuracy"] > 0.6
    code = "import sys; from manyeyes.training.export import export; "
    code += "print(export(sys.argv[1], sys.argv[2], backend='onnxruntime').parity)"
    done = run(code, str(tmp_path / "run"), str(tmp_path / "bundle"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "bundle" / "model.onnx").exists()


def test_doctor_says_that_tensorflow_sees_the_gpu() -> None:
    found = diagnosis._gpu()
    assert found.status == "works", found
