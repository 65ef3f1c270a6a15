"""What the folds of a cross-validation say about a recipe, and about the difference of two.

Train sets of different folds overlap, so the figures of the folds are not independent: a plain t interval of them is
too narrow. Nadeau and Bengio (Inference for the generalization error, 2003) correct its variance by the ratio of the
sizes of test and train sets; Bouckaert and Frank (2004) found it to hold for repeated cross-validation, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Resampled:
    """A figure over folds.

    Attributes:
        mean, std: over the folds; std with n - 1, 0 for one fold.
        low, high: of the corrected resampled t interval of the mean; None where the folds say nothing about their
            spread: there is one, or all gave the same figure.
        num_folds: that were measured.
    """

    mean: float
    std: float
    low: float | None
    high: float | None
    num_folds: int


@dataclass(frozen=True)
class PairedTest:
    """How two recipes differ on the same folds.

    Attributes:
        difference: mean over the folds of first - second, with its corrected resampled t interval.
        p_value: of the corrected resampled t test that there is no difference; 1 where there is none in any fold, None
            where all folds differ by the same.
    """

    difference: Resampled
    p_value: float | None


@dataclass(frozen=True)
class McNemar:
    """Examples that one of two recipes gets right and the other does not.

    Attributes:
        only_first, only_second: the numbers of such examples.
        p_value: of the exact test that either is as likely.
    """

    only_first: int
    only_second: int
    p_value: float


def resampled(
    figures: Sequence[float],
    test_share: float,
    confidence: float = 0.95,
    bounds: tuple[float, float] = (-math.inf, math.inf),
) -> Resampled:
    """Mean, spread and interval of a figure that was measured on folds.

    Args:
        figures: one a fold, over all repeats.
        test_share: size of a fold divided by the size of the set that was trained on for it.
        confidence: of the interval; above 0 and below 1.
        bounds: least and largest value of the figure; the interval is cut there.

    Raises:
        ValueError: no figures.
    """
    values = np.asarray(figures, np.float64)
    if not len(values):
        raise ValueError("There are no figures.")
    mean = float(values.mean())
    if len(values) == 1:
        return Resampled(mean, 0.0, None, None, 1)
    std = float(values.std(ddof=1))
    if _is_noise(std, values):
        return Resampled(mean, 0.0, None, None, len(values))
    from scipy.stats import t

    half_width = float(t.ppf(0.5 + confidence / 2, len(values) - 1)) * _standard_error(std, len(values), test_share)
    low, high = max(mean - half_width, bounds[0]), min(mean + half_width, bounds[1])
    return Resampled(mean, std, low, high, len(values))


def paired_test(
    first: Sequence[float], second: Sequence[float], test_share: float, confidence: float = 0.95
) -> PairedTest:
    """Compare a figure of two recipes, measured on the same folds in the same order.

    Raises:
        ValueError: there are not equally many figures, or fewer than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"{len(first)} and {len(second)} figures can't be paired. Expected equally many, two or more.")
    difference = resampled(np.subtract(first, second).tolist(), test_share, confidence)
    if difference.std == 0:
        return PairedTest(difference, 1.0 if _is_noise(difference.mean, np.concatenate([first, second])) else None)
    from scipy.stats import t

    statistic = difference.mean / _standard_error(difference.std, len(first), test_share)
    return PairedTest(difference, 2 * float(t.sf(abs(statistic), len(first) - 1)))


def mcnemar(first_right: np.ndarray, second_right: np.ndarray) -> McNemar:
    """Compare two recipes by the examples that they get right.

    Args:
        first_right, second_right: bool (n,), of the same examples in the same order.
    """
    only_first = int((first_right & ~second_right).sum())
    only_second = int((second_right & ~first_right).sum())
    if only_first + only_second == 0:
        return McNemar(0, 0, 1.0)
    from scipy.stats import binomtest

    return McNemar(only_first, only_second, float(binomtest(only_first, only_first + only_second).pvalue))


def _is_noise(value: float, figures: np.ndarray) -> bool:
    """Whether `value` is no more than what rounding makes of such figures."""
    return abs(value) <= 1e-12 * max(1.0, float(np.abs(figures).max()))


def _standard_error(std: float, num_folds: int, test_share: float) -> float:
    return std * math.sqrt(1 / num_folds + test_share)
