"""What an evaluation adds up over examples: integers only, so that no order of adding changes anything."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from manyeyes.evaluation.ranking import NUM_SCORE_BINS, ScoreSample, score_bins

# Top-k is counted for k = 1 … MAX_TOP_K.
MAX_TOP_K = 5
# Bins of equal width over the probability of the predicted class.
NUM_CALIBRATION_BINS = 15
_CALIBRATION_EDGES = np.linspace(0.0, 1.0, NUM_CALIBRATION_BINS + 1)
# Real numbers are summed as integers of this unit (1e-12): unlike sums of floats these don't depend on their order.
UNITS = 1 << 40
# Logits that are looked at at once, so that memory does not grow with the number of examples and caches are large
# enough; with many classes more, as counts of all their bins are made each time.
_CHUNK_VALUES = 1 << 16


@dataclass(frozen=True)
class ProbabilitySums:
    """Sums over probabilities; those of real numbers in units of 2**-40.

    Attributes:
        log_loss_units, log_loss_square_units: of the log losses (natural logarithm) and of their squares.
        brier_units, brier_square_units: of the Brier scores (squared distance of the probabilities from the truth,
            summed over classes) and of their squares.
        bin_counts: examples by 2 * bin + (1 where the prediction is right), (2 * NUM_CALIBRATION_BINS,).
        bin_confidence_units: sums of the probability of the predicted class, in the same order.
    """

    log_loss_units: int
    log_loss_square_units: int
    brier_units: int
    brier_square_units: int
    bin_counts: tuple[int, ...]
    bin_confidence_units: tuple[int, ...]

    @classmethod
    def zero(cls) -> ProbabilitySums:
        """The sums over no examples."""
        empty = (0,) * (2 * NUM_CALIBRATION_BINS)
        return cls(0, 0, 0, 0, empty, empty)

    @classmethod
    def _of(cls, softmax: _Softmax, labels: np.ndarray, predicted: np.ndarray) -> ProbabilitySums:
        rows = np.arange(len(labels))
        total = softmax.totals
        log_losses = np.log(total) - softmax.shifted[rows, labels]
        of_truth = softmax.exponentials[rows, labels] / total
        squares = np.einsum("ij,ij->i", softmax.exponentials, softmax.exponentials) / total**2
        brier = squares - 2 * of_truth + 1
        confidences = 1 / total
        bins = np.searchsorted(_CALIBRATION_EDGES[1:-1], confidences)
        cells = 2 * bins + (predicted == labels)
        confidence_units = np.zeros(2 * NUM_CALIBRATION_BINS, np.int64)
        np.add.at(confidence_units, cells, np.rint(confidences * UNITS).astype(np.int64))
        return cls(
            _sum_of_units(log_losses),
            _sum_of_units(log_losses**2),
            _sum_of_units(brier),
            _sum_of_units(brier**2),
            tuple(np.bincount(cells, minlength=2 * NUM_CALIBRATION_BINS).tolist()),
            tuple(confidence_units.tolist()),
        )

    def __add__(self, other: ProbabilitySums) -> ProbabilitySums:
        return ProbabilitySums(
            self.log_loss_units + other.log_loss_units,
            self.log_loss_square_units + other.log_loss_square_units,
            self.brier_units + other.brier_units,
            self.brier_square_units + other.brier_square_units,
            tuple(map(int.__add__, self.bin_counts, other.bin_counts)),
            tuple(map(int.__add__, self.bin_confidence_units, other.bin_confidence_units)),
        )


@dataclass(frozen=True, eq=False)
class ClassificationSums:
    """What is added up over examples. `+` is exact, associative and commutative.

    Attributes:
        temperature: logits were divided by it.
        threshold: a prediction of a lower probability counts as not given; None: all are given.
        given_counts: predictions that are given, [wrong, right].
        confusion_matrix: int64 (num_classes, num_classes): examples by true label (row) and predicted label (column).
        top_k_hits: int64 (MAX_TOP_K,): examples whose true label is among the k largest logits, for k = 1, 2, ….
        score_counts: int64 (2, num_classes, NUM_SCORE_BINS): examples [of other classes, of the class] by class and bin
            of its score (see ranking).
        probabilities: sums over probabilities.
        uncalibrated: the same without division by the temperature; None where that is 1.
        sample: scores of some of the examples that have an index.
    """

    temperature: float
    threshold: float | None
    given_counts: tuple[int, int]
    confusion_matrix: np.ndarray
    top_k_hits: np.ndarray
    score_counts: np.ndarray
    probabilities: ProbabilitySums
    uncalibrated: ProbabilitySums | None
    sample: ScoreSample

    @classmethod
    def zero(cls, num_classes: int, temperature: float = 1.0, threshold: float | None = None) -> ClassificationSums:
        """The sums over no examples."""
        return cls(
            temperature,
            threshold,
            (0, 0),
            np.zeros((num_classes, num_classes), np.int64),
            np.zeros(MAX_TOP_K, np.int64),
            np.zeros((2, num_classes, NUM_SCORE_BINS), np.int64),
            ProbabilitySums.zero(),
            None if temperature == 1.0 else ProbabilitySums.zero(),
            ScoreSample.zero(num_classes),
        )

    @classmethod
    def from_logits(
        cls,
        logits: np.ndarray,
        labels: np.ndarray,
        *,
        temperature: float = 1.0,
        threshold: float | None = None,
        example_indices: np.ndarray | None = None,
    ) -> ClassificationSums:
        """The sums over some examples. Of equal logits the lower label comes first.

        Args:
            logits: float (n, num_classes), finite.
            labels: int (n,), in [0, num_classes).
            temperature: logits are divided by it; above 0.
            threshold: see the class.
            example_indices: int (n,), another for every example of the evaluation. With them the intervals of ROC AUC
                and average precision can be estimated.

        Raises:
            ValueError: shapes that don't fit, a label out of range, or a logit that is not finite.
        """
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"logits {logits.shape} and labels {labels.shape} don't fit. Expected (n, classes) and (n,)."
            )
        num_examples, num_classes = logits.shape
        sums = cls.zero(num_classes, temperature, threshold)
        if num_examples == 0:
            return sums
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels are in [{labels.min()}, {labels.max()}], expected [0, {num_classes - 1}].")
        if not np.isfinite(logits).all():
            num_bad = int((~np.isfinite(logits)).any(axis=1).sum())
            raise ValueError(f"{num_bad} of {num_examples} examples have logits that are NaN or infinite.")
        # The arrays of `sums` are new and nobody else's, so they are added to in place.
        probabilities, uncalibrated, sample = sums.probabilities, sums.uncalibrated, sums.sample
        given_counts = np.zeros(2, np.int64)
        rows_at_once = max(NUM_SCORE_BINS // 2, _CHUNK_VALUES // num_classes)
        for start in range(0, num_examples, rows_at_once):
            here = slice(start, start + rows_at_once)
            exact, truth = logits[here].astype(np.float64), np.asarray(labels[here], np.int64)
            predicted = exact.argmax(axis=1)
            np.add.at(sums.confusion_matrix, (truth, predicted), 1)
            sums.top_k_hits[:] += _top_k_hits(exact, truth)
            softmax = _Softmax.of(exact / temperature)
            probabilities += ProbabilitySums._of(softmax, truth, predicted)
            given = slice(None) if threshold is None else 1 / softmax.totals >= threshold
            given_counts += np.bincount((predicted == truth)[given], minlength=2)
            if uncalibrated is not None:
                uncalibrated += ProbabilitySums._of(_Softmax.of(exact), truth, predicted)
            bins = score_bins(softmax.exponentials, softmax.shifted)
            _count_scores(sums.score_counts, bins, truth)
            if example_indices is not None:
                sample += ScoreSample.of(example_indices[here], truth, bins)
        return cls(
            temperature,
            threshold,
            (int(given_counts[0]), int(given_counts[1])),
            sums.confusion_matrix,
            sums.top_k_hits,
            sums.score_counts,
            probabilities,
            uncalibrated,
            sample,
        )

    def __add__(self, other: ClassificationSums) -> ClassificationSums:
        if self.num_classes != other.num_classes:
            raise ValueError(f"Sums over {self.num_classes} and over {other.num_classes} classes can't be added.")
        if (self.temperature, self.threshold) != (other.temperature, other.threshold):
            raise ValueError(
                f"Sums at temperatures {self.temperature} and {other.temperature}, thresholds {self.threshold} and "
                f"{other.threshold} can't be added."
            )
        return ClassificationSums(
            self.temperature,
            self.threshold,
            (self.given_counts[0] + other.given_counts[0], self.given_counts[1] + other.given_counts[1]),
            self.confusion_matrix + other.confusion_matrix,
            self.top_k_hits + other.top_k_hits,
            self.score_counts + other.score_counts,
            self.probabilities + other.probabilities,
            self.uncalibrated + other.uncalibrated if self.uncalibrated and other.uncalibrated else None,
            self.sample + other.sample,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassificationSums) and all(
            _equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)
        )

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Callable[..., ClassificationSums], tuple[Any, ...]]:
        # Of a task's counts most are 0 where there are many classes, and all of them travel to the driver.
        return _unpacked, tuple(_pack(getattr(self, field.name)) for field in fields(self))

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.confusion_matrix)

    @property
    def num_examples(self) -> int:
        """The number of examples that were added up."""
        return int(self.confusion_matrix.sum())

    @property
    def support(self) -> np.ndarray:
        """int64 (num_classes,): examples by true label."""
        return self.confusion_matrix.sum(axis=1)


@dataclass(frozen=True)
class _Softmax:
    """Its parts: logits whose largest is 0, their exponentials (both (n, num_classes)), and the sums of these (n,)."""

    shifted: np.ndarray
    exponentials: np.ndarray
    totals: np.ndarray

    @classmethod
    def of(cls, logits: np.ndarray) -> _Softmax:
        shifted = logits - logits.max(axis=1, keepdims=True)
        exponentials = np.exp(shifted)
        return cls(shifted, exponentials, exponentials.sum(axis=1))


def _top_k_hits(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    of_truth = logits[np.arange(len(labels)), labels][:, None]
    before = (logits > of_truth).sum(axis=1)
    tied = logits == of_truth
    ranks = before + (tied & (np.arange(logits.shape[1]) < labels[:, None])).sum(axis=1)
    return np.array([(ranks < k).sum() for k in range(1, MAX_TOP_K + 1)], np.int64)


def _count_scores(score_counts: np.ndarray, bins: np.ndarray, labels: np.ndarray) -> None:
    num_classes = bins.shape[1]
    cells = bins + np.arange(num_classes, dtype=np.int32) * NUM_SCORE_BINS
    negatives, positives = score_counts.reshape(2, -1)
    negatives += np.bincount(cells.reshape(-1), minlength=num_classes * NUM_SCORE_BINS)
    of_truth = cells[np.arange(len(labels)), labels]
    np.add.at(positives, of_truth, 1)
    np.subtract.at(negatives, of_truth, 1)


def _sum_of_units(values: np.ndarray) -> int:
    units = np.rint(values * UNITS)
    if float(units.max()) * len(units) < 2**62:
        return int(units.astype(np.int64).sum())
    # As Python integers: a sum of huge losses may exceed 64 bits.
    return sum(map(int, units.tolist()))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, ScoreSample) and isinstance(other, ScoreSample):
        return all(np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return bool(np.array_equal(one, other))


@dataclass(frozen=True)
class _Sparse:
    """An array by its values that are not 0."""

    shape: tuple[int, ...]
    cells: np.ndarray
    values: np.ndarray


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.size < 2**32 and 12 * np.count_nonzero(value) < value.nbytes:
        cells = np.flatnonzero(value)
        return _Sparse(value.shape, cells.astype(np.uint32), value.reshape(-1)[cells])
    return value


def _unpacked(*values: Any) -> ClassificationSums:
    return ClassificationSums(*map(_unpack, values))


def _unpack(value: Any) -> Any:
    if not isinstance(value, _Sparse):
        return value
    array = np.zeros(value.shape, value.values.dtype)
    array.reshape(-1)[value.cells] = value.values
    return array
