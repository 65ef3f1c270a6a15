from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyeyes.data.order import Order, check_batch_size, part_slice
from manyeyes.errors import UsageError

row_groups = st.lists(st.integers(0, 9), min_size=1, max_size=30).filter(lambda rows: sum(rows) > 0)
windows = st.integers(1, 8)


def whole(order: Order, epoch: int) -> np.ndarray:
    return order.slice(epoch, 0, order.num_examples)


@given(row_groups, windows, st.integers(0, 2**40), st.integers(0, 500), st.booleans())
def test_every_epoch_has_every_example_once(rows, window, seed, epoch, shuffle):
    order = Order(np.array(rows), seed, shuffle, window)
    assert sorted(whole(order, epoch).tolist()) == list(range(sum(rows)))


@given(row_groups, windows, st.data())
def test_any_cut_of_an_epoch_gives_the_same_order(rows, window, data):
    order = Order(np.array(rows), 5, window=window)
    cuts = sorted(data.draw(st.lists(st.integers(0, sum(rows)), max_size=6)))
    bounds = [0, *cuts, sum(rows)]
    fresh = Order(np.array(rows), 5, window=window)
    # Backwards, with a fresh object: what was asked for before makes no difference.
    parts = [fresh.slice(3, start, stop) for start, stop in reversed(list(itertools.pairwise(bounds)))]
    assert np.array_equal(np.concatenate(parts[::-1]), whole(order, 3))


@given(row_groups, windows)
def test_without_shuffle_the_order_is_that_of_the_rows(rows, window):
    order = Order(np.array(rows), 1, shuffle=False, window=window)
    assert np.array_equal(whole(order, 7), np.arange(sum(rows)))


@given(row_groups, windows)
def test_a_window_holds_the_examples_of_its_row_groups_only(rows, window):
    order = Order(np.array(rows), 2, window=window)
    starts = np.concatenate([[0], np.cumsum(rows)])
    position = 0
    seen_groups = []
    for number in range(order.num_windows):
        groups = order.row_groups(4, number).tolist()
        seen_groups += groups
        expected = [index for group in groups for index in range(starts[group], starts[group + 1])]
        found = order.slice(4, position, position + len(expected))
        assert sorted(found.tolist()) == sorted(expected)
        assert all(order.windows_of_row_groups(4)[group] == number for group in groups)
        position += len(expected)
    assert sorted(seen_groups) == list(range(len(rows)))


def test_epochs_and_seeds_differ_and_repeat():
    rows = np.full(40, 25)
    order = Order(rows, 0)
    assert np.array_equal(whole(order, 3), whole(Order(rows, 0), 3))
    orders = [whole(order, epoch) for epoch in range(4)] + [whole(Order(rows, seed), 0) for seed in (1, 2)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert np.mean(first == second) < 0.02


def test_the_state_of_numpys_own_generator_changes_nothing():
    rows = np.full(10, 10)
    np.random.seed(1)
    first = whole(Order(rows, 9), 0)
    np.random.seed(2)
    assert np.array_equal(first, whole(Order(rows, 9), 0))


def test_the_order_is_the_same_on_every_machine_and_version():
    assert whole(Order(np.array([4, 4, 4]), 0, window=2), 1).tolist() == [4, 11, 10, 8, 5, 6, 9, 7, 2, 1, 3, 0]


def test_examples_of_a_window_go_anywhere_in_it():
    order = Order(np.full(8, 250), 0, window=8)
    places = np.empty((20, 2000))
    for epoch in range(20):
        places[epoch, whole(order, epoch)] = np.arange(2000)
    # The mean of 20 places that are uniform on [0, 2000) has a standard deviation of 129.
    assert np.abs(places.mean(axis=0) - 1000).max() < 5 * 129
    assert abs(np.corrcoef(places[0], np.arange(2000))[0, 1]) < 0.1


def test_positions_outside_the_epoch_are_refused():
    with pytest.raises(UsageError, match=re.escape("[3, 11) are not inside an epoch of 10 examples")):
        Order(np.array([5, 5]), 0).slice(0, 3, 11)
    with pytest.raises(UsageError, match="window=0"):
        Order(np.array([5, 5]), 0, window=0)


@given(st.integers(0, 1000), st.integers(0, 300), st.integers(1, 20))
def test_the_workers_parts_make_up_the_batch(start, size, world_size):
    parts = [part_slice(start, start + size, rank, world_size) for rank in range(world_size)]
    assert parts[0][0] == start
    assert parts[-1][1] == start + size
    assert all(before[1] == after[0] for before, after in itertools.pairwise(parts))
    sizes = [stop - first for first, stop in parts]
    assert min(sizes) >= 0
    if size % world_size == 0:
        assert set(sizes) == {size // world_size}
    else:
        assert all((stop - start) % 2 == 0 for _, stop in parts[:-1] if stop < start + size)
        assert max(sizes) <= size / world_size + 2


def test_a_batch_that_cannot_be_shared_out_says_which_sizes_can():
    with pytest.raises(
        UsageError, match=r"^global_batch_size=100 is not divisible by the 8 parts .*\. Use 96 or 104\.$"
    ):
        check_batch_size(100, 8)
    with pytest.raises(UsageError, match=r"^global_batch_size=3 is not divisible by the 8 parts .*\. Use 8\.$"):
        check_batch_size(3, 8)
    with pytest.raises(UsageError, match="global_batch_size=0 is below 1"):
        check_batch_size(0, 8)
    check_batch_size(104, 8)
