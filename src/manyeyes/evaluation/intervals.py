"""How far measured figures may be from the true ones: Wilson, normal and bootstrap intervals, all from sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from statistics import NormalDist

import numpy as np

from manyeyes.evaluation.ranking import Deviation
from manyeyes.evaluation.sums import UNITS, ProbabilitySums
from manyeyes.intervals import Interval, wilson_interval

__all__ = [
    "Interval",
    "bounded_interval",
    "confusion_intervals",
    "ece_interval",
    "level_text",
    "mean_interval",
    "symmetric_interval",
    "wilson_interval",
]

# Every bootstrap draws by this seed, so that equal sums have equal intervals.
BOOTSTRAP_SEED = 0
NUM_REPLICATES = 1000
# With very many cells fewer replicates are drawn, so that an interval takes seconds at most.
_MIN_REPLICATES = 200
_MAX_DRAWS = 20_000_000
_GAP_FACTORS = np.linspace(0, 3, 151)
_DRAWS_AT_ONCE = 2_000_000

# From draws (replicates, cells) to figures (figures, replicates).
Statistics = Callable[[np.ndarray], np.ndarray]


def level_text(confidence: float) -> str:
    """A confidence for people: 0.95 is "95%", 0.999 is "99.9%"."""
    return f"{100 * confidence:.6g}%"


def mean_interval(total_units: int, square_units: int, num: int, confidence: float) -> Interval | None:
    """The normal interval of a mean of values >= 0, from their sum and the sum of their squares in units of 2**-40.

    None where there are fewer than two values, or all are equal.
    """
    if num < 2:
        return None
    # In integers: the difference of large numbers is exact.
    scaled = num * square_units * UNITS - total_units**2
    if scaled <= 0:
        return None
    mean = total_units / UNITS / num
    deviation = math.sqrt(scaled / (num * (num - 1))) / UNITS / math.sqrt(num)
    found = symmetric_interval(mean, deviation, confidence)
    return found and Interval(max(0.0, found.low), found.high)


def symmetric_interval(value: float, deviation: float, confidence: float) -> Interval | None:
    """The normal interval of a figure with this standard deviation; None where that is 0."""
    half_width = _quantile(confidence) * deviation
    return Interval(value - half_width, value + half_width) if half_width > 0 else None


def bounded_interval(value: float | None, deviation: Deviation | None, confidence: float) -> Interval | None:
    """The interval of a figure in (0, 1) by Student's t on the scale of its log-odds.

    None where nothing is known of its deviation, or it is at a bound, or does not move at all.
    """
    if value is None or deviation is None or not 0.0 < value < 1.0:
        return None
    center = math.log(value / (1 - value))
    half_width = _t_quantile(confidence, deviation.degrees) * deviation.value / (value * (1 - value))
    return Interval(_logistic(center - half_width), _logistic(center + half_width))


def confusion_intervals(matrix: np.ndarray, confidence: float) -> dict[str, Interval | None]:
    """Bootstrap intervals of what depends on the confusion matrix: examples are drawn anew from its cells.

    Args:
        matrix: int64 (num_classes, num_classes), true labels by predicted labels; not empty.

    Returns:
        balanced_accuracy, macro_precision, macro_recall, macro_f1, weighted_f1 and mcc; None where no draw differs from
        another, as without mistakes.
    """
    rows, columns = np.nonzero(matrix)
    num_classes, num_examples = len(matrix), int(matrix.sum())
    diagonal = np.flatnonzero(rows == columns)
    by_column = np.argsort(columns, kind="stable")
    row_starts = np.flatnonzero(np.diff(rows, prepend=-1))
    column_starts = np.flatnonzero(np.diff(columns[by_column], prepend=-1))
    row_labels, column_labels = rows[row_starts], columns[by_column][column_starts]
    num_seen = len(np.union1d(row_labels, column_labels))

    def statistics(draws: np.ndarray) -> np.ndarray:
        hits, support, predicted = (np.zeros((len(draws), num_classes)) for _ in range(3))
        hits[:, rows[diagonal]] = draws[:, diagonal]
        support[:, row_labels] = np.add.reduceat(draws, row_starts, axis=1)
        predicted[:, column_labels] = np.add.reduceat(draws[:, by_column], column_starts, axis=1)
        f1 = 2 * hits / np.maximum(support + predicted, 1)
        recall = _mean_share(hits, support)
        return np.stack(
            [
                recall,
                _mean_share(hits, predicted) * len(column_labels) / num_seen,
                recall * len(row_labels) / num_seen,
                _mean_share(2 * hits, support + predicted),
                (f1 * support).sum(axis=1) / num_examples,
                _mcc(hits.sum(axis=1), support, predicted, num_examples),
            ]
        )

    names = ("balanced_accuracy", "macro_precision", "macro_recall", "macro_f1", "weighted_f1", "mcc")
    found = _bootstrap(matrix[rows, columns], statistics, confidence)
    return dict(zip(names, found, strict=True))


def ece_interval(sums: ProbabilitySums, confidence: float) -> Interval:
    """The interval of the expected calibration error, the mean of |gap| over bins.

    Chance moves gaps away from 0 in both directions, and all of that adds to the measured error: it is too large, by
    0.05 with 200 examples, and resampling would add as much again. So the interval holds the true errors for which the
    measured one is no surprise: all gaps are scaled by a common factor, the noise of a bootstrap is added, and a factor
    is kept if the measured error lies between the quantiles. It may lie wholly below the measured error.
    """
    counts = np.array(sums.bin_counts)
    cells = np.flatnonzero(counts)
    # Examples keep the mean confidence of their cell, which is a bin and whether they are right.
    confidences = np.array([sums.bin_confidence_units[cell] / UNITS for cell in cells]) / counts[cells]
    of_cells, bins = cells % 2 - confidences, cells // 2
    starts = np.flatnonzero(np.diff(bins, prepend=-1))

    def gaps_of(draws: np.ndarray) -> np.ndarray:
        return np.add.reduceat(draws * of_cells, starts, axis=1) / counts.sum()

    gaps = gaps_of(counts[cells][None])[0]
    noise = np.concatenate([gaps_of(draws) for draws in _draws(counts[cells])]) - gaps
    measured = float(np.abs(gaps).sum())
    tail = (1 - confidence) / 2
    kept = []
    for factor in _GAP_FACTORS:
        low, high = np.quantile(np.abs(factor * gaps + noise).sum(axis=1), [tail, 1 - tail])
        if low <= measured <= high:
            kept.append(float(factor) * measured)
    return Interval(min(kept, default=0.0), min(1.0, max(kept, default=measured)))


def _bootstrap(counts: np.ndarray, statistics: Statistics, confidence: float) -> list[Interval | None]:
    """Percentile intervals of figures of counts, when as many examples are drawn from the cells again and again."""
    replicates = np.concatenate([statistics(draws) for draws in _draws(counts)], axis=1)
    tail = (1 - confidence) / 2
    bounds = np.quantile(replicates, [tail, 1 - tail], axis=1).T
    return [
        Interval(float(low), float(high)) if np.ptp(values) > 0 else None
        for (low, high), values in zip(bounds, replicates, strict=True)
    ]


def _draws(counts: np.ndarray) -> Iterator[np.ndarray]:
    num_examples = int(counts.sum())
    random = np.random.default_rng(BOOTSTRAP_SEED)
    left = max(_MIN_REPLICATES, min(NUM_REPLICATES, _MAX_DRAWS // len(counts)))
    while left:
        now = min(left, max(1, _DRAWS_AT_ONCE // len(counts)))
        yield random.multinomial(num_examples, counts / num_examples, size=now)
        left -= now


def _mean_share(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    # A class that has by chance no example in a draw is left out of it: as 0 it would pull all draws down.
    shares = parts / np.maximum(wholes, 1)
    return shares.sum(axis=1) / np.maximum((wholes > 0).sum(axis=1), 1)


def _mcc(num_hits: np.ndarray, support: np.ndarray, predicted: np.ndarray, num_examples: int) -> np.ndarray:
    covariance = num_hits * num_examples - (support * predicted).sum(axis=1)
    square = float(num_examples) ** 2
    spread = (square - (support**2).sum(axis=1)) * (square - (predicted**2).sum(axis=1))
    return np.divide(covariance, np.sqrt(spread), out=np.zeros(len(num_hits)), where=spread > 0)


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _t_quantile(confidence: float, degrees: float) -> float:
    # By Fisher's expansion, within 2 % from 5 degrees of freedom on: scipy is no part of what evaluates bundles.
    z, n = _quantile(confidence), max(degrees, 5.0)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / n + second / n**2 + third / n**3


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > 0 else math.exp(value) / (1 + math.exp(value))
