from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from manyeyes.data.splits import (
    Fractions,
    StratifiedSplit,
    assign_groups,
    assign_units,
    kfold,
    merge_units,
)
from manyeyes.errors import UsageError

fractions = st.tuples(st.integers(0, 45), st.integers(0, 45)).map(lambda f: Fractions(f[0] / 100, f[1] / 100))


@settings(deadline=None, max_examples=150)
@given(fractions, st.integers(0, 2**32), st.integers(1, 700))
def test_every_class_gets_its_share_give_or_take_one(shares, seed, total):
    split = StratifiedSplit(shares, seed, {"a": total})
    counts = Counter(split.split_of("a", i) for i in range(total))
    assert sum(counts.values()) == total
    assert abs(counts["val"] - total * shares.val) <= 1 + 1e-6
    assert abs(counts["test"] - total * shares.test) <= 1 + 1e-6
    assert counts["train"] >= 1


def test_many_tiny_classes_keep_the_shares_together():
    split = StratifiedSplit(Fractions(0.1, 0.1), 7, {str(c): 3 for c in range(1000)})
    counts = Counter(split.split_of(str(c), i) for c in range(1000) for i in range(3))
    assert abs(counts["val"] - 300) < 60 and abs(counts["test"] - 300) < 60


def test_the_only_image_of_a_class_is_trained_on():
    split = StratifiedSplit(Fractions(0.45, 0.45), 0, {str(c): 1 for c in range(50)})
    assert {split.split_of(str(c), 0) for c in range(50)} == {"train"}


def test_a_split_depends_on_the_seed_and_on_nothing_else():
    first, again, other = (StratifiedSplit(Fractions(), seed, {"a": 500}) for seed in (1, 1, 2))
    splits = [[split.split_of("a", i) for i in range(500)] for split in (first, again, other)]
    assert splits[0] == splits[1] != splits[2]


@pytest.mark.parametrize(("val", "test"), [(-0.1, 0.1), (0.5, 0.5), (1.0, 0.0), (float("nan"), 0.1)])
def test_impossible_shares_are_refused(val, test):
    with pytest.raises(UsageError, match="sum of at most"):
        Fractions(val, test)


def test_equal_groups_are_dealt_in_exact_proportion():
    groups = {f"g{i}": {"a": 3, "b": 2} for i in range(20)}
    counts = Counter(assign_groups(groups, {"train": 0.8, "val": 0.1, "test": 0.1}, 0).values())
    assert counts == {"train": 16, "val": 2, "test": 2}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 1000))
def test_groups_of_mixed_size_come_near_the_shares_of_every_label(seed):
    draw = np.random.default_rng(seed)
    groups = {
        f"g{i}": {label: int(n) for label, n in zip("abc", draw.integers(0, 9, 3), strict=True) if n}
        for i in range(200)
    }
    shares = {"train": 0.7, "val": 0.2, "test": 0.1}
    splits = assign_groups(groups, shares, seed)
    totals, dealt = Counter(), {split: Counter() for split in shares}
    for group, counts in groups.items():
        totals.update(counts)
        dealt[splits[group]].update(counts)
    for split, share in shares.items():
        for label, total in totals.items():
            assert abs(dealt[split][label] / total - share) < 0.02


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(0, 4), min_size=10, max_size=200), st.integers(2, 10), st.integers(0, 99))
def test_folds_are_stratified_and_of_one_size(labels, k, seed):
    labels = np.array(labels)
    folds = kfold(labels, None, k, seed)
    sizes = np.bincount(folds, minlength=k)
    assert sizes.sum() == len(labels) and sizes.max() - sizes.min() <= 1
    for label in np.unique(labels):
        by_fold = np.bincount(folds[labels == label], minlength=k)
        assert by_fold.max() - by_fold.min() <= 1
    assert np.array_equal(folds, kfold(labels, None, k, seed))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=60, max_size=200), st.integers(0, 99))
def test_no_group_is_in_two_folds(rows, seed):
    labels = np.array([label for label, _ in rows])
    groups = [f"g{group}" if group else None for _, group in rows]
    folds = kfold(labels, groups, 3, seed)
    for group in set(groups) - {None}:
        assert len({fold for fold, of in zip(folds.tolist(), groups, strict=True) if of == group}) == 1


def test_more_folds_than_groups_are_refused():
    with pytest.raises(UsageError, match="3 folds of 2 groups"):
        kfold(np.zeros(10, int), ["a", "b"] * 5, 3, 0)


@pytest.mark.parametrize(
    ("num_units", "message"),
    [
        (3, "5 folds of 3 groups and sets of near-duplicates are not possible. Use 2 to 3. With --no-group-duplicates"),
        (2, "5 folds of 2 groups and sets of near-duplicates are not possible. Use 2. With --no-group-duplicates"),
        (1, "5 folds are not possible: all 12 examples belong together by groups and sets of near-duplicates. With"),
    ],
)
def test_near_duplicates_that_leave_too_little_to_divide_are_named_with_the_way_out(num_units, message):
    with pytest.raises(UsageError) as raised:
        kfold(np.zeros(12, int), None, 5, 0, np.arange(12) % num_units)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a"] * 12, "5 folds are not possible: all 12 examples belong together by groups."),
        (["a"], "5 folds are not possible: the number of examples is 1."),
        (None, "5 folds of 4 examples are not possible. Use 2 to 4."),
    ],
)
def test_without_clusters_nothing_is_said_of_near_duplicates(groups, message):
    with pytest.raises(UsageError) as raised:
        kfold(np.zeros(len(groups or "four"), int), groups, 5, 0)
    assert str(raised.value) == message


def test_what_a_group_or_a_cluster_joins_is_one_unit_with_all_whom_that_connects():
    groups = ["a", None, "b", "a", None, None, "b"]
    clusters = np.array([-1, 7, 7, -1, 3, -1, -1])
    # a: 0, 3; b: 2, 6, joined by a cluster with 1; 4 is the only one of its cluster here.
    assert merge_units(groups, clusters, 7).tolist() == [0, 1, 1, 0, 4, 5, 1]
    assert merge_units(None, None, 3).tolist() == [0, 1, 2]


rows_with_relations = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(-1, 12)), min_size=30, max_size=150
)


@settings(deadline=None, max_examples=60)
@given(rows_with_relations, st.integers(0, 99), st.randoms(use_true_random=False))
def test_no_group_and_no_cluster_straddles_and_the_order_of_examples_does_not_matter(rows, seed, shuffler):
    def split(order):
        labels = np.array([rows[i][0] for i in order])
        groups = [f"g{rows[i][1]}" if rows[i][1] > 6 else None for i in order]
        clusters = np.array([rows[i][2] if rows[i][2] > 6 else -1 for i in order])
        units = merge_units(groups, clusters, len(order))
        keys = [f"images/{i}.png" for i in order]
        splits = assign_units(labels, units, {"train": 0.7, "val": 0.2, "test": 0.1}, seed, keys)
        for relation in (groups, [None if c < 0 else c for c in clusters.tolist()]):
            for value in set(relation) - {None}:
                assert len({s for s, of in zip(splits.tolist(), relation, strict=True) if of == value}) == 1
        return dict(zip(keys, splits.tolist(), strict=True))

    order = list(range(len(rows)))
    first = split(order)
    assert len(first) == len(rows) and set(first.values()) <= {0, 1, 2}
    shuffler.shuffle(order)
    assert split(order) == first


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000))
def test_single_examples_make_up_for_what_units_leave_uneven(seed):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, 400)
    # Every tenth example is in one of 10 units of 4; the others are single.
    units = np.where(np.arange(400) % 10 == 0, np.arange(400) // 10 % 10, np.arange(400) + 10)
    shares = {"train": 0.7, "val": 0.2, "test": 0.1}
    splits = assign_units(labels, units, shares, seed)
    for label in range(3):
        counts = np.bincount(splits[labels == label], minlength=3)
        total = counts.sum()
        assert np.all(np.abs(counts - total * np.array(list(shares.values()))) <= 1 + 1e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 20)), min_size=60, max_size=200), st.integers(0, 99))
def test_a_cluster_of_duplicates_is_in_one_fold_whatever_its_groups(rows, seed):
    labels, clusters = np.array(rows).T
    groups = ["twins" if i in (0, 1) else None for i in range(len(rows))]
    assume(len(set(merge_units(groups, clusters, len(rows)).tolist())) >= 3)
    folds = kfold(labels, groups, 3, seed, clusters=clusters)
    assert folds[0] == folds[1]
    for cluster in set(clusters.tolist()) - {-1}:
        assert len(set(folds[clusters == cluster].tolist())) == 1


def test_what_the_splits_have_already_counts_when_groups_are_dealt():
    dealt = {"train": {"a": 70}, "test": {"a": 20}}
    splits = assign_groups({f"g{i}": {"a": 2} for i in range(5)}, {"train": 0.8, "test": 0.2}, 0, dealt)
    assert set(splits.values()) == {"train"}


def test_of_two_equally_good_splits_the_larger_takes_the_larger_group():
    # Both lack two of a; val is emptier, but train lacks more in all.
    groups = {"large": {"a": 3}, "small": {"a": 1}} | {f"b{i}": {"b": 1} for i in range(10)}
    splits = assign_groups(groups, {"val": 0.25, "train": 0.75}, 0, {"train": {"a": 4}})
    assert (splits["large"], splits["small"]) == ("train", "val")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=12, max_size=40), st.sampled_from([0.1, 0.2, 0.3]), st.integers(0, 99))
def test_a_small_share_is_kept_whatever_the_sizes_of_units(sizes, share, seed):
    sizes = [*sizes, sum(sizes) * 2 // 3]  # one unit has two fifths of all
    units = np.repeat(np.arange(len(sizes)), sizes)
    labels = np.random.default_rng(seed).integers(0, 3, len(units))
    splits = assign_units(labels, units, {"val": share, "train": 1 - share}, seed)
    assert splits[-1] == 1
    val = (splits == 0).sum()
    # Never farther off than a unit's size.
    assert abs(val - share * len(units)) <= max(sizes[:-1])
