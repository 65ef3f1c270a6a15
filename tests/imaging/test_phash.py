from __future__ import annotations

import itertools
from collections.abc import Callable

import cv2
import numpy as np
import pytest

from manyeyes.imaging.decode import decode
from manyeyes.imaging.phash import hamming_distance, perceptual_hash


def test_the_hash_fits_a_signed_64_bit_column(photos: list[np.ndarray]) -> None:
    hashes = [perceptual_hash(photo) for photo in photos]
    assert all(isinstance(value, int) for value in hashes)
    assert [int(value) for value in np.array(hashes, np.int64)] == hashes


@pytest.mark.parametrize("size", [(112, 112), (300, 300), (180, 240)])
def test_a_resized_photo_keeps_its_hash_up_to_few_bits(photos: list[np.ndarray], size: tuple[int, int]) -> None:
    for photo in photos:
        smaller = cv2.resize(photo, size, interpolation=cv2.INTER_AREA)
        assert hamming_distance(perceptual_hash(photo), perceptual_hash(smaller)) <= 6


def test_a_re_encoded_photo_keeps_its_hash_up_to_few_bits(
    photos: list[np.ndarray], encode: Callable[..., bytes]
) -> None:
    for photo in photos:
        again = decode(encode(photo, "JPEG", quality=40))
        assert hamming_distance(perceptual_hash(photo), perceptual_hash(again)) <= 6


def test_different_photos_are_far_apart(photos: list[np.ndarray]) -> None:
    hashes = [perceptual_hash(photo) for photo in photos]
    distances = [hamming_distance(one, other) for one, other in itertools.combinations(hashes, 2)]
    assert min(distances) >= 12
    assert 28 <= np.mean(distances) <= 36


def test_colour_and_grey_of_one_photo_have_nearly_the_same_hash(photos: list[np.ndarray]) -> None:
    for photo in photos:
        grey = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)[:, :, None]
        assert hamming_distance(perceptual_hash(photo), perceptual_hash(grey)) <= 4


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 500, 1), (28, 28, 1)])
def test_any_size_has_a_hash(shape: tuple[int, int, int]) -> None:
    assert isinstance(perceptual_hash(np.full(shape, 9, np.uint8)), int)


def test_the_distance_counts_bits_of_negative_hashes_too() -> None:
    assert hamming_distance(-1, 0) == 64
    assert hamming_distance(-(2**63), 0) == 1
    assert hamming_distance(5, 5) == 0
