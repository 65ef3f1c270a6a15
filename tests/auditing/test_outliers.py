from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes.auditing.measuring import Measured
from manyeyes.auditing.outliers import find_outliers


def measured(**columns) -> Measured:
    num = len(next(iter(columns.values())))
    values = {"pixels": np.full(num, 1e4), "aspect": np.ones(num), "brightness": np.full(num, 100.0)}
    values |= {"sharpness": np.full(num, 500.0)} | columns
    floats = {name: np.asarray(of_one, np.float32) for name, of_one in values.items()}
    whole = np.zeros(num, np.int64)
    return Measured(("train",), whole.astype(np.int8), whole.astype(np.int32), whole - 1, whole, **floats)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0, 255, width=32), min_size=4, max_size=200), st.randoms(use_true_random=False))
def test_the_order_of_examples_changes_no_fence_and_no_outlier(values, shuffler):
    first = find_outliers(measured(brightness=values))
    shuffled = list(values)
    shuffler.shuffle(shuffled)
    again = find_outliers(measured(brightness=shuffled))
    assert again[0] == first[0]
    assert sorted((each.value, each.kind) for each in again[1]) == sorted((each.value, each.kind) for each in first[1])


def test_of_a_million_normal_values_a_handful_is_odd():
    draw = np.random.default_rng(0)
    _, found = find_outliers(measured(brightness=draw.normal(128, 20, 1_000_000)))
    assert len(found) < 20  # two in a million and side are expected beyond 3 interquartile ranges


def test_a_second_usual_size_is_not_odd_where_nearly_all_have_one():
    sizes = np.array([640 * 480] * 95 + [800 * 600] * 5)
    assert find_outliers(measured(pixels=sizes))[1] == []
    _, found = find_outliers(measured(pixels=np.append(sizes, [10_000_000, 32 * 32])))
    assert {(each.example, each.kind) for each in found} == {(100, "large"), (101, "small")}


@pytest.mark.parametrize(("value", "kind"), [(0.0, "dark"), (255.0, "bright")])
def test_a_black_and_a_white_image_are_odd_among_grey_ones(value, kind):
    values = np.append(np.random.default_rng(0).normal(120, 10, 200), value)
    _, (found,) = find_outliers(measured(brightness=values))
    assert (found.example, found.kind, found.value) == (200, kind, value) and found.distance > 3


def test_a_very_sharp_image_is_no_fault():
    assert find_outliers(measured(sharpness=[500.0] * 50 + [1e6]))[1] == []
