"""Metrics of classification from sums that merge: any sharding and any order of merging gives the same numbers."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manyeyes.errors import DataError
from manyeyes.evaluation.intervals import Interval, wilson_interval

# Top-k is counted for k = 1 … MAX_TOP_K.
MAX_TOP_K = 5
# Log losses are summed as integers of this unit (1e-12): integer sums, unlike float sums, don't depend on their order.
_LOG_LOSS_UNITS = 1 << 40


@dataclass(frozen=True, eq=False)
class ClassificationSums:
    """What is added up over examples. `+` is exact, associative and commutative.

    Attributes:
        confusion_matrix: int64 (num_classes, num_classes): examples by true label (row) and predicted label (column).
        top_k_hits: int64 (MAX_TOP_K,): examples whose true label is among the k largest logits, for k = 1, 2, ….
        log_loss_units: sum of the log losses (natural logarithm) in units of 2**-40.
    """

    confusion_matrix: np.ndarray
    top_k_hits: np.ndarray
    log_loss_units: int

    @classmethod
    def zero(cls, num_classes: int) -> ClassificationSums:
        """The sums over no examples."""
        return cls(np.zeros((num_classes, num_classes), np.int64), np.zeros(MAX_TOP_K, np.int64), 0)

    @classmethod
    def from_logits(cls, logits: np.ndarray, labels: np.ndarray) -> ClassificationSums:
        """The sums over a batch. Of equal logits the lower label comes first.

        Args:
            logits: float (n, num_classes), finite.
            labels: int (n,), in [0, num_classes).

        Raises:
            ValueError: shapes that don't fit, a label out of range, or a logit that is not finite.
        """
        if logits.ndim != 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"logits {logits.shape} and labels {labels.shape} don't fit. Expected (n, classes) and (n,)."
            )
        num_examples, num_classes = logits.shape
        if num_examples == 0:
            return cls.zero(num_classes)
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels are in [{labels.min()}, {labels.max()}], expected [0, {num_classes - 1}].")
        if not np.isfinite(logits).all():
            num_bad = int((~np.isfinite(logits)).any(axis=1).sum())
            raise ValueError(f"{num_bad} of {num_examples} examples have logits that are NaN or infinite.")
        exact = logits.astype(np.float64)
        rows = np.arange(num_examples)
        of_truth = exact[rows, labels][:, None]
        before = (exact > of_truth) | ((exact == of_truth) & (np.arange(num_classes) < labels[:, None]))
        ranks = before.sum(axis=1)
        top_k_hits = np.array([(ranks < k).sum() for k in range(1, MAX_TOP_K + 1)], np.int64)
        largest = exact.max(axis=1, keepdims=True)
        log_losses = np.log(np.exp(exact - largest).sum(axis=1)) + (largest - of_truth)[:, 0]
        # As Python integers: a sum of huge losses may exceed 64 bits.
        units = sum(int(loss) for loss in np.rint(log_losses * _LOG_LOSS_UNITS))
        cells = np.asarray(labels, np.int64) * num_classes + exact.argmax(axis=1)
        confusion = np.bincount(cells, minlength=num_classes * num_classes).astype(np.int64)
        return cls(confusion.reshape(num_classes, num_classes), top_k_hits, units)

    def __add__(self, other: ClassificationSums) -> ClassificationSums:
        if self.num_classes != other.num_classes:
            raise ValueError(f"Sums over {self.num_classes} and over {other.num_classes} classes can't be added.")
        return ClassificationSums(
            self.confusion_matrix + other.confusion_matrix,
            self.top_k_hits + other.top_k_hits,
            self.log_loss_units + other.log_loss_units,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClassificationSums) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

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

    @property
    def log_loss(self) -> float:
        """The mean log loss, natural logarithm."""
        return self.log_loss_units / _LOG_LOSS_UNITS / self.num_examples

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; the matrix as base64 of little-endian int64, which stays small with many classes."""
        return {
            "num_classes": self.num_classes,
            "confusion_matrix": base64.b64encode(self.confusion_matrix.astype("<i8").tobytes()).decode(),
            "top_k_hits": self.top_k_hits.tolist(),
            "log_loss_units": self.log_loss_units,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ClassificationSums:
        """The inverse of `to_dict`."""
        num_classes = values["num_classes"]
        matrix = np.frombuffer(base64.b64decode(values["confusion_matrix"]), "<i8").astype(np.int64)
        return cls(
            matrix.reshape(num_classes, num_classes), np.array(values["top_k_hits"], np.int64), values["log_loss_units"]
        )


@dataclass(frozen=True)
class ClassMetrics:
    """One class against all others.

    Attributes:
        support: examples of this class.
        num_predicted: examples that were taken for this class.
        precision: share of those taken for it that are of it; None where none was taken for it.
        recall: share of its examples that were found; None where it has no examples.
        f1: harmonic mean of both; None where there is neither an example nor a prediction.
        precision_interval, recall_interval: Wilson intervals; [0, 1] where the value is None.
    """

    label: int
    class_name: str
    support: int
    num_predicted: int
    precision: float | None
    recall: float | None
    f1: float | None
    precision_interval: Interval
    recall_interval: Interval


@dataclass(frozen=True)
class Averages:
    """Precision, recall and F1, averaged over classes."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Summary:
    """All metrics. A class value of None counts as 0 in the averages (scikit-learn's zero_division=0).

    Attributes:
        num_examples: that were evaluated.
        confidence: of all intervals.
        top_k_accuracy: share of examples whose class is among the k likeliest, by k as text ("1", …); k < num_classes.
        balanced_accuracy: mean recall over the classes that have examples.
        log_loss: mean negative natural logarithm of the probability of the true class.
        macro: mean over all classes.
        micro: over all examples; equal to the accuracy, as every example has one class.
        weighted: mean over classes, weighted by support.
        num_classes_without_support, num_classes_never_predicted: how many class values are None, and why.
        per_class: by label.
        confusion_matrix: rows are true labels, columns predicted labels.
    """

    num_examples: int
    confidence: float
    accuracy: float
    accuracy_interval: Interval
    top_k_accuracy: dict[str, float]
    balanced_accuracy: float
    log_loss: float
    macro: Averages
    micro: Averages
    weighted: Averages
    num_classes_without_support: int
    num_classes_never_predicted: int
    per_class: tuple[ClassMetrics, ...]
    confusion_matrix: tuple[tuple[int, ...], ...]


def summarize(sums: ClassificationSums, class_names: Sequence[str], confidence: float = 0.95) -> Summary:
    """Compute all metrics from sums.

    Raises:
        DataError: there are no examples, or the number of class names is not that of the sums.
    """
    if len(class_names) != sums.num_classes:
        raise DataError(f"{len(class_names)} class names for sums over {sums.num_classes} classes.")
    num_examples = sums.num_examples
    if num_examples == 0:
        raise DataError("There are no examples to evaluate.")
    matrix = sums.confusion_matrix
    hits, support, predicted = np.diag(matrix), sums.support, matrix.sum(axis=0)
    precision, recall = _share(hits, predicted), _share(hits, support)
    f1 = _share(2 * hits, support + predicted)
    num_hits = int(hits.sum())
    accuracy = num_hits / num_examples

    def averages(weights: np.ndarray) -> Averages:
        values = (float(np.average(np.nan_to_num(value), weights=weights)) for value in (precision, recall, f1))
        return Averages(*values)

    per_class = tuple(
        ClassMetrics(
            label=label,
            class_name=class_name,
            support=int(support[label]),
            num_predicted=int(predicted[label]),
            precision=_none_if_nan(precision[label]),
            recall=_none_if_nan(recall[label]),
            f1=_none_if_nan(f1[label]),
            precision_interval=wilson_interval(int(hits[label]), int(predicted[label]), confidence),
            recall_interval=wilson_interval(int(hits[label]), int(support[label]), confidence),
        )
        for label, class_name in enumerate(class_names)
    )
    largest_k = max(1, min(MAX_TOP_K, sums.num_classes - 1))
    return Summary(
        num_examples=num_examples,
        confidence=confidence,
        accuracy=accuracy,
        accuracy_interval=wilson_interval(num_hits, num_examples, confidence),
        top_k_accuracy={str(k): int(sums.top_k_hits[k - 1]) / num_examples for k in range(1, largest_k + 1)},
        balanced_accuracy=float(recall[support > 0].mean()),
        log_loss=sums.log_loss,
        macro=averages(np.ones(sums.num_classes)),
        micro=Averages(accuracy, accuracy, accuracy),
        weighted=averages(support),
        num_classes_without_support=int((support == 0).sum()),
        num_classes_never_predicted=int((predicted == 0).sum()),
        per_class=per_class,
        confusion_matrix=tuple(tuple(row) for row in matrix.tolist()),
    )


def _share(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """parts / wholes in float64; NaN where the whole is 0."""
    return np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0)


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
