"""Wilson score intervals: how far a measured proportion may be from the true one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist


@dataclass(frozen=True)
class Interval:
    """The bounds of a proportion, both in [0, 1]."""

    low: float
    high: float


def wilson_interval(num_hits: int, num_trials: int, confidence: float = 0.95) -> Interval:
    """The Wilson score interval of a proportion; it holds for few trials and near 0 and 1, where others fail.

    Args:
        num_hits: in [0, num_trials].
        num_trials: 0 gives [0, 1]: nothing is known.
        confidence: how often the interval contains the true proportion; above 0 and below 1.

    Raises:
        ValueError: an argument out of its range.
    """
    if not 0 <= num_hits <= num_trials:
        raise ValueError(f"num_hits={num_hits} is not between 0 and num_trials={num_trials}.")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence} is not between 0 and 1, e.g. 0.95.")
    if num_trials == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = num_hits / num_trials
    scale = 1 / (1 + z * z / num_trials)
    center = scale * (share + z * z / (2 * num_trials))
    half_width = scale * z * math.sqrt(share * (1 - share) / num_trials + (z / (2 * num_trials)) ** 2)
    # With no or only hits one bound is the estimate itself, which rounding would miss.
    low = 0.0 if num_hits == 0 else max(0.0, min(center - half_width, share))
    high = 1.0 if num_hits == num_trials else min(1.0, max(center + half_width, share))
    return Interval(low, high)
