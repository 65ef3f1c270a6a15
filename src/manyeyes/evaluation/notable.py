"""The few examples of an evaluation that are worth a look: the most confident mistakes, the least certain answers."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from manyeyes.recognition.predictor import softmax

NUM_NOTABLE = 24
_VALUES_AT_ONCE = 1 << 16
_Key = Callable[["NotableExample"], tuple[float, str, tuple[str, int, int]]]


@dataclass(frozen=True)
class Place:
    """Where an image is stored: a file of the dataset's shards/, and the row in one of its row groups, from 0."""

    shard: str
    row_group: int
    row: int


@dataclass(frozen=True)
class NotableExample:
    """One example, and what the model said of it.

    Attributes:
        path: where the image came from.
        label, predicted: the true label, and that of the likeliest class.
        probability: of the predicted class.
        margin: by which it is likelier than the class after it.
        place: where the image is stored.
    """

    path: str
    label: int
    predicted: int
    probability: float
    margin: float
    place: Place


@dataclass(frozen=True)
class Notable:
    """Up to `size` examples of each kind. `+` is associative and commutative: equals are ordered by path and place.

    Attributes:
        mistakes: the most confident first.
        uncertain: the smallest margin first.
    """

    size: int = NUM_NOTABLE
    mistakes: tuple[NotableExample, ...] = ()
    uncertain: tuple[NotableExample, ...] = ()

    @classmethod
    def from_logits(
        cls,
        logits: np.ndarray,
        labels: np.ndarray,
        paths: Sequence[str],
        places: Sequence[Place],
        *,
        temperature: float = 1.0,
        size: int = NUM_NOTABLE,
    ) -> Notable:
        """Pick from examples with logits (n, num_classes)."""
        # In pieces that stay in the processor's caches.
        step = max(1, _VALUES_AT_ONCE // logits.shape[1])
        pieces = [_answers(logits[start : start + step], temperature) for start in range(0, max(1, len(logits)), step)]
        predicted, probability, margin = (np.concatenate(parts) for parts in zip(*pieces, strict=True))

        def pick(rows: np.ndarray, badness: np.ndarray, key: _Key) -> tuple[NotableExample, ...]:
            if len(rows) > size:
                # Of many only those that may be among the first are looked at one by one.
                rows = rows[badness[rows] <= np.partition(badness[rows], size - 1)[size - 1]] if size else rows[:0]
            found = (
                NotableExample(
                    paths[i], int(labels[i]), int(predicted[i]), float(probability[i]), float(margin[i]), places[i]
                )
                for i in rows
            )
            return _first(found, size, key)

        return cls(
            size,
            pick(np.flatnonzero(predicted != labels), -probability, _by_confidence),
            pick(np.arange(len(labels)), margin, _by_margin),
        )

    def __add__(self, other: Notable) -> Notable:
        size = min(self.size, other.size)
        return Notable(
            size,
            _first((*self.mistakes, *other.mistakes), size, _by_confidence),
            _first((*self.uncertain, *other.uncertain), size, _by_margin),
        )


def _answers(logits: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The label of the largest logit, its probability, and by how much that is above the second; each (n,)."""
    rows, predicted = np.arange(len(logits)), logits.argmax(axis=1)
    probabilities = softmax(logits, temperature)
    probability = probabilities[rows, predicted]
    probabilities[rows, predicted] = 0.0
    return predicted, probability, probability - probabilities.max(axis=1, initial=0.0)


def _first(examples: Iterable[NotableExample], size: int, key: _Key) -> tuple[NotableExample, ...]:
    return tuple(heapq.nsmallest(size, examples, key=key))


def _by_confidence(example: NotableExample) -> tuple[float, str, tuple[str, int, int]]:
    return -example.probability, example.path, _position(example)


def _by_margin(example: NotableExample) -> tuple[float, str, tuple[str, int, int]]:
    return example.margin, example.path, _position(example)


def _position(example: NotableExample) -> tuple[str, int, int]:
    return example.place.shard, example.place.row_group, example.place.row
