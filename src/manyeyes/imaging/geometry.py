"""Geometry of images: uint8 arrays (H, W, C) in and out, the input never modified.

A function whose work is already done returns its input itself, not a copy. The channel axis stays an axis where C is 1.
"""

from __future__ import annotations

import math

import cv2
import numpy as np

from manyeyes.errors import ImageError, Reason, UsageError

MAX_OUTPUT_PIXELS = 100_000_000

_INTERPOLATIONS = {
    "area": cv2.INTER_AREA,
    "linear": cv2.INTER_LINEAR,
    "cubic": cv2.INTER_CUBIC,
    "nearest": cv2.INTER_NEAREST,
}


def resize(image: np.ndarray, height: int, width: int, interpolation: str = "auto") -> np.ndarray:
    """Resize to exactly (height, width) pixels, ignoring the aspect ratio.

    Args:
        interpolation: "area", "linear", "cubic", "nearest", or "auto": area along an axis that shrinks, linear along
            one that grows.

    Raises:
        ImageError: the result would have more than MAX_OUTPUT_PIXELS pixels (a thin image that is enlarged).
        UsageError: an unknown interpolation.
    """
    old_height, old_width, channels = image.shape
    if (old_height, old_width) == (height, width):
        return image
    if height * width > MAX_OUTPUT_PIXELS:
        raise ImageError(
            Reason.TOO_MANY_PIXELS, f"{old_height} x {old_width} pixels would be resized to {height} x {width}"
        )
    if interpolation != "auto":
        if interpolation not in _INTERPOLATIONS:
            raise UsageError(f"interpolation={interpolation!r} is not one of auto, {', '.join(_INTERPOLATIONS)}.")
        image = cv2.resize(image, (width, height), interpolation=_INTERPOLATIONS[interpolation])
        return image.reshape(height, width, channels)
    smaller_height, smaller_width = min(old_height, height), min(old_width, width)
    if (smaller_height, smaller_width) != (old_height, old_width):
        image = _shrink(image, smaller_height, smaller_width)
    if (smaller_height, smaller_width) != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image.reshape(height, width, channels)


def resize_short(image: np.ndarray, size: int, interpolation: str = "auto") -> np.ndarray:
    """Resize so that the shorter side has `size` pixels, keeping the aspect ratio."""
    height, width = image.shape[:2]
    if height <= width:
        return resize(image, size, _scaled(width, size, height), interpolation)
    return resize(image, _scaled(height, size, width), size, interpolation)


def cover(image: np.ndarray, height: int, width: int, interpolation: str = "auto") -> np.ndarray:
    """Resize to the smallest size that covers (height, width), keeping the aspect ratio."""
    old_height, old_width = image.shape[:2]
    if height * old_width >= width * old_height:
        return resize(image, height, max(width, _scaled(old_width, height, old_height)), interpolation)
    return resize(image, max(height, _scaled(old_height, width, old_width)), width, interpolation)


def fit_into(
    image: np.ndarray, height: int, width: int, interpolation: str = "auto", background: int = 255
) -> np.ndarray:
    """Resize to the largest size that fits into (height, width) and keeps the aspect ratio, on the background."""
    old_height, old_width = image.shape[:2]
    if height * old_width <= width * old_height:
        image = resize(image, height, min(width, _scaled(old_width, height, old_height)), interpolation)
    else:
        image = resize(image, min(height, _scaled(old_height, width, old_width)), width, interpolation)
    return center_crop(image, height, width, background)


def center_crop(image: np.ndarray, height: int, width: int, background: int = 255) -> np.ndarray:
    """The central (height, width) pixels; where the image is smaller, it is centred on the background.

    Where a margin is odd, the larger half is at the bottom and the right.
    """
    old_height, old_width, channels = image.shape
    if (old_height, old_width) == (height, width):
        return image
    from_y, from_x = max(0, old_height - height) // 2, max(0, old_width - width) // 2
    to_y, to_x = max(0, height - old_height) // 2, max(0, width - old_width) // 2
    num_rows, num_columns = min(height, old_height), min(width, old_width)
    if (num_rows, num_columns) == (height, width):
        return crop(image, from_y, from_x, height, width)
    result = np.full((height, width, channels), background, np.uint8)
    result[to_y : to_y + num_rows, to_x : to_x + num_columns] = image[
        from_y : from_y + num_rows, from_x : from_x + num_columns
    ]
    return result


def crop(image: np.ndarray, top: int, left: int, height: int, width: int) -> np.ndarray:
    """The region of (height, width) pixels whose first pixel is (top, left).

    Raises:
        UsageError: the region is empty or not inside the image.
    """
    old_height, old_width = image.shape[:2]
    if not (0 <= top < top + height <= old_height and 0 <= left < left + width <= old_width):
        raise UsageError(
            f"A crop of {height} x {width} at ({top}, {left}) is not inside the image of {old_height} x {old_width}."
        )
    if (old_height, old_width) == (height, width):
        return image
    return np.ascontiguousarray(image[top : top + height, left : left + width])


def flip_horizontal(image: np.ndarray) -> np.ndarray:
    """Left becomes right."""
    return cv2.flip(image, 1).reshape(image.shape)


def flip_vertical(image: np.ndarray) -> np.ndarray:
    """Top becomes bottom."""
    return cv2.flip(image, 0).reshape(image.shape)


def rotate(image: np.ndarray, degrees: float, background: int | None = 255) -> np.ndarray:
    """Rotate counter-clockwise about the centre, keeping the size; what was outside is filled as in `warp_affine`."""
    if degrees % 360 == 0:
        return image
    height, width = image.shape[:2]
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return warp_affine(image, centred_matrix(cosine, -sine, sine, cosine, height, width), background)


def centred_matrix(xx: float, xy: float, yx: float, yy: float, height: int, width: int) -> np.ndarray:
    """The matrix (2, 3) for `warp_affine` of the linear map [[xx, xy], [yx, yy]] that keeps the centre in its place."""
    x, y = (width - 1) / 2, (height - 1) / 2
    return np.array([[xx, xy, x - xx * x - xy * y], [yx, yy, y - yx * x - yy * y]])


def warp_affine(image: np.ndarray, matrix: np.ndarray, background: int | None = 255) -> np.ndarray:
    """Warp with linear interpolation, keeping the size.

    Args:
        matrix: float array (2, 3) that maps (x, y, 1) of a result pixel to (x, y) of the image.
        background: grey value for what was outside of the image; None mirrors the image at its border.
    """
    height, width, channels = image.shape
    border = cv2.BORDER_REFLECT_101 if background is None else cv2.BORDER_CONSTANT
    result = cv2.warpAffine(
        image,
        matrix,
        (width, height),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=border,
        borderValue=(background or 0,) * 4,
    )
    return result.reshape(height, width, channels)


def _shrink(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize to (height, width), neither above the old: linear to near by, then exact means of 2 x 2 pixels.

    OpenCV's area interpolation takes longer than the decoding of a JPEG, except by whole factors (docs/decisions/0020).
    """
    halvings_y, halvings_x = _halvings(image.shape[0], height), _halvings(image.shape[1], width)
    if not halvings_y and not halvings_x:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    size = (width << halvings_x, height << halvings_y)
    if size != (image.shape[1], image.shape[0]):
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
    # Two steps: by 2 x 2 there is vector code, and each step rounds.
    if halvings_y and halvings_x and halvings_y + halvings_x > 2:
        size = (size[0] // 2, size[1] // 2)
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def _halvings(old: int, new: int) -> int:
    """How often `old` can be halved until it is below 1.5 times `new`; after them the linear step is by 0.75 to 1.5."""
    count = 0
    while 2 * old >= 3 * (new << count):
        count += 1
    return count


def _scaled(length: int, numerator: int, denominator: int) -> int:
    """length * numerator / denominator, rounded half up in whole numbers, at least 1."""
    return max(1, (2 * length * numerator + denominator) // (2 * denominator))
