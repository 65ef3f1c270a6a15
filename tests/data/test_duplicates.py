from __future__ import annotations

import time

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes.data import duplicates
from manyeyes.data.duplicates import find_duplicates
from manyeyes.data.near_hashes import TooManyPairsError, connected, near_pairs
from manyeyes.engines.registry import create_engine
from manyeyes.errors import UsageError


def photo(seed: int, side: int = 160) -> np.ndarray:
    """A picture with structure on all scales, unlike any of another seed."""
    draw = np.random.default_rng(seed)
    image = np.zeros((side, side, 3), np.float32)
    for cells in (3, 6, 12, 40):
        image += cv2.resize(draw.normal(size=(cells, cells, 3)).astype(np.float32), (side, side)) * 40 / cells**0.5
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def encode(image: np.ndarray, quality: int = 95) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def members(ids: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(ids == i).tolist()) for i in np.unique(ids[ids >= 0])}


@pytest.fixture(scope="module")
def variants() -> list[bytes]:
    """Eight photos; two copies of the first, the second at less quality, halved and cropped; two flat images."""
    photos = [photo(seed) for seed in range(8)]
    black, white = np.zeros((50, 50, 3), np.uint8), np.full((50, 50, 3), 255, np.uint8)
    small = cv2.resize(photos[1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    return [
        *map(encode, photos),
        encode(photos[0]),
        encode(photos[0]),
        encode(photos[1], 40),
        encode(small),
        encode(photos[1][2:-2, 2:-2]),
        encode(black),
        encode(white),
        encode(black),
    ]


def test_copies_and_versions_of_a_photo_are_found_and_flat_images_are_only_copies(write_dataset, variants):
    found = find_duplicates(write_dataset(variants), create_engine("inline"))
    assert members(found.copies) == {frozenset({0, 8, 9}), frozenset({13, 15})}
    assert members(found.clusters) == {frozenset({0, 8, 9}), frozenset({1, 10, 11, 12}), frozenset({13, 15})}
    assert found.num_flat == 3 and found.distance == 6
    assert found.clusters[8] == 0  # named by its first example


def test_clusters_do_not_depend_on_the_order_the_shards_or_the_engine(write_dataset, variants):
    order = np.random.default_rng(1).permutation(len(variants))
    other = write_dataset([variants[i] for i in order], row_group_rows=(2, 3, 1, 4, 6))
    found = find_duplicates(write_dataset(variants), create_engine("inline"))
    again = find_duplicates(other, create_engine("local", 2))
    for ids, others in ((found.clusters, again.clusters), (found.copies, again.copies)):
        assert members(ids) == {frozenset(order[list(cluster)].tolist()) for cluster in members(others)}


def test_only_the_chosen_shards_are_looked_at(write_dataset, variants):
    dataset = write_dataset(variants, row_group_rows=(2, 3, 1, 10))
    found = find_duplicates(dataset, create_engine("inline"), shards=dataset.manifest.shards[1:])
    # The first copy lies in the first shard.
    assert members(found.copies) == {frozenset({2, 3}), frozenset({7, 9})}


def test_different_images_of_one_hash_are_not_duplicates(write_dataset, monkeypatch):
    monkeypatch.setattr(duplicates, "perceptual_hash", lambda image: 0x0F0F0F0F0F0F0F0F)
    images = np.stack([*(photo(seed, 32) for seed in range(40)), photo(3, 32)])
    found = find_duplicates(write_dataset(images), create_engine("inline"))
    assert members(found.clusters) == members(found.copies) == {frozenset({3, 40})}


def test_a_distance_that_no_search_covers_is_refused(write_dataset, variants):
    with pytest.raises(UsageError, match="Use 0 to 8"):
        find_duplicates(write_dataset(variants), create_engine("inline"), distance=9)


@settings(deadline=None, max_examples=80)
@given(st.integers(1, 8), st.integers(0, 2**32), st.integers(2, 60))
def test_every_pair_within_the_distance_is_found_once(distance, seed, num_hashes):
    draw = np.random.default_rng(seed)
    seeds = draw.integers(0, 2**64, 4, np.uint64)
    hashes = draw.choice(seeds, num_hashes)
    for _ in range(distance):  # each a few bits from one of four
        hashes = hashes ^ (draw.integers(0, 2, num_hashes, np.uint64) << draw.integers(0, 64, num_hashes, np.uint64))
    hashes = np.unique(hashes)
    differ = np.bitwise_count(hashes[:, None] ^ hashes[None, :])
    assert np.array_equal(near_pairs(hashes, distance), np.argwhere(np.triu(differ <= distance, 1)))


def test_hashes_that_all_lie_close_are_refused_soon_instead_of_compared_for_ever():
    draw = np.random.default_rng(0)
    crowded = np.unique(draw.integers(0, 2**17, 60_000, np.uint64))  # 47 of 64 bits agree
    started = time.perf_counter()
    with pytest.raises(TooManyPairsError):
        near_pairs(crowded, 4)
    assert time.perf_counter() - started < 10


def test_a_dataset_of_crowded_hashes_falls_back_to_a_smaller_distance(write_dataset, monkeypatch):
    hashes = iter(np.random.default_rng(0).permutation(2**12).tolist())
    monkeypatch.setattr(duplicates, "perceptual_hash", lambda image: (0x0FF0FF0FF0FF << 16) | next(hashes))
    images = np.random.default_rng(0).integers(0, 256, (2**12, 4, 4, 3), np.uint8)
    found = find_duplicates(write_dataset(images), create_engine("inline"), distance=6)
    assert found.distance < 6 and not members(found.copies)


@settings(deadline=None, max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=60))
def test_components_are_those_of_a_search_from_every_node(pairs):
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    edges = np.array(pairs, np.int64).reshape(-1, 2)
    _, expected = connected_components(coo_matrix((np.ones(len(edges)), edges.T), (30, 30)), directed=False)
    found = connected(30, edges)
    assert np.array_equal(found[:, None] == found[None, :], expected[:, None] == expected[None, :])
    assert all(found[node] == min(np.flatnonzero(found == found[node])) for node in range(30))
