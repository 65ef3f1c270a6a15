"""Splits and folds: deterministic, stratified by label, never cutting a group or a cluster of duplicates in two."""

from __future__ import annotations

import functools
import hashlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from manyeyes.data.near_hashes import connected
from manyeyes.errors import UsageError
from manyeyes.imaging.draws import uniforms

# Entries of a class are dealt to the splits in blocks of this length: a block is permuted as a whole.
_BLOCK = 64
_SPLITS = ("train", "val", "test")
_SINGLES_STREAM = 0x0F1D


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


def assign_groups(
    groups: Mapping[str, Mapping[str, int]],
    shares: Mapping[str, float],
    seed: int,
    dealt: Mapping[str, Mapping[str, int]] | None = None,
) -> dict[str, str]:
    """Give whole groups to splits (or folds), as near to the shares of every label as the groups allow.

    Greedy: from the largest group to the smallest, each goes where the squared distance to the wanted counts grows
    least; of equals to the split that lacks most of all labels together, so that a small one is not given the larger
    of two groups.

    Args:
        groups: group -> label -> number of entries.
        shares: split -> wanted share; they sum to 1.
        seed: breaks ties between groups of one size.
        dealt: split -> label -> number of entries that it has already, of the same whole that the shares are of.

    Returns:
        group -> split.
    """
    have_of = {split: Counter((dealt or {}).get(split, {})) for split in shares}
    totals: Counter[str] = Counter()
    for counts in (*groups.values(), *have_of.values()):
        totals.update(counts)
    total = totals.total()
    ordered = sorted(groups, key=lambda group: (-sum(groups[group].values()), _uniform(seed, "group", group), group))
    splits = {}
    for group in ordered:
        counts = groups[group]

        def growth(split: str, counts: Mapping[str, int] = counts) -> float:
            have, share = have_of[split], shares[split]
            return sum(
                count * (2 * have[label] + count - 2 * share * totals[label]) / totals[label] ** 2
                for label, count in counts.items()
            )

        best = min(shares, key=lambda split: (growth(split), have_of[split].total() - shares[split] * total))
        have_of[best].update(counts)
        splits[group] = best
    return splits


def merge_units(groups: Sequence[str | None] | None, clusters: np.ndarray | None, num_examples: int) -> np.ndarray:
    """Find which examples have to stay together: those that share a group or a cluster, and whom that connects.

    Args:
        groups: a name for each example, where None is an example of its own; or None for no groups.
        clusters: int (n,): the cluster of each example, -1 where it is alone (see duplicates); or None for no clusters.

    Returns:
        int64 (n,): the lowest index of each example's unit.
    """
    relations = [np.full(num_examples, -1)]
    if groups is not None:
        numbers: dict[str, int] = {}
        relations.append(np.array([-1 if name is None else numbers.setdefault(name, len(numbers)) for name in groups]))
    if clusters is not None:
        relations.append(np.asarray(clusters))
    return join_relations(*relations)


def group_number(group: str | None) -> int:
    """A number that stands for a group's name in a relation (see join_relations): 63 bits of a hash, -1 for None."""
    if group is None:
        return -1
    return int.from_bytes(hashlib.blake2b(_bytes(group), digest_size=8).digest(), "little") >> 1


def join_relations(*relations: np.ndarray) -> np.ndarray:
    """As merge_units; each relation is int (n,): equal where examples belong together, -1 where one is alone."""
    edges = []
    for relation in relations:
        members = np.flatnonzero(relation >= 0)
        _, first, which = np.unique(relation[members], return_index=True, return_inverse=True)
        edges.append(np.stack([members, members[first[which]]], axis=1))
    return connected(len(relations[0]), np.concatenate(edges))


def is_torn(units: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Whether the unit of each example, int (n,), lies in several splits, int (n,): bool (n,)."""
    pairs = np.unique(np.stack([units, splits.astype(np.int64)], axis=1), axis=0)
    found, counts = np.unique(pairs[:, 0], return_counts=True)
    return np.isin(units, found[counts > 1])


def join_torn(
    torn: np.ndarray,
    units: np.ndarray,
    labels: np.ndarray,
    splits: np.ndarray,
    split_names: Sequence[str],
    keys: Sequence[str],
) -> np.ndarray:
    """Bring units that lie in several splits together in one, where each label's counts stay nearest to what they were.

    Args:
        torn: int (m,), ascending: the examples of such units.
        units: int (m,): theirs.
        labels: int (n,), of all examples.
        splits: int (n,): the position in `split_names` of each; -1 where one takes no part.
        keys: m names: a unit is known by its first one, so that the order of the examples has no say.

    Returns:
        int64 (m,): the split of each torn example.
    """
    key_of: dict[int, str] = {}
    counts: dict[int, Counter[str]] = {}
    for row, unit, key in zip(torn.tolist(), units.tolist(), keys, strict=True):
        key_of[unit] = min(key_of.get(unit, key), key)
        counts.setdefault(unit, Counter())[str(labels[row])] += 1
    stays = splits >= 0
    in_split = np.bincount(splits[stays], minlength=len(split_names))
    shares = {name: float(count / stays.sum()) for name, count in zip(split_names, in_split.tolist(), strict=True)}
    stays[torn] = False
    dealt = {}
    for split, name in enumerate(split_names):
        of_label = np.bincount(labels[stays & (splits == split)])
        dealt[name] = {str(label): int(of_label[label]) for label in np.flatnonzero(of_label).tolist()}
    groups = {key_of[unit]: dict(sorted(counts[unit].items())) for unit in counts}
    split_of = assign_groups(groups, shares, 0, dealt)
    position = {name: split for split, name in enumerate(split_names)}
    return np.array([position[split_of[key_of[unit]]] for unit in units.tolist()], np.int64)


def assign_units(
    labels: np.ndarray, units: np.ndarray, shares: Mapping[str, float], seed: int, keys: Sequence[str] | None = None
) -> np.ndarray:
    """Give every example a split, whole units together, as near to the shares of every label as the units allow.

    Units of several examples go first (see assign_groups); single examples then fill up what each label lacks. Where
    all are single, every label has its exact share of every split, give or take one example.

    Args:
        labels: int (n,), at least 0.
        units: int (n,): examples of one number stay together (see merge_units).
        shares: split -> wanted share; they sum to 1.
        seed: of the draws.
        keys: a name for each example, all different: with them the result does not depend on the examples' order.

    Returns:
        int32 (n,): the position in `shares` of each example's split.
    """
    labels = np.asarray(labels)
    if keys is None:
        numbers = np.arange(len(labels))
    else:
        digests = b"".join(hashlib.blake2b(_bytes(key), digest_size=8).digest() for key in keys)
        numbers = np.frombuffer(digests, np.int64)
    names, weights = list(shares), np.array([shares[split] for split in shares])
    _, which, sizes = np.unique(units, return_inverse=True, return_counts=True)
    is_single = sizes[which] == 1
    splits = np.full(len(labels), -1, np.int32)
    counts: dict[int, Counter[str]] = {}
    name_of: dict[int, str] = {}
    for row in np.flatnonzero(~is_single).tolist():
        unit = int(which[row])
        counts.setdefault(unit, Counter())[str(labels[row])] += 1
        key = str(row) if keys is None else keys[row]
        name_of[unit] = min(name_of.get(unit, key), key)
    # Labels in order, so that sums of floats don't depend on that of the examples.
    split_of = assign_groups({name_of[unit]: dict(sorted(counts[unit].items())) for unit in counts}, shares, seed)
    for row in np.flatnonzero(~is_single).tolist():
        splits[row] = names.index(split_of[name_of[int(which[row])]])
    have = np.bincount(splits[~is_single], minlength=len(names)).astype(float)
    draws = uniforms(seed, 0, numbers, 1, stream=_SINGLES_STREAM)[:, 0]
    by_label = np.argsort(labels, kind="stable")
    for of_one in np.split(by_label, np.flatnonzero(np.diff(labels[by_label])) + 1):
        rows = of_one[is_single[of_one]]
        if not len(rows):
            continue
        of_label = np.bincount(splits[of_one[~is_single[of_one]]], minlength=len(names))
        num = _fill(weights * (len(rows) + of_label.sum()) - of_label, len(rows), weights * len(labels) - have)
        have += num
        splits[rows[np.argsort(draws[rows], kind="stable")]] = np.repeat(np.arange(len(names)), num)
    return splits


def _fill(lacking: np.ndarray, num: int, lacking_in_all: np.ndarray) -> np.ndarray:
    """Divide `num` examples of a label so that the squares of what the splits lack of it sum to the least.

    The rest that rounding leaves goes where the fraction is largest; of equals, to whom all labels together lack most.
    """
    ordered = np.sort(lacking)[::-1]
    # The level to which the splits that lack most are filled.
    levels = (np.cumsum(ordered) - num) / np.arange(1, len(ordered) + 1)
    wanted = np.maximum(lacking - levels[np.flatnonzero(ordered > levels)[-1]], 0)
    whole = np.floor(np.round(wanted, 9)).astype(int)
    order = np.lexsort((-np.round(lacking_in_all - whole, 9), -np.round(wanted - whole, 9)))
    whole[order[: num - whole.sum()]] += 1
    return whole


def kfold(
    labels: np.ndarray,
    groups: Sequence[str | None] | None,
    k: int,
    seed: int,
    clusters: np.ndarray | None = None,
    keys: Sequence[str] | None = None,
) -> np.ndarray:
    """Divide examples into `k` folds, stratified by label, whole groups and clusters together.

    Args:
        labels: int array (n,), at least 0.
        groups: n group names, where None is an example of its own; or None for no groups.
        k: the number of folds, at least 2.
        seed: of the shuffle.
        clusters: int array (n,): the cluster of near duplicates of each example, -1 where it is alone (see duplicates).
        keys: n different names: with them the folds don't depend on the order of the examples.

    Returns:
        int32 array (n,): the fold of each example, in [0, k).

    Raises:
        UsageError: k is below 2 or above the number of examples or groups.
    """
    units = merge_units(groups, clusters, len(labels))
    num_units = len(np.unique(units))
    if not 2 <= k <= num_units:
        raise UsageError(_impossible(k, num_units, len(labels), clusters is not None))
    return assign_units(labels, units, {str(fold): 1 / k for fold in range(k)}, seed, keys)


def _impossible(k: int, num_units: int, num_examples: int, has_clusters: bool) -> str:
    is_joined = num_units < num_examples
    what = "groups and sets of near-duplicates" if has_clusters else "groups"
    if num_units > 1:
        possible = "2" if num_units == 2 else f"2 to {num_units}"
        text = f"{k} folds of {num_units} {what if is_joined else 'examples'} are not possible. Use {possible}."
    elif is_joined:
        text = f"{k} folds are not possible: all {num_examples} examples belong together by {what}."
    else:
        text = f"{k} folds are not possible: the number of examples is {num_examples}."
    if has_clusters and is_joined and k >= 2:
        text += " With --no-group-duplicates only groups stay together."
    return text


def _uniform(seed: int, *words: str) -> float:
    digest = hashlib.blake2b(_bytes("/".join((str(seed), *words))), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
