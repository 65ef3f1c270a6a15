"""How much training loses to the input pipeline: the same step on resident data and fed by `InputPipeline`.

    python benchmarks/pipeline.py [--rounds 12] [--seconds 3] [--only small|photos]

Two synthetic datasets: 60,000 raw images of 28 x 28 x 1 (as Fashion-MNIST) with the small CNN, and JPEG photos of
160 x 160, read by window and cropped to 64 x 64, with a ResNet-18 of width 16. The two sides take turns, so that what
else runs on the machine hits both. "CPU ratio" compares the CPU seconds per image of this process instead of the time
that passed: where training keeps all cores busy, the two agree on a quiet machine, and neighbours disturb it less.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.data.manifest import Counts, Manifest, ShardInfo
from manyeyes.data.pipeline import InputPipeline
from manyeyes.data.shards import row_group_rows
from manyeyes.imaging.augment import Augmentation
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.models.registry import ModelConfig, build

NUM_CLASSES = 10
GOAL = 0.95

Step = Callable[[Any, Any], Any]


def write_dataset(root: str, images: np.ndarray | list[bytes], shape: tuple[int, int, int]) -> Dataset:
    """One split in one shard, with row groups as ingest makes them."""
    encoding = "raw" if isinstance(images, np.ndarray) else "jpeg"
    rows = row_group_rows(encoding, shape)
    labels = np.random.default_rng(1).integers(0, NUM_CLASSES, len(images), np.int32)
    path = Path(root) / "shards" / "part-00000.parquet"
    path.parent.mkdir(parents=True)
    sizes = []
    writer = None
    for start in range(0, len(images), rows):
        content = [image if isinstance(image, bytes) else image.tobytes() for image in images[start : start + rows]]
        paths = [f"{start + i}.jpg" for i in range(len(content))]
        image = pa.StructArray.from_arrays([pa.array(content, pa.binary()), pa.array(paths)], names=["bytes", "path"])
        table = pa.table({"image": image, "label": labels[start : start + rows]})
        writer = writer or pq.ParquetWriter(
            path, table.schema, compression="none", use_dictionary=False, write_page_checksum=True
        )
        writer.write_table(table, row_group_size=len(content))
        sizes.append(len(content))
    writer.close()
    preprocessing = Preprocessing(channels=shape[2])
    uri = str(path)
    Manifest(
        class_names=tuple(map(str, range(NUM_CLASSES))),
        encoding=encoding,
        preprocessing=preprocessing.to_dict(),
        preprocessing_fingerprint=preprocessing.fingerprint,
        image_shape=shape,
        num_seen=len(images),
        counts=Counts(written={"train": np.bincount(labels, minlength=NUM_CLASSES).tolist()}),
        shards=(ShardInfo(path.name, "train", tuple(sizes), storage.size_bytes(uri), storage.sha256_of_file(uri)),),
    ).save(root)
    return Dataset(root)


def photo(rng: np.random.Generator, size: int) -> bytes:
    """A JPEG with about the detail of a photo: noise at several scales, the finer the weaker."""
    image = sum(
        cv2.resize(rng.normal(0, strength, (side, side, 3)), (size, size), interpolation=cv2.INTER_CUBIC)
        for side, strength in ((3, 50), (10, 40), (40, 20), (size, 8))
    )
    return cv2.imencode(".jpg", np.clip(image + 128, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 90])[
        1
    ].tobytes()


def make_step(config: ModelConfig) -> Step:
    """A training step as plain as can be: cross-entropy and SGD with momentum."""
    import keras
    import tensorflow as tf

    keras.utils.set_random_seed(0)
    model = build(config)
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    signature = [tf.TensorSpec((None, *config.input_shape), tf.uint8), tf.TensorSpec((None,), tf.int32)]

    @tf.function(input_signature=signature)
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(loss, variables), variables)
        return loss

    return step


@dataclass(frozen=True)
class Pace:
    """Images and what they took, in seconds."""

    num_images: int
    wall_seconds: float
    cpu_seconds: float

    @property
    def images_per_second(self) -> float:
        return self.num_images / self.wall_seconds

    @property
    def images_per_cpu_second(self) -> float:
        return self.num_images / self.cpu_seconds


def pace(batches: Iterable[tuple[Any, Any]], step: Step) -> Pace:
    count = 0
    wall, cpu = time.perf_counter(), time.process_time()
    for images, labels in batches:
        step(images, labels)
        count += len(labels)
    return Pace(count, time.perf_counter() - wall, time.process_time() - cpu)


def fed(pipeline: InputPipeline, epoch: int, num_steps: int) -> Iterator[tuple[Any, Any]]:
    """The last steps of an epoch: exactly what is consumed is made, all of it in the time that is measured."""
    for batch in pipeline.batches(epoch, pipeline.steps_per_epoch - num_steps):
        yield batch.images, batch.labels


def measure(name: str, pipeline: InputPipeline, step: Step, rounds: int, seconds: float) -> list[str]:
    import tensorflow as tf

    batch = next(pipeline.batches(0))
    resident = tf.constant(batch.images), tf.constant(batch.labels)
    pace(itertools.repeat(resident, 5), step)
    rate = pace(itertools.repeat(resident, 10), step).images_per_second
    num_steps = min(max(10, round(seconds * rate / len(batch))), pipeline.steps_per_epoch)
    pairs = [
        (pace(itertools.repeat(resident, num_steps), step), pace(fed(pipeline, epoch, num_steps), step))
        for epoch in range(rounds)
    ]
    ratios = [b.images_per_second / a.images_per_second for a, b in pairs]
    cpu_ratio = statistics.median(b.images_per_cpu_second / a.images_per_cpu_second for a, b in pairs)
    alone = pace(fed(pipeline, rounds, num_steps), lambda images, labels: None)
    return [
        name,
        f"{statistics.median(a.images_per_second for a, _ in pairs):,.0f}",
        f"{statistics.median(b.images_per_second for _, b in pairs):,.0f}",
        f"{statistics.median(ratios):.3f}",
        f"{min(ratios):.3f} to {max(ratios):.3f}",
        f"{cpu_ratio:.3f}",
        f"{alone.images_per_second:,.0f}",
        f"{memcpy(batch.images):,.0f}",
    ]


def memcpy(images: np.ndarray, seconds: float = 0.5) -> float:
    """Images/s of copying batches from memory larger than the caches: what no pipeline can exceed on one core."""
    source = np.zeros((max(1, (64 << 20) // images.nbytes), *images.shape), np.uint8)
    target = images.copy()
    count = 0
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for batch in source:
            np.copyto(target, batch)
        count += len(source) * len(images)
    return count / (time.perf_counter() - start)


def small(root: str) -> tuple[InputPipeline, ModelConfig]:
    images = np.random.default_rng(0).integers(0, 256, (60_000, 28, 28, 1), np.uint8)
    dataset = write_dataset(root, images, (28, 28, 1))
    augmentation = Augmentation(flip_horizontal=0.5, shift=0.08)
    pipeline = InputPipeline(dataset, "train", global_batch_size=128, augmentation=augmentation)
    return pipeline, ModelConfig("cnn", (28, 28, 1), NUM_CLASSES)


def photos(root: str) -> tuple[InputPipeline, ModelConfig]:
    rng = np.random.default_rng(0)
    originals = [photo(rng, 160) for _ in range(500)]
    dataset = write_dataset(root, [originals[i % 500] for i in range(6000)], (160, 160, 3))
    pipeline = InputPipeline(
        dataset,
        "train",
        global_batch_size=64,
        cache_bytes=0,
        preprocessing=Preprocessing.for_size(64, 64),
        augmentation=Augmentation(flip_horizontal=0.5, random_resized_crop=0.35),
    )
    return pipeline, ModelConfig("resnet18", (64, 64, 3), NUM_CLASSES, options={"width": 16})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each side in each round")
    parser.add_argument("--only", choices=("small", "photos"))
    arguments = parser.parse_args()
    table = Table(
        "dataset",
        "resident\nimages/s",
        "pipeline\nimages/s",
        f"ratio\n(goal {GOAL})",
        "rounds",
        "CPU\nratio",
        "pipeline alone\nimages/s",
        "memcpy\nimages/s",
    )
    for name, make in (("small", small), ("photos", photos)):
        if arguments.only in (None, name):
            with tempfile.TemporaryDirectory() as root:
                pipeline, config = make(root)
                table.add_row(*measure(name, pipeline, make_step(config), arguments.rounds, arguments.seconds))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
