"""What export measures a model on: held-out images with labels, and what a lower precision costs on them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from manyeyes.data.dataset import Dataset
from manyeyes.errors import DatasetError
from manyeyes.imaging.decode import decode
from manyeyes.recognition.inputs import remaining_preprocessing
from manyeyes.training.golden import bounded
from manyeyes.training.run import Run

# Splits in the order in which they serve as held out; the images for calibration come from the other end.
_SPLITS = ("val", "test", "train")


@dataclass(frozen=True)
class Sample:
    """Images of one split, taken evenly.

    Attributes:
        indices: of the images in the split.
        stored: a few of the images as stored, decoded and of bounded size.
        inputs: uint8 (n, height, width, channels), as the model takes them.
        labels: int (n,), or None where the dataset's classes are not those of the model.
    """

    split: str
    indices: np.ndarray
    stored: list[np.ndarray]
    inputs: np.ndarray
    labels: np.ndarray | None


@dataclass(frozen=True)
class Accuracy:
    """What a precision costs, image by image beside float32.

    Attributes:
        split: of the dataset that the images are from; none of them was used to calibrate.
        labelled: False where there are no labels; then the answers of float32 stand for them.
        float32, accuracy: share of the images that are right in float32, and in the precision.
        num_lost, num_gained: images that are right in float32 only, and in the precision only.
        loss_points: by how many points (hundredths) accuracy is lower than in float32.
        loss_points_high: and how many it may be in truth: the upper end of the 95 % interval of Agresti and Min for
            paired proportions.
    """

    split: str
    num_images: int
    labelled: bool
    float32: float
    accuracy: float
    num_lost: int
    num_gained: int
    loss_points: float
    loss_points_high: float


def held_out_sample(dataset_uri: str, trained: Run, num_images: int, num_stored: int) -> Sample:
    """Take up to `num_images` images evenly from val, else test, else train.

    Raises:
        DatasetError: the dataset can't be read, is empty, or gives another shape than the model takes.
    """
    dataset = _open(dataset_uri, trained)
    name = next((name for name in _SPLITS if name in dataset.split_names), None)
    if name is None:
        raise DatasetError(f"{dataset_uri} has no examples, so the exported model can't be compared on any.")
    num_examples = dataset.split(name).num_examples
    indices = np.linspace(0, num_examples - 1, min(num_images, num_examples)).astype(np.int64)
    return _read(dataset, name, indices, trained, num_stored)


def calibration_images(dataset_uri: str, trained: Run, sample: Sample, num_images: int) -> np.ndarray:
    """Take images evenly from train, else val, else test, but none of `sample`.

    Returns:
        uint8 (n, height, width, channels), as the model takes them.

    Raises:
        DatasetError: see held_out_sample; or there are no others.
    """
    dataset = _open(dataset_uri, trained)
    for name in reversed(_SPLITS):
        if name not in dataset.split_names:
            continue
        free = np.arange(dataset.split(name).num_examples)
        if name == sample.split:
            free = np.setdiff1d(free, sample.indices)
        if len(free):
            indices = free[np.linspace(0, len(free) - 1, min(num_images, len(free))).astype(np.int64)]
            return _read(dataset, name, indices, trained, 0).inputs
    raise DatasetError(
        f"{dataset_uri} has no images left to calibrate int8 on: all {len(sample.indices)} measure its accuracy. "
        "Give a dataset with more images by --dataset, or use --precision float32."
    )


def compare_accuracy(sample: Sample, float32_logits: np.ndarray, logits: np.ndarray) -> Accuracy:
    """Compare the answers of a precision with those of float32 on the same images, both float32 (n, classes)."""
    reference, found = float32_logits.argmax(axis=1), logits.argmax(axis=1)
    labels = reference if sample.labels is None else sample.labels
    was_right, is_right = reference == labels, found == labels
    lost, gained = int(np.sum(was_right & ~is_right)), int(np.sum(~was_right & is_right))
    num_images = len(labels)
    # Half an image is added to each of the four cells of the table, which makes the interval hold for few images too.
    difference = (lost - gained) / (num_images + 2)
    deviation = math.sqrt((lost + gained + 1) - (lost - gained) ** 2 / (num_images + 2)) / (num_images + 2)
    return Accuracy(
        split=sample.split,
        num_images=num_images,
        labelled=sample.labels is not None,
        float32=float(np.mean(was_right)),
        accuracy=float(np.mean(is_right)),
        num_lost=lost,
        num_gained=gained,
        loss_points=100 * (lost - gained) / num_images,
        loss_points_high=100 * min(1.0, difference + 1.96 * deviation),
    )


def _open(dataset_uri: str, trained: Run) -> Dataset:
    try:
        return Dataset(dataset_uri)
    except DatasetError as error:
        if dataset_uri != trained.dataset:
            raise
        raise DatasetError(f"The run's own dataset can't be used: {error} Or give another by --dataset.") from None


def read_batches(
    dataset: Dataset, name: str, indices: np.ndarray, trained: Run, batch_size: int = 32
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the images of a split at sorted `indices` as the model takes them, uint8 (n, height, width, channels), and
    their labels, int (n,), a batch at a time.

    Raises:
        DatasetError: the dataset is damaged, or gives another shape than the model takes.
    """
    examples = _examples(dataset, name, indices, trained)
    while batch := list(itertools.islice(examples, batch_size)):
        yield np.stack([example.inputs for example in batch]), np.array([example.label for example in batch])


@dataclass(frozen=True)
class _Example:
    index: int
    pixels: np.ndarray  # as stored, decoded
    inputs: np.ndarray  # as the model takes them
    label: int


def _examples(dataset: Dataset, name: str, indices: np.ndarray, trained: Run) -> Iterator[_Example]:
    left = remaining_preprocessing(trained.preprocessing, dataset.preprocessing)
    split = dataset.split(name)
    group_of = np.searchsorted(split.row_group_starts, indices, side="right") - 1
    for group in np.unique(group_of):
        shard, row_group = split.row_groups[group]
        with dataset.open_shard(split.shards[shard]) as reader:
            rows = reader.read(row_group)
        start = split.row_group_starts[group]
        for index in indices[group_of == group]:
            image = rows.images[index - start]
            pixels = (
                decode(image, channels=left.channels, background=left.background) if isinstance(image, bytes) else image
            )
            inputs = left.apply(pixels)
            if inputs.shape != trained.model.input_shape:
                raise DatasetError(
                    f"{dataset.uri} gives images of {inputs.shape}, but the model of {trained.uri} takes "
                    f"{trained.model.input_shape}. Give a dataset with the channels that it was trained on."
                )
            yield _Example(int(index), pixels, inputs, int(rows.labels[index - start]))


def _read(dataset: Dataset, name: str, indices: np.ndarray, trained: Run, num_stored: int) -> Sample:
    kept = {int(indices[i]) for i in np.linspace(0, len(indices) - 1, min(num_stored, len(indices))).astype(int)}
    stored: list[np.ndarray] = []
    inputs: list[np.ndarray] = []
    labels: list[int] = []
    for example in _examples(dataset, name, indices, trained):
        if example.index in kept:
            stored.append(bounded(example.pixels))
        inputs.append(example.inputs)
        labels.append(example.label)
    known = tuple(dataset.class_names) == tuple(trained.class_names)
    return Sample(name, indices, stored, np.stack(inputs), np.array(labels) if known else None)
