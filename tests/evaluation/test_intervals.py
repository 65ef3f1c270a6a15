"""Wilson intervals: laws, edges, and exact coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyeyes.evaluation.intervals import Interval, wilson_interval

hits_and_trials = st.integers(1, 100_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
confidences = st.floats(0.5, 0.999)


@given(hits_and_trials, confidences)
def test_the_interval_contains_the_estimate_and_stays_within_0_and_1(counts, confidence):
    num_hits, num_trials = counts
    interval = wilson_interval(num_hits, num_trials, confidence)
    assert 0.0 <= interval.low <= num_hits / num_trials <= interval.high <= 1.0
    assert interval.low < interval.high


@given(hits_and_trials, confidences, st.integers(2, 10))
def test_the_interval_shrinks_with_more_trials_of_the_same_share(counts, confidence, factor):
    num_hits, num_trials = counts
    wide = wilson_interval(num_hits, num_trials, confidence)
    narrow = wilson_interval(num_hits * factor, num_trials * factor, confidence)
    assert narrow.high - narrow.low < wide.high - wide.low


@given(hits_and_trials, confidences)
def test_more_confidence_needs_a_wider_interval(counts, confidence):
    narrow = wilson_interval(*counts, confidence / 2)
    wide = wilson_interval(*counts, confidence)
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


@given(hits_and_trials, confidences)
def test_hits_and_misses_mirror_each_other(counts, confidence):
    num_hits, num_trials = counts
    hits = wilson_interval(num_hits, num_trials, confidence)
    misses = wilson_interval(num_trials - num_hits, num_trials, confidence)
    assert hits.low == pytest.approx(1 - misses.high, abs=1e-12)
    assert hits.high == pytest.approx(1 - misses.low, abs=1e-12)


def test_the_bounds_are_the_roots_of_the_score_equation():
    # |share - p| = z * sqrt(p (1 - p) / n) at both bounds; 1.959964 is the 97.5 % quantile of the normal distribution.
    interval = wilson_interval(81, 263)
    for bound in (interval.low, interval.high):
        assert abs(81 / 263 - bound) == pytest.approx(1.959963985 * math.sqrt(bound * (1 - bound) / 263), rel=1e-8)


def test_no_trials_say_nothing_and_all_or_no_hits_touch_the_edge():
    assert wilson_interval(0, 0) == Interval(0.0, 1.0)
    none, all_of_them = wilson_interval(0, 10), wilson_interval(10, 10)
    assert none.low == 0.0
    assert none.high == pytest.approx(0.2775, abs=1e-4)
    assert all_of_them == Interval(pytest.approx(1 - none.high), 1.0)


@pytest.mark.parametrize(("num_hits", "num_trials"), [(-1, 3), (4, 3), (0, -1)])
def test_impossible_counts_are_refused(num_hits, num_trials):
    with pytest.raises(ValueError, match="num_hits"):
        wilson_interval(num_hits, num_trials)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, math.nan])
def test_impossible_confidences_are_refused(confidence):
    with pytest.raises(ValueError, match="confidence"):
        wilson_interval(1, 2, confidence)


@pytest.mark.parametrize("num_trials", [20, 100, 500])
def test_the_interval_covers_the_true_share_as_often_as_it_claims(num_trials):
    intervals = [wilson_interval(num_hits, num_trials) for num_hits in range(num_trials + 1)]
    log_choose = np.array(
        [
            math.lgamma(num_trials + 1) - math.lgamma(k + 1) - math.lgamma(num_trials - k + 1)
            for k in range(num_trials + 1)
        ]
    )
    counts = np.arange(num_trials + 1)
    coverage = []
    for share in np.linspace(0.005, 0.995, 397):
        chances = np.exp(log_choose + counts * np.log(share) + (num_trials - counts) * np.log1p(-share))
        assert chances.sum() == pytest.approx(1.0)
        coverage.append(sum(chances[k] for k, bounds in enumerate(intervals) if bounds.low <= share <= bounds.high))
    assert 0.945 <= np.mean(coverage) <= 0.965
    assert min(coverage) > 0.83
