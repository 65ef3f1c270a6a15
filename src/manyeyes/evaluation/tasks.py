"""The tasks of an evaluation: consecutive row groups of one shard in, sums out, and predictions into a file."""

from __future__ import annotations

import contextlib
import functools
import heapq
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from manyeyes.data.dataset import Dataset, Split
from manyeyes.data.manifest import ShardInfo
from manyeyes.errors import DatasetError, ImageError, ManyeyesError
from manyeyes.evaluation.metrics import ClassificationSums
from manyeyes.evaluation.notable import NUM_NOTABLE, Notable, Place
from manyeyes.evaluation.predictions import Predictions, PredictionWriter, open_writer, part_uri
from manyeyes.evaluation.recogniser import Recogniser
from manyeyes.imaging.preprocessing import Preprocessing

# A task has at least so many examples where its shard has, so that small row groups don't make small tasks.
TASK_EXAMPLES = 2048
# Logits that a task holds before it adds them up: 16 MB.
_LOGITS_AT_ONCE = 1 << 22
# So many names of groups, and one more, travel to the driver.
MAX_GROUPS = 10_000


@dataclass(frozen=True)
class Job:
    """What all tasks of an evaluation have in common.

    Attributes:
        preprocessing: from a stored image to the model's input.
        batch_size: images that the model takes at once.
        num_notable: examples of each kind to keep, see notable.
        predictions: directory that every task writes its file of predictions to; None: none are kept.
    """

    recogniser: Recogniser
    dataset: Dataset
    preprocessing: Preprocessing
    batch_size: int
    num_notable: int = NUM_NOTABLE
    predictions: str | None = None


@dataclass(frozen=True)
class Part:
    """Consecutive row groups of one shard: the examples of task `index`; `start` is the index of the first of them."""

    index: int
    start: int
    shard: ShardInfo
    row_groups: range

    @property
    def num_examples(self) -> int:
        """The number of examples in its row groups."""
        return sum(self.shard.row_group_rows[index] for index in self.row_groups)


def cut(split: Split) -> Iterator[Part]:
    """Cut a split into tasks; it depends on nothing but the split."""
    number, position = 0, 0
    for shard in split.shards:
        start, num_examples = 0, 0
        for index, num_rows in enumerate(shard.row_group_rows):
            num_examples += num_rows
            if num_examples >= TASK_EXAMPLES or index + 1 == len(shard.row_group_rows):
                yield Part(number, position, shard, range(start, index + 1))
                number, position = number + 1, position + num_examples
                start, num_examples = index + 1, 0


@dataclass(frozen=True)
class Findings:
    """What tasks give back. `+` is exact, associative and commutative.

    Attributes:
        groups: names of the examples' groups; where there are more than MAX_GROUPS, the first MAX_GROUPS + 1.
        num_grouped: examples that are of a group.
    """

    sums: ClassificationSums
    notable: Notable
    groups: frozenset[str] = frozenset()
    num_grouped: int = 0

    def __add__(self, other: Findings) -> Findings:
        return Findings(
            self.sums + other.sums,
            self.notable + other.notable,
            _first_groups(self.groups | other.groups),
            self.num_grouped + other.num_grouped,
        )


def _first_groups(names: Iterable[str]) -> frozenset[str]:
    names = frozenset(names)
    return names if len(names) <= MAX_GROUPS else frozenset(heapq.nsmallest(MAX_GROUPS + 1, names))


def evaluate_part(job: Job, part: Part) -> Findings:
    """Evaluate the examples of one task.

    Raises:
        ManyeyesError: the model gives logits that are not numbers.
        DatasetError: the shard is damaged, or its images don't fit the model.
        StorageError: the predictions can't be written.
    """
    logits_of = job.recogniser.load(job.batch_size)
    num_classes = len(job.recogniser.class_names)
    found: list[Findings] = []
    waiting: list[_Answered] = []
    num_waiting, start = 0, part.start

    def add_up() -> None:
        nonlocal start, waiting, num_waiting
        answered = _joined(waiting)
        found.append(_findings(job, part, start, answered))
        if writer is not None:
            predictions = Predictions.from_logits(
                answered.paths, answered.labels, answered.logits, job.recogniser.temperature
            )
            writer.write(predictions)
        start += len(answered.paths)
        waiting, num_waiting = [], 0

    with _writer(job, part) as writer:
        for batch in _batches(job, part):
            waiting.append(_Answered(logits_of(batch.images), batch.labels, batch.paths, batch.places, batch.groups))
            num_waiting += len(batch.paths)
            # Sums are large where there are many classes, so they are made of many examples at once.
            if num_waiting * num_classes >= _LOGITS_AT_ONCE:
                add_up()
        if waiting:
            add_up()
    return functools.reduce(operator.add, found)


def _findings(job: Job, part: Part, start: int, answered: _Answered) -> Findings:
    temperature = job.recogniser.temperature
    try:
        sums = ClassificationSums.from_logits(
            answered.logits,
            answered.labels,
            temperature=temperature,
            threshold=job.recogniser.threshold,
            example_indices=np.arange(start, start + len(answered.paths)),
        )
    except ValueError as error:
        raise ManyeyesError(
            f"{job.recogniser.uri} can't be evaluated on {job.dataset.shard_uri(part.shard)}: {error}"
        ) from None
    notable = Notable.from_logits(
        answered.logits,
        answered.labels,
        answered.paths,
        answered.places,
        temperature=temperature,
        size=job.num_notable,
    )
    grouped = [group for group in answered.groups if group is not None]
    return Findings(sums, notable, _first_groups(grouped), len(grouped))


def _writer(job: Job, part: Part) -> contextlib.AbstractContextManager[PredictionWriter | None]:
    if job.predictions is None:
        return contextlib.nullcontext()
    return open_writer(part_uri(job.predictions, part.index), len(job.recogniser.class_names))


@dataclass(frozen=True)
class _Batch:
    """Consecutive: uint8 images (n, height, width, channels), int32 labels (n,), n paths, places and groups."""

    images: np.ndarray
    labels: np.ndarray
    paths: list[str]
    places: list[Place]
    groups: list[str | None]


@dataclass(frozen=True)
class _Answered:
    """Consecutive examples: float32 logits (n, num_classes), int32 labels (n,), n paths, places and groups."""

    logits: np.ndarray
    labels: np.ndarray
    paths: list[str]
    places: list[Place]
    groups: list[str | None]


def _joined(parts: list[_Answered]) -> _Answered:
    return _Answered(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.labels for part in parts]),
        [path for part in parts for path in part.paths],
        [place for part in parts for place in part.places],
        [group for part in parts for group in part.groups],
    )


def _batches(job: Job, part: Part) -> Iterator[_Batch]:
    """Yield batches of batch_size examples, the last of fewer."""
    images: list[np.ndarray] = []
    labels: list[int] = []
    paths: list[str] = []
    places: list[Place] = []
    groups: list[str | None] = []
    with job.dataset.open_shard(part.shard) as reader:
        for index in part.row_groups:
            rows = reader.read(index)
            for row, (path, stored) in enumerate(zip(rows.paths, rows.images, strict=True)):
                images.append(_preprocess(job, path, stored))
                labels.append(int(rows.labels[row]))
                paths.append(path)
                places.append(Place(part.shard.name, index, row))
                groups.append(rows.groups[row])
                if len(images) == job.batch_size:
                    yield _Batch(np.stack(images), np.array(labels, np.int32), paths, places, groups)
                    images, labels, paths, places, groups = [], [], [], [], []
    if images:
        yield _Batch(np.stack(images), np.array(labels, np.int32), paths, places, groups)


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
