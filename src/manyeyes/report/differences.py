"""How far two evaluations of the same examples differ: paired where the predictions are kept, else from intervals."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from manyeyes.errors import DataError
from manyeyes.evaluation.predictions import read_predictions
from manyeyes.evaluation.resampling import McNemar, mcnemar
from manyeyes.recognition.predictor import softmax
from manyeyes.report.figures import Figure

UNPAIRED = (
    "from the intervals of both, as if they had seen different examples (MOVER: Zou and Donner); "
    "usually wider than a paired one"
)
_PAIRED_SHARE = "paired, normal with half an example added to each cell (Agresti and Min)"
_PAIRED_MEAN = "paired, normal, of the differences example by example"
_PAIRED_BOOTSTRAP = "paired, percentiles of {} bootstrap replicates of the examples, seed 0"
_NUM_REPLICATES = 400
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Difference:
    """A figure of one less that of another.

    Attributes:
        low, high: the interval; None where nothing is known, as where nothing varies: it would be a point.
        p_value: that there is no difference; None where only an interval is known, or not even that.
        method: how the interval is made.
    """

    name: str
    value: float
    low: float | None
    high: float | None
    p_value: float | None
    method: str


@dataclass(frozen=True)
class _Pairs:
    """What two models said of the same n examples.

    Attributes:
        labels, first, second: int (n,): true labels, and what either predicted.
        log_losses, briers: float64 (2, n): of either.
    """

    labels: np.ndarray
    first: np.ndarray
    second: np.ndarray
    log_losses: np.ndarray
    briers: np.ndarray


def unpaired(first: Figure, second: Figure) -> Difference:
    """The difference of two figures that have intervals of their own."""
    value = first.value - second.value
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return Difference(first.name, value, None, None, None, "")
    low = value - math.hypot(first.value - first.low, second.high - second.value)
    high = value + math.hypot(first.high - first.value, second.value - second.low)
    return Difference(first.name, value, low, high, None, UNPAIRED)


def paired(
    first: str, second: str, temperatures: tuple[float, float], num_classes: int, confidence: float
) -> tuple[list[Difference], McNemar]:
    """The differences of two models, example by example.

    Args:
        first, second: directories of predictions.
        temperatures: that the logits of either are divided by.

    Returns:
        Differences of accuracy, balanced accuracy, macro F1, log loss and Brier score; and who alone was right.

    Raises:
        DataError: they are not of the same examples, or damaged.
    """
    pairs = _read(first, second, temperatures)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    counts = mcnemar(pairs.first == pairs.labels, pairs.second == pairs.labels)
    num = len(pairs.labels)
    low, high = accuracy_interval(counts.only_first, counts.only_second, num, confidence)
    value = (counts.only_first - counts.only_second) / num
    found = [Difference("accuracy", value, low, high, counts.p_value, _PAIRED_SHARE)]
    found += _bootstrapped(pairs, num_classes, confidence)
    for name, (one, other) in (("log_loss", pairs.log_losses), ("brier_score", pairs.briers)):
        each = one - other
        mean = float(each.mean())
        if not _varies(each):
            found.append(Difference(name, mean, None, None, None if each.any() else 1.0, _PAIRED_MEAN))
            continue
        error = float(each.std(ddof=1)) / math.sqrt(num)
        p_value = math.erfc(abs(mean) / error / math.sqrt(2))
        found.append(Difference(name, mean, mean - z * error, mean + z * error, p_value, _PAIRED_MEAN))
    return found, counts


def _varies(values: np.ndarray) -> bool:
    """Whether they differ by more than rounding."""
    return float(np.ptp(values)) > _ROUNDING * max(1.0, float(np.abs(values).max()))


def accuracy_interval(only_first: int, only_second: int, num: int, confidence: float) -> tuple[float, float]:
    """The interval of the difference of two accuracies on the same `num` examples, by who alone was right."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (only_first - only_second) / (num + 2)
    variance = (only_first + only_second + 1) / (num + 2) - centre**2
    half_width = z * math.sqrt(variance / (num + 2))
    return centre - half_width, centre + half_width


def _read(first: str, second: str, temperatures: tuple[float, float]) -> _Pairs:
    columns: list[tuple[float, ...]] = []
    one, other = (_examples(uri, temperature) for uri, temperature in zip((first, second), temperatures, strict=True))
    for a, b in itertools.zip_longest(one, other):
        if a is None or b is None or a[:2] != b[:2]:
            raise DataError(
                f"The predictions in {first} and {second} are not of the same examples. Were they changed? "
                "Evaluate both again with --predictions."
            )
        columns.append((a[1], a[2], b[2], a[3], b[3], a[4], b[4]))
    labels, predicted, others, *rest = (np.array(column) for column in zip(*columns, strict=True))
    return _Pairs(labels, predicted, others, np.stack(rest[:2]), np.stack(rest[2:]))


def _examples(uri: str, temperature: float) -> Iterator[tuple[str, int, int, float, float]]:
    """Yield path, label, predicted label, log loss and Brier score of every example."""
    for found in read_predictions(uri):
        rows = np.arange(len(found))
        probabilities = softmax(found.logits, temperature).astype(np.float64)
        of_truth = probabilities[rows, found.labels]
        log_losses = -np.log(np.maximum(of_truth, np.finfo(np.float64).tiny))
        briers = (probabilities**2).sum(axis=1) - 2 * of_truth + 1
        columns = (found.labels, found.predicted, log_losses, briers)
        yield from zip(found.paths, *(column.tolist() for column in columns), strict=True)


def _bootstrapped(pairs: _Pairs, num_classes: int, confidence: float) -> list[Difference]:
    """Balanced accuracy and macro F1, from replicates of what was seen together: (truth, first, second)."""
    cells, counts = np.unique(np.stack([pairs.labels, pairs.first, pairs.second]), axis=1, return_counts=True)
    labels, predicted = cells[0], cells[1:]

    def figures(weights: np.ndarray) -> np.ndarray:
        support = np.bincount(labels, weights, num_classes)
        both = []
        for of in predicted:
            hits = np.bincount(labels, weights * (of == labels), num_classes)
            taken = np.bincount(of, weights, num_classes)
            recall = hits / np.maximum(support, 1)
            f1 = 2 * hits / np.maximum(support + taken, 1)
            both.append((recall.sum() / (support > 0).sum(), f1.sum() / (support + taken > 0).sum()))
        return np.subtract(both[0], both[1])

    random = np.random.default_rng(0)
    num = int(counts.sum())
    replicates = np.array([figures(random.multinomial(num, counts / num)) for _ in range(_NUM_REPLICATES)])
    tail = (1 - confidence) / 2
    bounds = np.quantile(replicates, [tail, 1 - tail], axis=0).T
    values = figures(counts)
    method = _PAIRED_BOOTSTRAP.format(_NUM_REPLICATES)
    found = []
    for index, name in enumerate(("balanced_accuracy", "macro_f1")):
        low, high = bounds[index].tolist() if _varies(replicates[:, index]) else (None, None)
        found.append(Difference(name, float(values[index]), low, high, None, method))
    return found
