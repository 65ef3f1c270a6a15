"""Small pictures as data URIs, so that a page shows them without asking for anything."""

from __future__ import annotations

import base64

import cv2
import numpy as np
import simplejpeg

from manyeyes.errors import ImageError
from manyeyes.imaging.decode import DecodeLimits, inspect, probe

MAX_SIDE = 160
# Smaller pictures are kept to the pixel; a page enlarges them.
_LOSSLESS_SIDE = 64
_JPEG_QUALITY = 80
# What is damaged is decoded by lenient means, so only where it is small.
_MAX_DAMAGED_PIXELS = 4_000_000


def data_uri(pixels: np.ndarray) -> str:
    """A picture as a data URI: PNG where it is tiny, else JPEG of at most MAX_SIDE pixels.

    Args:
        pixels: uint8 (height, width, 3 or 1), RGB.
    """
    bgr = pixels[:, :, ::-1] if pixels.shape[2] == 3 else pixels
    if max(pixels.shape[:2]) <= _LOSSLESS_SIDE:
        return _encode(".png", bgr, "image/png")
    scale = MAX_SIDE / max(pixels.shape[:2])
    if scale < 1:
        size = (max(1, round(bgr.shape[1] * scale)), max(1, round(bgr.shape[0] * scale)))
        bgr = cv2.resize(np.ascontiguousarray(bgr), size, interpolation=cv2.INTER_AREA)
    return _encode(".jpg", bgr, "image/jpeg", cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY)


def data_uri_of_file(encoded: bytes) -> str | None:
    """A picture of a file that may be damaged: what of it can be decoded, or None."""
    try:
        return data_uri(inspect(encoded, limits=DecodeLimits(max_pixels=_MAX_DAMAGED_PIXELS))[0])
    except ImageError:
        pass
    try:
        info = probe(encoded)
        if info.width * info.height > _MAX_DAMAGED_PIXELS:
            return None
        if info.format == "jpeg":
            return data_uri(simplejpeg.decode_jpeg(encoded, "RGB", strict=False))
        found = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    except (ImageError, ValueError, cv2.error, MemoryError):
        return None
    return None if found is None else data_uri(np.ascontiguousarray(found[:, :, ::-1]))


def _encode(suffix: str, bgr: np.ndarray, kind: str, *options: int) -> str:
    done, encoded = cv2.imencode(suffix, np.ascontiguousarray(bgr), list(options))
    if not done:
        raise RuntimeError(f"OpenCV can't encode {suffix}")
    return f"data:{kind};base64,{base64.b64encode(encoded.tobytes()).decode()}"
