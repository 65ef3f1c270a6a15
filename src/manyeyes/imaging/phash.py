"""A 64-bit perceptual hash: images that look alike differ in few bits."""

from __future__ import annotations

import cv2
import numpy as np


def perceptual_hash(image: np.ndarray) -> int:
    """The DCT hash of an image.

    The image is reduced to 32 x 32 grey values; the hash says which of the 64 lowest frequencies of its cosine
    transform are above their median. Re-encoding and resizing change few bits; two different photos differ in about 32.

    Args:
        image: uint8 array (H, W, C), C = 1 or 3 (RGB).

    Returns:
        An integer in [-2**63, 2**63), so that it fits a signed 64-bit column.
    """
    # To 32 x 32 first: turning the whole of a large photo grey would cost more than the hash. By way of four samples a
    # cell and axis: the mean over all pixels of a photo costs as much as its decoding, and moves the hash no less.
    small = cv2.resize(image, (128, 128), interpolation=cv2.INTER_LINEAR) if min(image.shape[:2]) > 128 else image
    small = cv2.resize(small, (32, 32), interpolation=cv2.INTER_AREA).astype(np.float32)
    if small.ndim == 3:
        small = small @ np.array([0.299, 0.587, 0.114], np.float32)
    frequencies = cv2.dct(small)[:8, :8]
    ordered = np.sort(frequencies, axis=None)
    bits = frequencies > (ordered[31] + ordered[32]) / 2
    return int(np.packbits(bits).view(">i8")[0])


def hamming_distance(first: int, second: int) -> int:
    """The number of bits in which two hashes differ."""
    return ((first ^ second) & 0xFFFFFFFFFFFFFFFF).bit_count()
