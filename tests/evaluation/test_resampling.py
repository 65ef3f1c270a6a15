"""The corrected resampled t, against its formula and against the plain t that it corrects."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from manyeyes.evaluation.resampling import mcnemar, paired_test, resampled


def test_the_interval_is_that_of_nadeau_and_bengio() -> None:
    # By hand: mean 0.85, variance 1/2 ((-0.05)^2 + 0.05^2 + 0) = 0.0025, t(0.975, 2) = 4.302653.
    found = resampled([0.8, 0.9, 0.85], test_share=0.5)
    half_width = 4.302653 * math.sqrt((1 / 3 + 0.5) * 0.0025)
    assert found.mean == pytest.approx(0.85)
    assert found.std == pytest.approx(0.05)
    assert (found.low, found.high) == (pytest.approx(0.85 - half_width), pytest.approx(0.85 + half_width))


def test_without_overlap_it_is_the_plain_t() -> None:
    draw = np.random.default_rng(0)
    first, second = draw.normal(0.8, 0.05, 10), draw.normal(0.78, 0.05, 10)
    plain = stats.t.interval(0.9, 9, first.mean(), stats.sem(first))
    found = resampled(first.tolist(), 0.0, confidence=0.9)
    assert (found.low, found.high) == (pytest.approx(plain[0]), pytest.approx(plain[1]))
    assert paired_test(first.tolist(), second.tolist(), 0.0).p_value == pytest.approx(
        stats.ttest_rel(first, second).pvalue
    )
    # Overlap makes it less sure.
    corrected = paired_test(first.tolist(), second.tolist(), 0.25).p_value
    assert corrected is not None
    assert corrected > stats.ttest_rel(first, second).pvalue


def test_an_interval_of_shares_stays_within_them() -> None:
    found = resampled([1.0, 0.9, 1.0], 0.5, bounds=(0.0, 1.0))
    assert found.high == 1.0
    assert found.low is not None
    assert found.low < 0.9


@pytest.mark.parametrize("figures", [[0.5, 0.5], [1.0] * 5, [0.1 + 0.2, 0.3, 0.3]])
def test_folds_that_all_agree_give_no_interval_instead_of_certainty(figures: list[float]) -> None:
    found = resampled(figures, 0.25)
    assert (found.std, found.low, found.high) == (0.0, None, None)


def test_a_constant_difference_is_no_proof() -> None:
    assert paired_test([0.9, 0.8, 0.7], [0.8, 0.7, 0.6], 0.5).p_value is None
    assert paired_test([0.9, 0.8], [0.9, 0.8], 0.5).p_value == 1.0


def test_mcnemar_counts_on_the_side_of_who_is_right() -> None:
    first = np.array([True] * 8 + [False] * 4)
    second = np.array([True, True] + [False] * 9 + [True])
    found = mcnemar(first, second)
    assert (found.only_first, found.only_second) == (6, 1)
    assert found.p_value == pytest.approx(2 * (7 + 1) / 2**7)  # two-sided binomial of 1 or fewer in 7
