"""Which of millions of 64-bit hashes differ in few bits: all pairs, by sorting, without comparing each with each."""

from __future__ import annotations

import itertools

import numpy as np

MAX_DISTANCE = 8
# Of comparisons and of pairs per hash: a set that lies closer than this says nothing about its images.
_MAX_COMPARISONS = 4096
_MAX_PAIRS = 64
_CHUNK = 1 << 22


class TooManyPairsError(Exception):
    """The hashes lie so close that nearness says nothing; a smaller distance may."""


def near_pairs(hashes: np.ndarray, distance: int) -> np.ndarray:
    """Find all pairs of hashes that differ in at most `distance` bits, each once.

    The 64 bits are cut into distance + 2 bands. `distance` bits touch at most as many bands, so two bands at least of
    such a pair agree: for every choice of two bands, the hashes are sorted by these and compared within equal ones.
    That is complete, and costs a sort per choice as long as few hashes agree in two bands by chance.

    Args:
        hashes: uint64 (n,), sorted, no value twice; n below 2**31.
        distance: in [0, MAX_DISTANCE].

    Returns:
        int64 (m, 2): positions in `hashes`, the smaller first, sorted.

    Raises:
        TooManyPairsError: there are more than 64 pairs, or 4,096 comparisons, for each hash.
    """
    if distance == 0 or len(hashes) < 2:
        return np.empty((0, 2), np.int64)
    edges = np.linspace(0, 64, distance + 3).round().astype(int)
    bands = list(itertools.pairwise(edges.tolist()))
    found: list[np.ndarray] = []
    num_pairs = 0
    for first, second in itertools.combinations(range(len(bands)), 2):
        order = [bands[first], bands[second], *(band for k, band in enumerate(bands) if k not in (first, second))]
        words = _with_bands_in(order, hashes)
        words.sort()
        num_key_bits = sum(stop - start for start, stop in order[:2])
        # A pair that agrees in more than two bands comes up again: it counts where its first two agree.
        earlier = [_mask(bands[k]) for k in range(second) if k != first]
        one, other = (_with_bands_back(order, near) for near in _near_in_runs(words, num_key_bits, distance))
        differ = one ^ other
        is_first = np.logical_and.reduce([(differ & mask) != 0 for mask in earlier] or [np.ones(len(one), bool)])
        pairs = np.searchsorted(hashes, np.stack([one[is_first], other[is_first]], axis=1))
        found.append(np.sort(pairs, axis=1))
        num_pairs += len(pairs)
        if num_pairs > _MAX_PAIRS * len(hashes):
            raise TooManyPairsError
    pairs = np.concatenate([np.empty((0, 2), np.int64), *found])
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def connected(num_nodes: int, pairs: np.ndarray) -> np.ndarray:
    """Find the connected components of a graph.

    Args:
        pairs: int (m, 2): the nodes that each edge joins.

    Returns:
        int64 (num_nodes,): the smallest node of each node's component.
    """
    smallest = np.arange(num_nodes, dtype=np.int64)
    one, other = pairs[:, 0], pairs[:, 1]
    while True:
        roots = smallest[one], smallest[other]
        differ = roots[0] != roots[1]
        if not differ.any():
            return smallest
        one, other = one[differ], other[differ]
        low, high = np.minimum(*roots)[differ], np.maximum(*roots)[differ]
        np.minimum.at(smallest, high, low)
        # Every node points to a root before the next round.
        while not np.array_equal(up := smallest[smallest], smallest):
            smallest = up


def _near_in_runs(words: np.ndarray, num_key_bits: int, distance: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of sorted words, uint64 (m,) each, that agree in their upper bits and differ in few of the others."""
    keys = words >> np.uint64(64 - num_key_bits)
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    del keys
    lengths = np.diff(np.append(starts, len(words)))
    if int((lengths * (lengths - 1) // 2).sum()) > _MAX_COMPARISONS * len(words):
        raise TooManyPairsError
    # How many words of its run come after each word: those are what it is compared with.
    num_after = np.repeat(starts + lengths, lengths) - np.arange(1, len(words) + 1)
    del starts, lengths
    active = np.flatnonzero(num_after > 0)
    found = [words[:0]], [words[:0]]
    num_found, step = 0, 1
    while len(active):
        for start in range(0, len(active), _CHUNK):
            chosen = active[start : start + _CHUNK]
            one, other = words[chosen], words[chosen + step]
            near = np.bitwise_count(one ^ other) <= distance
            num_found += int(near.sum())
            if num_found > _MAX_PAIRS * len(words):
                raise TooManyPairsError
            found[0].append(one[near])
            found[1].append(other[near])
        step += 1
        active = active[num_after[active] >= step]
    return np.concatenate(found[0]), np.concatenate(found[1])


def _with_bands_in(order: list[tuple[int, int]], hashes: np.ndarray) -> np.ndarray:
    """Move the bands of bits, so that those of `order` follow each other from the upper end down."""
    words = np.zeros_like(hashes)
    free = 64
    for start, stop in order:
        free -= stop - start
        words |= ((hashes & _mask((start, stop))) >> np.uint64(start)) << np.uint64(free)
    return words


def _with_bands_back(order: list[tuple[int, int]], words: np.ndarray) -> np.ndarray:
    """The inverse of _with_bands_in."""
    hashes = np.zeros_like(words)
    free = 64
    for start, stop in order:
        free -= stop - start
        hashes |= (words >> np.uint64(free) << np.uint64(start)) & _mask((start, stop))
    return hashes


def _mask(band: tuple[int, int]) -> np.uint64:
    return np.uint64((1 << band[1]) - (1 << band[0]))
