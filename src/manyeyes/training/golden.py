"""Makes the encoded inputs of golden examples: stored images, and variants that take every branch of decoding."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import cv2
import numpy as np

_ORIENTATION_TAG = 0x0112
# Golden examples travel with the bundle, so photos are made smaller first.
_MAX_SIDE = 512


def encode_variants(images: Sequence[np.ndarray], num_examples: int) -> list[tuple[str, bytes]]:
    """Encode images, each in the next of four ways: as they are, resized, rotated by EXIF, with transparency.

    Args:
        images: at least one uint8 array (height, width, 3 or 1), RGB; taken in turn.
        num_examples: how many to make.

    Returns:
        (name, encoded bytes) of each; the same for the same images.
    """
    variants = (_png, _resized_jpeg, _rotated_jpeg, _transparent_png)
    examples = []
    for index in range(num_examples):
        variant = variants[index % len(variants)]
        examples.append((f"{index}-{variant.__name__.strip('_')}", variant(images[index % len(images)])))
    return examples


def bounded(image: np.ndarray) -> np.ndarray:
    """The image, uint8 (height, width, channels), or a smaller one whose longer side has 512 pixels."""
    scale = _MAX_SIDE / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(1, round(scale * side)) for side in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA).reshape(height, width, image.shape[2])


def _png(image: np.ndarray) -> bytes:
    return _encode(".png", image)


def _resized_jpeg(image: np.ndarray) -> bytes:
    height, width = image.shape[:2]
    resized = cv2.resize(image, (2 * width + 3, height + height // 2 + 1), interpolation=cv2.INTER_LINEAR)
    return _encode(".jpg", resized.reshape(*resized.shape[:2], image.shape[2]))


def _rotated_jpeg(image: np.ndarray) -> bytes:
    # Stored lying on its side; orientation 6 asks the reader for a quarter turn clockwise.
    jpeg = _encode(".jpg", np.rot90(image))
    tiff = struct.pack("<2sHIHHHIHHI", b"II", 42, 8, 1, _ORIENTATION_TAG, 3, 1, 6, 0, 0)
    exif = b"Exif\0\0" + tiff
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + jpeg[2:]


def _transparent_png(image: np.ndarray) -> bytes:
    height, width, channels = image.shape
    colour = image if channels == 3 else np.repeat(image, 3, axis=2)
    alpha = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8), (height, width))
    return _encode(".png", np.dstack([colour, alpha]))


def _encode(suffix: str, image: np.ndarray) -> bytes:
    order = {1: [0], 3: [2, 1, 0], 4: [2, 1, 0, 3]}[image.shape[2]]
    done, encoded = cv2.imencode(suffix, np.ascontiguousarray(image[:, :, order]))
    if not done:
        raise RuntimeError(f"OpenCV can't encode {suffix}")
    return encoded.tobytes()
