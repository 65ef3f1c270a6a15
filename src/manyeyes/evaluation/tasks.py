"""The tasks of an evaluation: consecutive row groups of one shard in, sums out, and predictions into a file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from manyeyes.data.dataset import Dataset, Split
from manyeyes.data.manifest import ShardInfo
from manyeyes.errors import DatasetError, ImageError, ManyeyesError
from manyeyes.evaluation.metrics import ClassificationSums
from manyeyes.evaluation.predictions import Predictions, PredictionWriter, open_writer, part_uri
from manyeyes.evaluation.recogniser import Recogniser
from manyeyes.imaging.preprocessing import Preprocessing

# A task has at least so many examples where its shard has, so that small row groups don't make small tasks.
TASK_EXAMPLES = 2048


@dataclass(frozen=True)
class Job:
    """What all tasks of an evaluation have in common.

    Attributes:
        preprocessing: from a stored image to the model's input.
        batch_size: images that the model takes at once.
        predictions: directory that every task writes its file of predictions to; None: none are kept.
    """

    recogniser: Recogniser
    dataset: Dataset
    preprocessing: Preprocessing
    batch_size: int
    predictions: str | None = None


@dataclass(frozen=True)
class Part:
    """Consecutive row groups of one shard: the examples of task `index`."""

    index: int
    shard: ShardInfo
    row_groups: range

    @property
    def num_examples(self) -> int:
        """The number of examples in its row groups."""
        return sum(self.shard.row_group_rows[index] for index in self.row_groups)


def cut(split: Split) -> Iterator[Part]:
    """Cut a split into tasks; it depends on nothing but the split."""
    number = 0
    for shard in split.shards:
        start, num_examples = 0, 0
        for index, num_rows in enumerate(shard.row_group_rows):
            num_examples += num_rows
            if num_examples >= TASK_EXAMPLES or index + 1 == len(shard.row_group_rows):
                yield Part(number, shard, range(start, index + 1))
                number, start, num_examples = number + 1, index + 1, 0


def evaluate_part(job: Job, part: Part) -> ClassificationSums:
    """Evaluate the examples of one task.

    Raises:
        ManyeyesError: the model gives logits that are not numbers.
        DatasetError: the shard is damaged, or its images don't fit the model.
    """
    logits_of = job.recogniser.load(job.batch_size)
    num_classes = len(job.recogniser.class_names)
    sums = ClassificationSums.zero(num_classes)
    with _writer(job, part) as writer:
        for batch in _batches(job, part):
            logits = logits_of(batch.images)
            try:
                sums += ClassificationSums.from_logits(logits, batch.labels)
            except ValueError as error:
                raise ManyeyesError(
                    f"{job.recogniser.uri} can't be evaluated on {job.dataset.shard_uri(part.shard)}: {error}"
                ) from None
            if writer is not None:
                writer.write(Predictions.from_logits(batch.paths, batch.labels, logits))
    return sums


def _writer(job: Job, part: Part) -> contextlib.AbstractContextManager[PredictionWriter | None]:
    if job.predictions is None:
        return contextlib.nullcontext()
    return open_writer(part_uri(job.predictions, part.index), len(job.recogniser.class_names))


@dataclass(frozen=True)
class _Batch:
    """Consecutive examples: uint8 images (n, height, width, channels), int32 labels (n,), n paths."""

    images: np.ndarray
    labels: np.ndarray
    paths: list[str]


def _batches(job: Job, part: Part) -> Iterator[_Batch]:
    """Yield batches of batch_size examples, the last of fewer."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    paths: list[str] = []
    with job.dataset.open_shard(part.shard) as reader:
        for index in part.row_groups:
            rows = reader.read(index)
            for path, stored, label in zip(rows.paths, rows.images, rows.labels.tolist(), strict=True):
                images.append(_preprocess(job, path, stored))
                labels.append(label)
                paths.append(path)
                if len(images) == job.batch_size:
                    yield _Batch(np.stack(images), np.array(labels, np.int32), paths)
                    images, labels, paths = [], [], []
    if images:
        yield _Batch(np.stack(images), np.array(labels, np.int32), paths)


def _preprocess(job: Job, path: str, stored: np.ndarray | bytes) -> np.ndarray:
    try:
        image = job.preprocessing(stored) if isinstance(stored, bytes) else job.preprocessing.apply(stored)
    except ImageError as error:
        raise DatasetError(f"{job.dataset.uri}: {path} can't be decoded ({error}). Ingest again.") from None
    if image.shape != job.recogniser.input_shape:
        raise DatasetError(
            f"{job.dataset.uri}: {path} becomes an image of {image.shape}, but {job.recogniser.uri} takes "
            f"{job.recogniser.input_shape}. Ingest with the size that the model was trained with."
        )
    return image
