"""From encoded bytes to pixels, with the promise that no bad image slips in silently.

JPEG is decoded by libjpeg-turbo through simplejpeg in its strict mode, which stops where the library would only warn;
the rest by OpenCV, after the structure of the file was checked (see containers). docs/decisions/0010 says why.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from manyeyes.errors import ImageError, Reason
from manyeyes.imaging.containers import ImageInfo, mend_jpeg_scan, png_transparent_grey, read_header, verify

__all__ = ["DECODER", "DecodeLimits", "ImageInfo", "decode", "probe"]

DECODER = "simplejpeg+opencv"
"""What stands in fingerprints for the way that `decode` makes pixels."""


@dataclass(frozen=True)
class DecodeLimits:
    """What is refused before it is decoded.

    Attributes:
        max_pixels: height times width, as the header says.
        max_bytes: of the encoded image.
    """

    max_pixels: int = 100_000_000
    max_bytes: int = 256 * 1024 * 1024


_DEFAULT_LIMITS = DecodeLimits()
_BAND_PIXELS = 1 << 17


def probe(encoded: bytes) -> ImageInfo:
    """Read format and size from the header, without decoding.

    Raises:
        ImageError: empty, not_an_image, unsupported_format, truncated or corrupt.
    """
    return read_header(encoded)


def decode(
    encoded: bytes, *, channels: int = 3, background: int = 255, limits: DecodeLimits | None = None
) -> np.ndarray:
    """Decode one image; of an animation or a document, the first frame or page.

    EXIF orientation is applied, transparency is laid on the background, samples of 16 bits keep their upper 8.

    Args:
        channels: 3 (RGB) or 1 (grey).
        background: grey value in [0, 255] below transparency.
        limits: what is refused before it is decoded.

    Returns:
        uint8 array (height, width, channels), C-contiguous.

    Raises:
        ImageError: the reason says why it can't be used.
    """
    return _decode(encoded, channels, background, limits, None)[0]


def inspect(
    encoded: bytes,
    *,
    channels: int = 3,
    background: int = 255,
    limits: DecodeLimits | None = None,
    min_side: int = 96,
) -> tuple[np.ndarray, int, int]:
    """Read all of an image as `decode` does, and refuse what it refuses, but make fewer pixels where that is cheaper.

    A JPEG comes at 1/2, 1/4 or 1/8 of its size, as long as its shorter side keeps `min_side` pixels; these pixels are
    not those of a resize, so they are for looking only.

    Returns:
        The image as of `decode`, and the height and width in pixels that `decode` would give.

    Raises:
        ImageError: as `decode`.
    """
    return _decode(encoded, channels, background, limits, min_side)


def _decode(
    encoded: bytes, channels: int, background: int, limits: DecodeLimits | None, min_side: int | None
) -> tuple[np.ndarray, int, int]:
    limits = limits or _DEFAULT_LIMITS
    if len(encoded) > limits.max_bytes:
        raise ImageError(Reason.TOO_MANY_BYTES, f"{len(encoded)} bytes, the limit is {limits.max_bytes}")
    info = read_header(encoded)
    if info.width * info.height > limits.max_pixels:
        raise ImageError(
            Reason.TOO_MANY_PIXELS, f"{info.width} x {info.height}, the limit is {limits.max_pixels} pixels"
        )
    orientation = verify(encoded, info)
    if info.format == "jpeg":
        image = _decode_jpeg(encoded, channels, None if min_side is None else _scaled_size(info, min_side))
    else:
        image = _decode_other(encoded, info.format, channels, background)
    if info.format == "tiff":
        # OpenCV turns a TIFF upright always, the others never (as asked).
        expected = (info.width, info.height) if orientation >= 5 else (info.height, info.width)
        orientation = 1
    else:
        expected = (info.height, info.width)
    if image.shape[:2] != expected and (min_side is None or image.shape[:2] != _scaled_size(info, min_side)):
        raise ImageError(Reason.CORRUPT, f"the header says {expected} rows and columns, there are {image.shape[:2]}")
    if orientation == 1:
        return image, *expected
    height, width = expected if orientation < 5 else expected[::-1]
    return _upright(image, orientation), height, width


def _scaled_size(info: ImageInfo, min_side: int) -> tuple[int, int]:
    """The (height, width) to inspect a JPEG at."""
    factor = 1
    while factor < 8 and min(info.height, info.width) >= 2 * factor * min_side:
        factor *= 2
    return -(-info.height // factor), -(-info.width // factor)


def _decode_jpeg(encoded: bytes, channels: int, size: tuple[int, int] | None) -> np.ndarray:
    colour_space = "RGB" if channels == 3 else "GRAY"
    options = {} if size is None else {"min_height": size[0], "min_width": size[1]}
    try:
        try:
            return simplejpeg.decode_jpeg(encoded, colour_space, **options)
        except ValueError as error:
            if "Invalid SOS parameters" not in str(error):
                raise
            return simplejpeg.decode_jpeg(mend_jpeg_scan(encoded), colour_space, **options)
    except (ValueError, MemoryError) as error:
        message = str(error)
    if "subsampling" in message:
        # TurboJPEG knows the usual ratios only. Here a missing end is found, but not damage within the pixels.
        if encoded.rfind(b"\xff\xd9") < 0:
            raise ImageError(Reason.TRUNCATED, "JPEG without its end marker")
        return _decode_other(encoded, "jpeg", channels, background=255)
    reason = Reason.TRUNCATED if "Premature end" in message else Reason.CORRUPT
    raise ImageError(reason, message)


def _decode_other(encoded: bytes, format_name: str, channels: int, background: int) -> np.ndarray:
    try:
        # Unchanged leaves EXIF orientation to us as well: OpenCV's support for it differs between formats.
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise ImageError(Reason.CORRUPT, " ".join(str(error).split())) from None
    if image is None:
        raise ImageError(Reason.CORRUPT, "the pixels can't be decoded")
    # libtiff gives 8-bit colours that are already multiplied with their opacity.
    premultiplied = format_name == "tiff" and image.dtype == np.uint8
    transparent = png_transparent_grey(encoded) if format_name == "png" and image.ndim == 2 else None
    if transparent is not None:
        image[image == transparent] = background * 257 if image.dtype == np.uint16 else background
    if image.dtype == np.uint16:
        image = _upper_bytes(image)
    if image.dtype != np.uint8:
        raise ImageError(Reason.UNSUPPORTED_FORMAT, f"samples of type {image.dtype}")
    if image.ndim == 3 and image.shape[2] == 4:
        image = _without_alpha(image, background, premultiplied)
    if image.ndim == 2:
        return image[:, :, None] if channels == 1 else cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    if channels == 1:
        return cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)[:, :, None]
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _without_alpha(image: np.ndarray, background: int, premultiplied: bool) -> np.ndarray:
    colours, alpha = image[:, :, :3], image[:, :, 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(colours)
    laid = np.empty_like(colours, order="C")
    for rows in _bands(image):
        opacity = alpha[rows].astype(np.uint16)
        behind = background * (255 - opacity)
        if premultiplied:
            laid[rows] = np.minimum(colours[rows] + (behind + 127) // 255, 255)
        else:
            laid[rows] = (colours[rows] * opacity + behind + 127) // 255
    return laid


def _upper_bytes(image: np.ndarray) -> np.ndarray:
    upper = np.empty(image.shape, np.uint8)
    for rows in _bands(image):
        upper[rows] = image[rows] >> 8
    return upper


def _bands(image: np.ndarray) -> Iterator[slice]:
    """Rows that are worked on together: what is between would take several times the memory of a large image."""
    num_rows = max(1, _BAND_PIXELS // image.shape[1])
    return (slice(start, start + num_rows) for start in range(0, len(image), num_rows))


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)
