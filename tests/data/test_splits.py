from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes.data.splits import Fractions, StratifiedSplit, assign_groups, kfold
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
