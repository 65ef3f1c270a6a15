from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from manyeyes.imaging.draws import uniforms

integers = st.integers(-(2**70), 2**70)
indices = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=20)


@given(integers, integers, indices, st.integers(1, 8), st.integers(0, 5))
@settings(deadline=None)
def test_a_row_does_not_depend_on_the_other_rows_nor_on_the_number_of_columns(
    seed: int, epoch: int, example_indices: list[int], num: int, stream: int
) -> None:
    together = uniforms(seed, epoch, np.array(example_indices), num, stream)
    assert together.shape == (len(example_indices), num) and together.dtype == np.float64
    assert (together >= 0).all() and (together < 1).all()
    for row, example_index in zip(together, example_indices, strict=True):
        np.testing.assert_array_equal(uniforms(seed, epoch, np.array([example_index]), num + 3, stream)[0, :num], row)


def test_the_numbers_stay_the_same_from_version_to_version() -> None:
    drawn = uniforms(7, 3, np.array([0, 1, 10**12]), 2, stream=1)
    np.testing.assert_allclose(
        drawn,
        [
            [0.020594515791004797, 0.7689607020735723],
            [0.7331454181780863, 0.8960681878612383],
            [0.8051232864753689, 0.8209763900885118],
        ],
        rtol=0,
        atol=1e-15,
    )


def test_the_numbers_are_uniform() -> None:
    drawn = uniforms(0, 0, np.arange(50_000), 4)
    assert abs(drawn.mean() - 0.5) < 0.003
    assert abs(drawn.var() - 1 / 12) < 0.001
    for column in drawn.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    for bit in range(20):
        assert abs(((drawn * 2 ** (bit + 1)).astype(np.int64) & 1).mean() - 0.5) < 0.005


@pytest.mark.parametrize("what", ["index", "column", "epoch", "seed", "stream"])
def test_neighbours_are_not_correlated(what: str) -> None:
    example_indices = np.arange(100_000)
    first = uniforms(5, 9, example_indices, 2)
    pairs = {
        "index": (first[:-1, 0], first[1:, 0]),
        "column": (first[:, 0], first[:, 1]),
        "epoch": (first[:, 0], uniforms(5, 10, example_indices, 1)[:, 0]),
        "seed": (first[:, 0], uniforms(6, 9, example_indices, 1)[:, 0]),
        "stream": (first[:, 0], uniforms(5, 9, example_indices, 1, stream=1)[:, 0]),
    }
    assert abs(np.corrcoef(*pairs[what])[0, 1]) < 0.015
    # Dependence that correlation does not see: the pairs fill the unit square evenly.
    counts, _, _ = np.histogram2d(*pairs[what], bins=10, range=[[0, 1], [0, 1]])
    assert stats.chisquare(counts.ravel()).pvalue > 1e-4


def test_seed_and_epoch_are_not_interchangeable() -> None:
    example_indices = np.arange(100)
    assert not np.array_equal(uniforms(1, 2, example_indices, 1), uniforms(2, 1, example_indices, 1))
    assert not np.array_equal(uniforms(0, 1, example_indices, 1), uniforms(1, 0, example_indices, 1))
