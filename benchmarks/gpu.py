"""Steps per second on a GPU, by precision, with XLA, and with images copied ahead or not.

    python benchmarks/gpu.py [--epochs 4] [--only cnn|resnet-32|resnet-224]

Generated colour pixels go through the input pipeline (with a flip, resident in memory) and the strategy that `manyeyes
train` uses; AdamW, batch 128. The first epoch, with all compilation, does not count, and the clock stops when the GPU
is done. Each row is a process of its own. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import functools
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.base import GangContext
from manyeyes.engines.registry import create_engine
from manyeyes.training import backend
from manyeyes.training.settings import TrainSettings

BATCH = 128
MODELS = {"resnet-224": ("resnet18", 224, 12), "resnet-32": ("resnet18", 32, 100), "cnn": ("cnn", 28, 100)}
PRECISIONS = ["float32", "bfloat16", "float16"]


def measure(
    dataset: str, assignments: list[str], num_epochs: int, copies_ahead: bool, context: GangContext
) -> list[float]:
    """Seconds of a step, and the share of them that waited for input."""
    xla = "train.xla=true" in assignments
    backend.prepare(0, context=context, deterministic=not xla)
    from manyeyes.training import device_feed
    from manyeyes.training.building import build_allreduce
    from manyeyes.training.collective import connect
    from manyeyes.training.run import describe_run

    if not copies_ahead:
        device_feed._ahead = lambda batches: batches
    data = Dataset(dataset)
    settings = TrainSettings.load(
        None, [f"train.global_batch_size={BATCH}", "augment.flip_horizontal=0.5", *assignments]
    )
    strategy = build_allreduce(describe_run(data, "", settings), settings, data, connect(context))
    done = sum(strategy.steps(0, 0, 0))
    strategy.totals()
    waited, num_warm, started = strategy.clock.wait_seconds, done, time.perf_counter()
    for epoch in range(1, num_epochs + 1):
        done += sum(strategy.steps(epoch, 0, done))
    strategy.totals()
    seconds = time.perf_counter() - started
    return [seconds / (done - num_warm), (strategy.clock.wait_seconds - waited) / seconds]


def write_dataset(folder: Path, size: int, num_images: int) -> str:
    """Noise in two classes."""
    draw = np.random.default_rng(0)
    for index in range(num_images):
        path = folder / "photos" / f"{index % 2}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), draw.integers(0, 256, (size, size, 3), dtype=np.uint8))
    settings = IngestSettings(size=(size, size), encoding="raw", val=0.0, test=0.0)
    ingest(str(folder / "photos"), str(folder / "dataset"), settings=settings)
    return str(folder / "dataset")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="that are counted")
    parser.add_argument("--only", choices=MODELS)
    arguments = parser.parse_args()
    if not backend.num_gpus():
        print("TensorFlow sees no GPU on this machine: nothing to measure.")
        return
    table = Table("model, input", "precision", "images copied ahead", "ms a step", "images/s", "waits for input")
    for name in [arguments.only] if arguments.only else MODELS:
        model, size, steps = MODELS[name]
        with tempfile.TemporaryDirectory() as folder:
            dataset = write_dataset(Path(folder), size, steps * BATCH)
            rows = [(precision, "", True) for precision in PRECISIONS]
            rows += [("bfloat16", "", False), ("bfloat16", ", XLA", True)]
            for precision, xla, copies_ahead in rows:
                assignments = [
                    f"model.name={model}",
                    f"train.precision={precision}",
                    f"train.xla={'true' if xla else 'false'}",
                ]
                [(seconds, waits)] = create_engine("local", 1).gang(
                    functools.partial(measure, dataset, assignments, arguments.epochs, copies_ahead), 1
                )
                table.add_row(
                    f"{model}, {size} px",
                    precision + xla,
                    "yes" if copies_ahead else "no",
                    f"{seconds * 1e3:.1f}",
                    f"{BATCH / seconds:,.0f}",
                    f"{waits:.0%}",
                )
    Console().print(table)


if __name__ == "__main__":
    main()
