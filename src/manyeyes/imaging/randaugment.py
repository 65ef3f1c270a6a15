"""RandAugment: a few operations, drawn at random from fourteen, one after the other at one strength.

After Cubuk et al. 2019 (arXiv:1909.13719), with its ranges; what moves in from outside of the image is its mirror.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from manyeyes.imaging import geometry

_LUMA = np.array([0.299, 0.587, 0.114])
# RGB to brightness and the two axes of the colour plane (YIQ).
_TO_YIQ = np.array([_LUMA, [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])
_TO_RGB = np.linalg.inv(_TO_YIQ)
_KEEP_BRIGHTNESS = _TO_RGB @ np.diag([1.0, 0.0, 0.0]) @ _TO_YIQ
_KEEP_COLOUR = _TO_RGB @ np.diag([0.0, 1.0, 1.0]) @ _TO_YIQ
_TURN_COLOUR = _TO_RGB @ np.array([[0.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]]) @ _TO_YIQ
_SMOOTHING_KERNEL = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def colour_matrices(saturation: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """RGB matrices (n, 3, 3) that scale the colour plane by `saturation` and turn it by `angle` in radians."""
    along, across = saturation * np.cos(angle), saturation * np.sin(angle)
    return _KEEP_BRIGHTNESS + along[:, None, None] * _KEEP_COLOUR + across[:, None, None] * _TURN_COLOUR


def mean_brightness(image: np.ndarray) -> float:
    """The mean grey value of a uint8 array (H, W, C)."""
    means = cv2.mean(image)
    return means[0] if image.shape[2] == 1 else float(_LUMA @ means[:3])


def apply(image: np.ndarray, draws: np.ndarray, magnitude: float) -> np.ndarray:
    """Run one operation for each row of `draws`.

    Args:
        image: uint8 array (H, W, C), not modified.
        draws: float array (num_ops, 2) in [0, 1): which operation, and its sign.
        magnitude: strength in [0, 10].

    Returns:
        uint8 array (H, W, C).
    """
    for choice, sign in draws.tolist():
        operation = OPERATIONS[int(choice * len(OPERATIONS))]
        image = operation(image, magnitude / 10, 1.0 if sign < 0.5 else -1.0).reshape(image.shape)
    return image


def _identity(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    return image


def _auto_contrast(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    return _by_channel(
        image, lambda plane: cv2.normalize(plane, None, 0, 255, cv2.NORM_MINMAX) if np.ptp(plane) else plane
    )


def _equalize(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    return _by_channel(image, cv2.equalizeHist)


def _rotate(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    return geometry.rotate(image, 30 * strength * sign, background=None)


def _solarize(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    values = np.arange(256)
    return cv2.LUT(image, np.where(values < 256 * (1 - strength), values, 255 - values).astype(np.uint8))


def _posterize(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    return image & np.uint8(0xFF << round(4 * strength) & 0xFF)


def _contrast(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    factor = 1 + 0.9 * strength * sign
    values = np.arange(256) * factor + mean_brightness(image) * (1 - factor)
    return cv2.LUT(image, _to_uint8(values))


def _brightness(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    return cv2.LUT(image, _to_uint8(np.arange(256) * (1 + 0.9 * strength * sign)))


def _sharpness(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    factor = 1 + 0.9 * strength * sign
    smooth = cv2.filter2D(image, -1, _SMOOTHING_KERNEL).reshape(image.shape)
    return cv2.addWeighted(image, factor, smooth, 1 - factor, 0)


def _shear_x(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    return _warp(image, 1, 0.3 * strength * sign, 0, 1)


def _shear_y(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    return _warp(image, 1, 0, 0.3 * strength * sign, 1)


def _translate_x(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    return _move(image, round(0.45 * strength * sign * image.shape[1]), 0)


def _translate_y(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    return _move(image, 0, round(0.45 * strength * sign * image.shape[0]))


def _colour(image: np.ndarray, strength: float, sign: float) -> np.ndarray:
    if image.shape[2] == 1:
        return image
    return cv2.transform(image, colour_matrices(np.array([1 + 0.9 * strength * sign]), np.zeros(1))[0])


OPERATIONS: tuple[Callable[[np.ndarray, float, float], np.ndarray], ...] = (
    _identity,
    _auto_contrast,
    _equalize,
    _rotate,
    _solarize,
    _posterize,
    _contrast,
    _brightness,
    _sharpness,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
    _colour,
)


def _by_channel(image: np.ndarray, function: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    return np.stack([function(np.ascontiguousarray(image[:, :, c])) for c in range(image.shape[2])], axis=2)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _warp(image: np.ndarray, xx: float, xy: float, yx: float, yy: float) -> np.ndarray:
    return geometry.warp_affine(image, geometry.centred_matrix(xx, xy, yx, yy, *image.shape[:2]), background=None)


def _move(image: np.ndarray, dx: int, dy: int) -> np.ndarray:
    return geometry.warp_affine(image, np.array([[1.0, 0.0, dx], [0.0, 1.0, dy]]), background=None)
