"""How well each class is told from all others at any threshold: binned scores, ROC AUC and average precision.

The score of a class is the log-odds of its probability, log(p / (1 - p)). Scores are counted in bins of a fixed grid,
so that counts merge by adding. The grid is uniform in 8 asinh(score / 8): nearly uniform where probabilities are
neither close to 0 nor to 1, and wider and wider beyond, so that confident networks don't all fall into the last bin.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from manyeyes.imaging.draws import uniforms

# 0.039 wide at even odds. Measured against unbinned scores in docs/decisions/0120.
NUM_SCORE_BINS = 2048
_LINEAR_UP_TO = 8.0
# In units of the warped scale: log-odds of 594, beyond what a float64 softmax tells from certainty.
_LAST_EDGE = 40.0
# Examples whose scores are kept to estimate the uncertainty from.
SAMPLE_SIZE = 2000
_SAMPLE_STREAM = 0x5A3B
_CLASSES_AT_ONCE = 32


def score_bins(exponentials: np.ndarray, shifted: np.ndarray) -> np.ndarray:
    """The bin of every class's score.

    Args:
        exponentials: float64 (n, num_classes), exp(shifted).
        shifted: float64 (n, num_classes), logits whose largest in each row is 0.

    Returns:
        int32 (n, num_classes), in [0, NUM_SCORE_BINS).
    """
    rows, top = np.arange(len(shifted)), shifted.argmax(axis=1)
    others = exponentials.sum(axis=1, keepdims=True) - exponentials
    # For the largest the difference would lose what is small beside 1.
    without_top = exponentials.copy()
    without_top[rows, top] = 0.0
    others[rows, top] = without_top.sum(axis=1)
    with np.errstate(divide="ignore"):  # certain to the last bit: the last bin
        scores = shifted - np.log(others)
    warped = np.arcsinh(scores / _LINEAR_UP_TO) * _LINEAR_UP_TO
    bins = np.floor((warped + _LAST_EDGE) * (NUM_SCORE_BINS / (2 * _LAST_EDGE)))
    return np.clip(bins, 0, NUM_SCORE_BINS - 1).astype(np.int32)


@dataclass(frozen=True, eq=False)
class ScoreSample:
    """The scores of up to SAMPLE_SIZE examples: those whose index hashes to the smallest numbers.

    Which they are depends on nothing but the indices, so samples of parts merge into the sample of the whole.

    Attributes:
        example_indices: int64 (m,), in the order of their hashes.
        labels: int32 (m,).
        bins: uint16 (m, num_classes), see score_bins.
    """

    example_indices: np.ndarray
    labels: np.ndarray
    bins: np.ndarray

    @classmethod
    def zero(cls, num_classes: int) -> ScoreSample:
        """The sample of no examples."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros((0, num_classes), np.uint16))

    @classmethod
    def of(cls, example_indices: np.ndarray, labels: np.ndarray, bins: np.ndarray) -> ScoreSample:
        """The sample of some examples."""
        kept = np.lexsort((example_indices, uniforms(0, 0, example_indices, 1, _SAMPLE_STREAM)[:, 0]))[:SAMPLE_SIZE]
        return cls(
            np.asarray(example_indices, np.int64)[kept],
            np.asarray(labels, np.int32)[kept],
            bins[kept].astype(np.uint16),
        )

    def __add__(self, other: ScoreSample) -> ScoreSample:
        return ScoreSample.of(
            np.concatenate([self.example_indices, other.example_indices]),
            np.concatenate([self.labels, other.labels]),
            np.concatenate([self.bins, other.bins]),
        )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Deviation:
    """A standard deviation, and the degrees of freedom of its estimate: few where few examples make most of it."""

    value: float
    degrees: float


@dataclass(frozen=True)
class Ranked:
    """ROC AUC and average precision of every class, and of all.

    Attributes:
        roc_auc, average_precision: float64 (num_classes,); NaN where a class has no examples, or nothing else has.
        macro_roc_auc, macro_average_precision: their means over the other classes; None where there are none.
        macro_roc_auc_deviation, macro_average_precision_deviation: of these means, by the infinitesimal jackknife over
            the sample; None where that is too small.
    """

    roc_auc: np.ndarray
    average_precision: np.ndarray
    macro_roc_auc: float | None
    macro_average_precision: float | None
    macro_roc_auc_deviation: Deviation | None
    macro_average_precision_deviation: Deviation | None


def rank(score_counts: np.ndarray, sample: ScoreSample) -> Ranked:
    """Compute both figures of every class, one class against the rest.

    ROC AUC is that of the binned scores. In average precision the examples of a bin count as evenly mixed: what stands
    in front of its positives is half of the bin. That is closer to the value of unbinned scores than to let all of the
    bin stand in front, by which every bin would cost a little.

    Args:
        score_counts: int64 (2, num_classes, NUM_SCORE_BINS), examples [of other classes, of the class] by bin.
        sample: one example moves the figures of all classes at once, which counts of single classes don't tell.
    """
    num_classes = score_counts.shape[1]
    figures = np.empty((2, num_classes))
    moved = np.zeros((2, len(sample)))
    # In blocks of classes, so that memory does not grow with their number.
    for start in range(0, num_classes, _CLASSES_AT_ONCE):
        block = slice(start, start + _CLASSES_AT_ONCE)
        for index, (values, slopes) in enumerate(_figures(score_counts[:, block, ::-1].astype(np.float64))):
            figures[index, block] = values
            classes = np.arange(slopes.shape[1])
            is_positive = (sample.labels[:, None] == start + classes).astype(np.intp)
            moved[index] += slopes[is_positive, classes, NUM_SCORE_BINS - 1 - sample.bins[:, block]].sum(axis=1)
    num_known = int(np.isfinite(figures[0]).sum())
    num_examples = int(score_counts[:, 0].sum())
    means = [float(np.nanmean(values)) for values in figures] if num_known else [None, None]
    deviations: list[Deviation | None] = [None, None]
    if num_known and len(sample) == min(SAMPLE_SIZE, num_examples):
        deviations = [_deviation(each / num_known, num_examples) for each in moved]
    return Ranked(figures[0], figures[1], means[0], means[1], deviations[0], deviations[1])


def _deviation(moved: np.ndarray, num_examples: int) -> Deviation | None:
    squares = (moved - moved.mean()) ** 2
    variance = squares.mean()
    if not variance > 0:
        return None
    # The variance of an estimated variance is (kurtosis - 1) / n of its square; that of chi squared is 2 / degrees.
    kurtosis = (squares**2).mean() / variance**2
    degrees = 2 * len(moved) / (kurtosis - 1) if kurtosis > 1 else np.inf
    return Deviation(float(np.sqrt(num_examples * variance)), float(degrees))


def _figures(counts: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield ROC AUC and average precision with their slopes.

    Args:
        counts: float64 (2, classes, bins), from the highest score down.

    Returns:
        The figure (classes,), NaN where there is none; and its derivatives by the weight of an example [of another
        class, of the class] in a bin, (2, classes, bins), 0 where there is none.
    """
    negatives, positives = counts
    num_negatives, num_positives = counts.sum(axis=2)[:, :, None]
    known = (num_positives > 0) & (num_negatives > 0)
    num_negatives, num_positives = np.where(known, num_negatives, 1.0), np.where(known, num_positives, 1.0)

    def result(values: np.ndarray, by_false: np.ndarray, by_hit: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(known, values, np.nan)[:, 0], np.where(known, np.stack([by_false, by_hit]), 0.0)

    above = np.cumsum(positives, axis=1) - positives / 2
    false = np.cumsum(negatives, axis=1) - negatives / 2
    beaten = num_negatives - false
    pairs = num_positives * num_negatives
    auc = (positives * beaten).sum(axis=1, keepdims=True) / pairs
    yield result(auc, above / pairs - auc / num_negatives, beaten / pairs - auc / num_positives)

    hits = above + 0.5 * (positives > 0)
    taken = np.where(hits + false > 0, hits + false, 1.0)
    share, precision = positives / num_positives, hits / taken
    ap = (share * precision).sum(axis=1, keepdims=True)
    by_hit = (precision - ap) / num_positives + _from_here_down(share * false / taken**2)
    yield result(ap, -_from_here_down(share * hits / taken**2), by_hit)


def _from_here_down(values: np.ndarray) -> np.ndarray:
    # An example counts half in its own bin and whole in all bins below.
    return np.cumsum(values[:, ::-1], axis=1)[:, ::-1] - values / 2
