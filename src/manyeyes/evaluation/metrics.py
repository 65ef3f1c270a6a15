"""Metrics of classification from sums that merge: any sharding and any order of merging gives the same numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from manyeyes.errors import DataError
from manyeyes.evaluation import intervals
from manyeyes.evaluation.costs import mean_cost
from manyeyes.evaluation.intervals import Interval, wilson_interval
from manyeyes.evaluation.ranking import Ranked, rank
from manyeyes.evaluation.sums import MAX_TOP_K, NUM_CALIBRATION_BINS, UNITS, ClassificationSums, ProbabilitySums

# How each interval of a summary is made; accuracy, top-k, precision and recall have Wilson score intervals.
_CONFUSION = f"percentiles of {intervals.NUM_REPLICATES} bootstrap replicates, seed {intervals.BOOTSTRAP_SEED}"
INTERVAL_METHODS = {
    "balanced_accuracy": _CONFUSION,
    "macro_precision": _CONFUSION,
    "macro_recall": _CONFUSION,
    "macro_f1": _CONFUSION,
    "weighted_f1": _CONFUSION,
    "mcc": _CONFUSION,
    "ece": "true errors for which the measured one is no surprise (bootstrap noise); may lie wholly below it",
    "log_loss": "normal, by the sum of squares",
    "brier_score": "normal, by the sum of squares",
    "mean_cost": "normal, by the sum of squares",
    "roc_auc": "Student's t on the scale of log-odds, by the infinitesimal jackknife",
    "average_precision": "Student's t on the scale of log-odds, by the infinitesimal jackknife",
}


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
        roc_auc: chance that an example of the class gets a higher score for it than another example.
        average_precision: mean precision at the scores of its examples. Both are None where the class has no examples,
            or nothing else has, and are computed from binned scores (see ranking).
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
    roc_auc: float | None
    average_precision: float | None


@dataclass(frozen=True)
class ReliabilityBin:
    """Examples whose predicted class has a probability in (low, high].

    Attributes:
        confidence: its mean; None without examples.
        accuracy: share of them that are right; None without examples.
    """

    low: float
    high: float
    num_examples: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """How far probabilities can be believed.

    Attributes:
        temperature: that logits were divided by.
        log_loss: mean negative natural logarithm of the probability of the true class.
        brier_score: mean squared distance of the probabilities from the truth, summed over classes: in [0, 2].
        ece: expected calibration error, the mean gap between confidence and accuracy over the bins.
        bins: 15 of equal width.
    """

    temperature: float
    log_loss: float
    brier_score: float
    ece: float
    bins: tuple[ReliabilityBin, ...]


@dataclass(frozen=True)
class Abstention:
    """What is left when a model gives no answer below a threshold.

    Attributes:
        threshold: of the probability of the predicted class.
        coverage: share of the examples that get an answer.
        precision: share of the answers that are right; None without answers.
        coverage_interval, precision_interval: Wilson intervals.
    """

    threshold: float
    num_given: int
    coverage: float
    coverage_interval: Interval
    precision: float | None
    precision_interval: Interval


@dataclass(frozen=True)
class Averages:
    """Precision, recall and F1, averaged over classes."""

    precision: float
    recall: float
    f1: float


@dataclass(frozen=True)
class Summary:
    """All metrics.

    Averages of precision, recall and F1 are over the classes that have an example or a prediction, as scikit-learn's by
    default; of these a value of None counts as 0 (zero_division=0).

    Attributes:
        num_examples: that were evaluated.
        confidence: of all intervals.
        top_k_accuracy: share of examples whose class is among the k likeliest, by k as text ("1", …); k < num_classes.
        balanced_accuracy: mean recall over the classes that have examples.
        log_loss: mean negative natural logarithm of the probability of the true class.
        macro: mean over the classes that have an example or a prediction.
        micro: over all examples; equal to the accuracy, as every example has one class.
        weighted: mean over classes, weighted by support.
        num_classes_without_support, num_classes_never_predicted: how many class values are None, and why.
        per_class: by label.
        confusion_matrix: rows are true labels, columns predicted labels.
        mcc: Matthews' correlation coefficient; 0 where all examples are of one class or taken for one.
        brier_score, ece: see Calibration.
        roc_auc, average_precision: mean over the classes that have a value; None where none has.
        top_k_intervals: Wilson intervals, by k as text.
        intervals: of the other figures, by their names ("macro_f1" is macro.f1); None where the examples don't tell,
            as where there is no mistake.
        interval_methods: how each of `intervals` is made.
        calibration: with the model's temperature.
        uncalibrated: with temperature 1; None where that is the model's.
        mean_cost: of an example; None without a cost matrix.
        abstention: None where the model always answers. All other figures are over all examples.
        num_classes_left_out: of the averages, as they have neither an example nor a prediction.
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
    mcc: float
    brier_score: float
    ece: float
    roc_auc: float | None
    average_precision: float | None
    top_k_intervals: dict[str, Interval]
    intervals: dict[str, Interval | None]
    calibration: Calibration
    uncalibrated: Calibration | None = None
    mean_cost: float | None = None
    abstention: Abstention | None = None
    interval_methods: dict[str, str] = field(default_factory=lambda: dict(INTERVAL_METHODS))
    num_classes_left_out: int = 0


def summarize(
    sums: ClassificationSums, class_names: Sequence[str], confidence: float = 0.95, costs: np.ndarray | None = None
) -> Summary:
    """Compute all metrics from sums.

    Args:
        costs: float (num_classes, num_classes), of an example by true and predicted label.

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
    is_left_out = support + predicted == 0
    num_hits = int(hits.sum())
    accuracy = num_hits / num_examples
    ranked = rank(sums.score_counts, sums.sample)
    calibration = _calibration(sums.probabilities, sums.temperature)

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
            roc_auc=_none_if_nan(ranked.roc_auc[label]),
            average_precision=_none_if_nan(ranked.average_precision[label]),
        )
        for label, class_name in enumerate(class_names)
    )
    top_k_hits = {
        str(k): int(sums.top_k_hits[k - 1]) for k in range(1, max(1, min(MAX_TOP_K, sums.num_classes - 1)) + 1)
    }
    cost, cost_interval = mean_cost(matrix, costs, confidence) if costs is not None else (None, None)
    return Summary(
        num_examples=num_examples,
        confidence=confidence,
        accuracy=accuracy,
        accuracy_interval=wilson_interval(num_hits, num_examples, confidence),
        top_k_accuracy={k: num / num_examples for k, num in top_k_hits.items()},
        top_k_intervals={k: wilson_interval(num, num_examples, confidence) for k, num in top_k_hits.items()},
        balanced_accuracy=float(recall[support > 0].mean()),
        log_loss=calibration.log_loss,
        macro=averages(~is_left_out),
        micro=Averages(accuracy, accuracy, accuracy),
        weighted=averages(support),
        num_classes_without_support=int((support == 0).sum()),
        num_classes_never_predicted=int((predicted == 0).sum()),
        per_class=per_class,
        confusion_matrix=tuple(tuple(row) for row in matrix.tolist()),
        mcc=_mcc(num_hits, support.tolist(), predicted.tolist()),
        brier_score=calibration.brier_score,
        ece=calibration.ece,
        roc_auc=ranked.macro_roc_auc,
        average_precision=ranked.macro_average_precision,
        intervals=_intervals(sums, ranked, confidence) | ({} if cost is None else {"mean_cost": cost_interval}),
        calibration=calibration,
        uncalibrated=None if sums.uncalibrated is None else _calibration(sums.uncalibrated, 1.0),
        mean_cost=cost,
        abstention=_abstention(sums, confidence),
        num_classes_left_out=int(is_left_out.sum()),
    )


def _intervals(sums: ClassificationSums, ranked: Ranked, confidence: float) -> dict[str, Interval | None]:
    found, num = sums.probabilities, sums.num_examples
    return intervals.confusion_intervals(sums.confusion_matrix, confidence) | {
        "log_loss": intervals.mean_interval(found.log_loss_units, found.log_loss_square_units, num, confidence),
        "brier_score": intervals.mean_interval(found.brier_units, found.brier_square_units, num, confidence),
        "ece": intervals.ece_interval(found, confidence),
        "roc_auc": intervals.bounded_interval(ranked.macro_roc_auc, ranked.macro_roc_auc_deviation, confidence),
        "average_precision": intervals.bounded_interval(
            ranked.macro_average_precision, ranked.macro_average_precision_deviation, confidence
        ),
    }


def _calibration(sums: ProbabilitySums, temperature: float) -> Calibration:
    wrong, right = np.array(sums.bin_counts).reshape(-1, 2).T
    counts = wrong + right
    confidences = np.array([sum(pair) / UNITS for pair in zip(*[iter(sums.bin_confidence_units)] * 2, strict=True)])
    num_examples = int(counts.sum())
    means, accuracies = _share(confidences, counts), _share(right, counts)
    return Calibration(
        temperature=temperature,
        log_loss=sums.log_loss_units / UNITS / num_examples,
        brier_score=sums.brier_units / UNITS / num_examples,
        ece=float(np.abs(right - confidences).sum()) / num_examples,
        bins=tuple(
            ReliabilityBin(
                low=index / NUM_CALIBRATION_BINS,
                high=(index + 1) / NUM_CALIBRATION_BINS,
                num_examples=int(counts[index]),
                confidence=_none_if_nan(means[index]),
                accuracy=_none_if_nan(accuracies[index]),
            )
            for index in range(NUM_CALIBRATION_BINS)
        ),
    )


def _abstention(sums: ClassificationSums, confidence: float) -> Abstention | None:
    if sums.threshold is None:
        return None
    num_given, num_right = sum(sums.given_counts), sums.given_counts[1]
    return Abstention(
        threshold=sums.threshold,
        num_given=num_given,
        coverage=num_given / sums.num_examples,
        coverage_interval=wilson_interval(num_given, sums.num_examples, confidence),
        precision=num_right / num_given if num_given else None,
        precision_interval=wilson_interval(num_right, num_given, confidence),
    )


def _mcc(num_hits: int, support: list[int], predicted: list[int]) -> float:
    # In Python integers: squares of many examples exceed 64 bits, and the difference of large numbers is exact.
    num = sum(support)
    covariance = num_hits * num - sum(a * b for a, b in zip(support, predicted, strict=True))
    spread = (num**2 - sum(a * a for a in support)) * (num**2 - sum(b * b for b in predicted))
    return covariance / math.sqrt(spread) if spread else 0.0


def _share(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """parts / wholes in float64; NaN where the whole is 0."""
    return np.divide(parts, wholes, out=np.full(len(parts), np.nan), where=wholes > 0)


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
