"""Splits and folds: deterministic, stratified by label, never cutting a group in two."""

from __future__ import annotations

import functools
import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from manyeyes.errors import UsageError

# Entries of a class are dealt to the splits in blocks of this length: a block is permuted as a whole.
_BLOCK = 64
_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Fractions:
    """The shares of val and test; train takes the rest, which is at least a twentieth."""

    val: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        if not (self.val >= 0 and self.test >= 0 and self.val + self.test <= 0.95):
            raise UsageError(
                f"--val {self.val:g} and --test {self.test:g} are not possible. "
                "Give shares of at least 0 with a sum of at most 0.95."
            )


@dataclass(frozen=True)
class StratifiedSplit:
    """Deals the entries of every class to train, val and test.

    Every class gets its exact share of each split, give or take one entry; which way a share is rounded is drawn per
    class, so that many small classes together keep the shares too. Every class has an entry in train: the only entry of
    a class goes there.

    Args:
        fractions: the shares.
        seed: of the draws.
        num_entries: how many entries every class has.
    """

    fractions: Fractions
    seed: int
    num_entries: Mapping[str, int]

    def split_of(self, label: str, ordinal: int) -> str:
        """Return the split of the `ordinal`-th entry of class `label`."""
        total = self.num_entries[label]
        # The last block takes the rest too: a block is never shorter than _BLOCK unless it is the whole class.
        block = min(ordinal // _BLOCK, max(1, total // _BLOCK) - 1)
        return _SPLITS[_deal_block(self.fractions, self.seed, label, total, block)[ordinal - block * _BLOCK]]


# Entries come shuffled: the cache holds the blocks of four million at once, a byte an entry.
@functools.lru_cache(maxsize=65536)
def _deal_block(fractions: Fractions, seed: int, label: str, total: int, block: int) -> bytes:
    num_blocks = max(1, total // _BLOCK)
    start, end = block * _BLOCK, total if block == num_blocks - 1 else (block + 1) * _BLOCK
    dealt = {}
    for split, share in (("val", fractions.val), ("test", fractions.test)):
        phase = _uniform(seed, split, label)
        dealt[split] = int(round(end * share, 9) + phase) - int(round(start * share, 9) + phase)
    while num_blocks == 1 and dealt["val"] + dealt["test"] >= total:
        surplus = {"val": dealt["val"] - total * fractions.val, "test": dealt["test"] - total * fractions.test}
        dealt[max(surplus, key=lambda split: surplus[split])] -= 1
    num_train = end - start - dealt["val"] - dealt["test"]
    splits = [0] * num_train + [1] * dealt["val"] + [2] * dealt["test"]
    random.Random(f"{seed}/{label}/{block}").shuffle(splits)
    return bytes(splits)


def assign_groups(groups: Mapping[str, Mapping[str, int]], shares: Mapping[str, float], seed: int) -> dict[str, str]:
    """Give whole groups to splits (or folds), as near to the shares of every label as the groups allow.

    Greedy: from the largest group to the smallest, each goes where the squared distance to the wanted counts grows
    least.

    Args:
        groups: group -> label -> number of entries.
        shares: split -> wanted share; they sum to 1.
        seed: breaks ties between groups of one size.

    Returns:
        group -> split.
    """
    totals: Counter[str] = Counter()
    for counts in groups.values():
        totals.update(counts)
    dealt: dict[str, Counter[str]] = {split: Counter() for split in shares}
    ordered = sorted(groups, key=lambda group: (-sum(groups[group].values()), _uniform(seed, "group", group), group))
    splits = {}
    for group in ordered:
        counts = groups[group]

        def growth(split: str, counts: Mapping[str, int] = counts) -> float:
            have, share = dealt[split], shares[split]
            return sum(
                count * (2 * have[label] + count - 2 * share * totals[label]) / totals[label] ** 2
                for label, count in counts.items()
            )

        # On a tie the least filled split, so that equal groups spread.
        best = min(
            shares, key=lambda split: (growth(split), dealt[split].total() / shares[split] if shares[split] else np.inf)
        )
        dealt[best].update(counts)
        splits[group] = best
    return splits


def kfold(labels: np.ndarray, groups: Sequence[str | None] | None, k: int, seed: int) -> np.ndarray:
    """Divide examples into `k` folds, stratified by label, whole groups together.

    Args:
        labels: int array (n,).
        groups: n group names, where None is an example of its own; or None for no groups.
        k: the number of folds, at least 2.
        seed: of the shuffle.

    Returns:
        int32 array (n,): the fold of each example, in [0, k).

    Raises:
        UsageError: k is below 2 or above the number of examples or groups.
    """
    labels = np.asarray(labels)
    names = (
        [f"example {i}" if g is None else f"group {g}" for i, g in enumerate(groups)] if groups is not None else None
    )
    num_units = len(labels) if names is None else len(set(names))
    if not 2 <= k <= num_units:
        what = "examples" if names is None else "groups"
        raise UsageError(f"{k} folds of {num_units} {what} are not possible. Use 2 to {num_units}.")
    if names is not None:
        counts: dict[str, Counter[str]] = {}
        for name, label in zip(names, labels.tolist(), strict=True):
            counts.setdefault(name, Counter())[str(label)] += 1
        fold_of = assign_groups(counts, {str(fold): 1 / k for fold in range(k)}, seed)
        return np.array([int(fold_of[name]) for name in names], dtype=np.int32)
    shuffled = np.random.default_rng(seed).permutation(len(labels))
    by_label = shuffled[np.argsort(labels[shuffled], kind="stable")]
    folds = np.empty(len(labels), dtype=np.int32)
    # Dealing goes on from class to class, so that the folds differ by one example at most.
    folds[by_label] = np.arange(len(labels)) % k
    return folds


def _uniform(seed: int, *words: str) -> float:
    digest = hashlib.blake2b("/".join((str(seed), *words)).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
