"""Which examples of a dataset show the same picture: exact copies and near ones (encoded again, resized, cropped).

Hashes come from the shards by an engine's map; near pairs of hashes from sorting them (`near_hashes`); what a hash only
suspects, a thumbnail decides. The result depends on the examples alone: not on their order, the shards or the engine.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from manyeyes.data.dataset import Dataset
from manyeyes.data.manifest import ShardInfo
from manyeyes.data.near_hashes import MAX_DISTANCE, TooManyPairsError, connected, near_pairs
from manyeyes.engines.base import Engine
from manyeyes.engines.registry import create_engine
from manyeyes.errors import DatasetError, ImageError, UsageError
from manyeyes.imaging.decode import inspect
from manyeyes.imaging.phash import perceptual_hash

# Measured: docs/decisions/0130-audit.md.
DEFAULT_DISTANCE = 6
MIN_CORRELATION = 0.99
# A hash of a photo has 32 bits set; a flat image's has one, a plain gradient's few: such a hash is no likeness.
_MIN_BITS_SET = 12
_THUMBNAIL_SIDE = 16
# Each image is also looked at without its rim, so that a copy that was cropped a little lines up with it.
_CROPS = (0.0, 0.02, 0.04)
_PAIRS_OF_CROPS = ((0, 0), (0, 1), (0, 2), (1, 0), (2, 0))
# Of different images with one and the same hash, so many are compared with others.
_MAX_LOOKS = 16
_COMPARE_CHUNK = 1 << 13


@dataclass(frozen=True)
class Duplicates:
    """Who is whose duplicate; examples are numbered through the shards, in their order.

    Attributes:
        clusters: int64 (n,): the smallest number of the cluster that the example is in; -1 where it is alone.
        copies: int64 (n,): the same for exact copies only, which have the same stored content. Copies are always in one
            cluster.
        distance: of hashes that were compared: less than asked for where so many lie close that it would say nothing.
        num_flat: examples whose hash says too little to be compared (flat images): these have exact copies only.
    """

    clusters: np.ndarray
    copies: np.ndarray
    distance: int
    num_flat: int


def find_duplicates(
    dataset: Dataset,
    engine: Engine | None = None,
    distance: int = DEFAULT_DISTANCE,
    shards: Sequence[ShardInfo] | None = None,
    hashes: np.ndarray | None = None,
) -> Duplicates:
    """Find the exact and near duplicates among all examples of a dataset, over all its splits.

    Two examples are exact copies if their stored content is the same, byte by byte. They are near duplicates if their
    perceptual hashes differ in at most `distance` bits and their grey thumbnails correlate to at least 0.99, of one of
    them perhaps without a rim of 1 or 2 percent. Clusters are what is connected by either. This process takes about 60
    bytes per example while it searches, and 900 per example with a suspect hash.

    Args:
        engine: where the shards are read; default: local, a worker per core.
        distance: 0 to 8 bits.
        shards: of the manifest: only among their examples, which are numbered through them; default: all.
        hashes: int64 (n,): the perceptual hashes of these examples, where they have been read already.

    Raises:
        UsageError: the distance is out of range.
        DatasetError: a shard is damaged.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise UsageError(f"A distance of {distance} bits is not possible. Use 0 to {MAX_DISTANCE}.")
    engine = engine or create_engine()
    shards = dataset.manifest.shards if shards is None else shards
    if hashes is None:
        hashes = np.frombuffer(b"".join(engine.map(functools.partial(_read_hashes, dataset), shards)), np.int64)
    num_examples = len(hashes)
    unique, which, counts = np.unique(hashes.view(np.uint64), return_inverse=True, return_counts=True)
    del hashes
    is_flat = np.bitwise_count(unique) < _MIN_BITS_SET
    pairs, distance = _suspect_pairs(unique, is_flat, distance)
    is_suspect = counts > 1
    is_suspect[pairs.ravel()] = True
    suspects = np.flatnonzero(is_suspect[which])
    looks = _read_looks(dataset, engine, choose_rows(shards, suspects))
    of_suspects = which[suspects]
    copies = _group_copies(of_suspects, looks.digests)
    edges = [np.stack([np.arange(len(suspects)), copies], axis=1)]
    edges += _near_edges(of_suspects, copies, looks, pairs, is_flat)
    clusters = connected(len(suspects), np.concatenate(edges))
    return Duplicates(
        clusters=_of_all(num_examples, suspects, clusters),
        copies=_of_all(num_examples, suspects, copies),
        distance=distance,
        num_flat=int(counts[is_flat].sum()),
    )


def _suspect_pairs(unique: np.ndarray, is_flat: np.ndarray, distance: int) -> tuple[np.ndarray, int]:
    """Pairs of numbers of hashes that are near, and the distance that was possible."""
    telling = np.flatnonzero(~is_flat)
    for within in range(distance, -1, -1):
        try:
            return telling[near_pairs(unique[telling], within)], within
        except TooManyPairsError:
            continue
    raise AssertionError("at distance 0 there are no pairs")


def _of_all(num_examples: int, suspects: np.ndarray, smallest: np.ndarray) -> np.ndarray:
    """From the suspects' numbering to that of all examples; -1 for who is alone."""
    result = np.full(num_examples, -1, np.int64)
    shared = np.bincount(smallest, minlength=len(suspects))[smallest] > 1
    result[suspects[shared]] = suspects[smallest[shared]]
    return result


class Thumbnails:
    """Thumbnails of n images, uint8 (n, 3, 256), and which of them agree.

    In integers, so that the answer is the same on every machine and beside any other images.
    """

    def __init__(self, values: np.ndarray) -> None:
        self._values = values
        num = values.shape[2]
        self._sums = values.sum(axis=2, dtype=np.int64)
        squares = [
            np.einsum("nkj,nkj->nk", part, part)
            for start in range(0, len(values), _COMPARE_CHUNK)
            for part in [values[start : start + _COMPARE_CHUNK].astype(np.int32)]
        ]
        self._spreads = (num * np.concatenate([np.empty((0, values.shape[1]), np.int64), *squares])) - self._sums**2

    def agree(self, pairs: np.ndarray, least: float = MIN_CORRELATION) -> np.ndarray:
        """Whether two images correlate to at least `least`: bool (m,), for pairs int (m, 2); a flat one never does."""
        result = np.zeros(len(pairs), bool)
        num = self._values.shape[2]
        for start in range(0, len(pairs), _COMPARE_CHUNK):
            one, other = pairs[start : start + _COMPARE_CHUNK].T
            values, others = self._values[one].astype(np.int32), self._values[other].astype(np.int32)
            for k, m in _PAIRS_OF_CROPS:
                products = np.einsum("nj,nj->n", values[:, k], others[:, m]).astype(np.int64)
                common = num * products - self._sums[one, k] * self._sums[other, m]
                bound = least * np.sqrt(self._spreads[one, k].astype(float) * self._spreads[other, m])
                result[start : start + _COMPARE_CHUNK] |= (common >= bound) & (bound > 0)
        return result


@dataclass(frozen=True)
class _Looks:
    """Of n images: uint64 (n,) digests of their content, and their thumbnails."""

    digests: np.ndarray
    thumbnails: Thumbnails


def _read_hashes(dataset: Dataset, shard: ShardInfo) -> bytes:
    """The perceptual hashes of a shard; as bytes, which every engine carries without a copy of a copy."""
    hashes: list[int] = []
    with dataset.open_shard(shard) as reader:
        for index in range(len(shard.row_group_rows)):
            table = reader.read_table(index, ("phash",))
            if table.column_names:
                hashes += table.column("phash").to_pylist()
            else:  # written by other means than an ingest
                images = reader.read(index, ("image", "label")).images
                hashes += [perceptual_hash(pixels_of(dataset, image)[0]) for image in images]
    return np.array(hashes, np.int64).tobytes()


def pixels_of(dataset: Dataset, stored: np.ndarray | bytes, path: str = "an image") -> tuple[np.ndarray, int, int]:
    """Look at a stored image, at a reduced size where that is cheaper.

    Returns:
        uint8 (height, width, channels), and the height and width in pixels that it has in full.

    Raises:
        DatasetError: it can't be decoded.
    """
    if not isinstance(stored, bytes):
        return stored, *stored.shape[:2]
    preprocessing = dataset.preprocessing
    try:
        return inspect(stored, channels=preprocessing.channels, background=preprocessing.background)
    except ImageError as error:
        raise DatasetError(f"{dataset.uri}: {path} can't be decoded ({error}). Ingest again.") from None


def _read_looks(dataset: Dataset, engine: Engine, tasks: Iterator[ChosenRows]) -> _Looks:
    parts = engine.map(functools.partial(_look, dataset), tasks)
    digests = b"".join(digests for digests, _ in parts)
    thumbnails = np.frombuffer(b"".join(thumbnails for _, thumbnails in parts), np.uint8)
    thumbnails = thumbnails.reshape(-1, len(_CROPS), _THUMBNAIL_SIDE**2)
    return _Looks(np.frombuffer(digests, np.uint64), Thumbnails(thumbnails))


@dataclass(frozen=True)
class ChosenRows:
    """Rows of one shard: int (n,), ascending, counted through its row groups."""

    shard: ShardInfo
    rows: np.ndarray

    def by_row_group(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the row groups that have any of them, each with its rows, counted from its first."""
        start = 0
        for index, num_rows in enumerate(self.shard.row_group_rows):
            first, last = np.searchsorted(self.rows, (start, start + num_rows))
            if last > first:
                yield index, self.rows[first:last] - start
            start += num_rows


def choose_rows(shards: Sequence[ShardInfo], examples: np.ndarray) -> Iterator[ChosenRows]:
    """Yield where examples lie, int (n,), ascending, that are numbered through the shards."""
    start = 0
    for shard in shards:
        first, last = np.searchsorted(examples, (start, start + shard.num_rows))
        if last > first:
            yield ChosenRows(shard, examples[first:last] - start)
        start += shard.num_rows


def _look(dataset: Dataset, chosen: ChosenRows) -> tuple[bytes, bytes]:
    digests, thumbnails = [], []
    with dataset.open_shard(chosen.shard) as reader:
        for index, rows in chosen.by_row_group():
            group = reader.read(index, ("image", "label"))
            for row in rows.tolist():
                image = group.images[row]
                content = image if isinstance(image, bytes) else np.ascontiguousarray(image).data
                digests.append(hashlib.blake2b(content, digest_size=8).digest())
                thumbnails.append(thumbnails_of(pixels_of(dataset, image, group.paths[row])[0]).tobytes())
    return b"".join(digests), b"".join(thumbnails)


def thumbnails_of(image: np.ndarray) -> np.ndarray:
    """uint8 (3, 256): 16 x 16 grey values of an image (height, width, channels), whole and without its rim."""
    found = []
    for share in _CROPS:
        rows, columns = (round(side * share / 2) for side in image.shape[:2])
        inner = image[rows : image.shape[0] - rows, columns : image.shape[1] - columns]
        # By the same way down as the perceptual hash.
        small = cv2.resize(inner, (128, 128), interpolation=cv2.INTER_LINEAR) if min(inner.shape[:2]) > 128 else inner
        small = cv2.resize(small, (_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), interpolation=cv2.INTER_AREA)
        found.append((cv2.cvtColor(small, cv2.COLOR_RGB2GRAY) if small.ndim == 3 else small).reshape(-1))
    return np.stack(found)


def _group_copies(hashes: np.ndarray, digests: np.ndarray) -> np.ndarray:
    """int64 (n,): for each suspect the first one with the same hash and content."""
    keys = np.stack([hashes.astype(np.uint64), digests], axis=1)
    _, first, which = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    return first[which.ravel()]


def _near_edges(
    hashes: np.ndarray, copies: np.ndarray, looks: _Looks, pairs: np.ndarray, is_flat: np.ndarray
) -> list[np.ndarray]:
    """Pairs of suspects whose hashes are equal or near and whose thumbnails agree.

    Among different images of one hash the first in the order of their digests is a look of its own, and so is each that
    agrees with no look before it; only looks are compared across hashes. So a million frames of one still scene cost a
    million comparisons and not their square.
    """
    distinct = np.flatnonzero((copies == np.arange(len(copies))) & ~is_flat[hashes])
    distinct = distinct[np.lexsort((looks.digests[distinct], hashes[distinct]))]
    starts = np.flatnonzero(np.diff(hashes[distinct], prepend=-1))
    lengths = np.diff(np.append(starts, len(distinct)))
    edges: list[np.ndarray] = []
    chosen = np.ones(len(distinct), bool)
    for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        members = distinct[start : start + length]
        is_look = np.zeros(length, bool)
        open_ = np.arange(length)
        while len(open_) and is_look.sum() < _MAX_LOOKS:
            look, others = open_[0], open_[1:]
            is_look[look] = True
            pairs_of_look = np.stack([np.full(len(others), members[look]), members[others]], axis=1)
            agree = looks.thumbnails.agree(pairs_of_look)
            edges.append(pairs_of_look[agree])
            open_ = others[~agree]
        chosen[start : start + length] = is_look
    distinct = distinct[chosen]
    # The looks of hash h are distinct[begin[h] : begin[h] + count[h]].
    begin = np.searchsorted(hashes[distinct], np.arange(len(is_flat)))
    count = np.bincount(hashes[distinct], minlength=len(is_flat))
    for at in range(0, len(pairs), _COMPARE_CHUNK):
        one, other = pairs[at : at + _COMPARE_CHUNK].T
        num = count[one] * count[other]
        which = np.repeat(np.arange(len(one)), num)
        within = np.arange(len(which)) - np.repeat(np.cumsum(num) - num, num)
        first = distinct[begin[one[which]] + within // count[other[which]]]
        second = distinct[begin[other[which]] + within % count[other[which]]]
        compared = np.stack([first, second], axis=1)
        edges.append(compared[looks.thumbnails.agree(compared)])
    return edges
