"""Which pixels decided: parts of the image are blurred away in turn, and how far the answer falls is put on the map.

Needs no gradients, so it works on every backend and precision; chosen by measurement:
docs/decisions/0112-saliency-and-streams.md.
"""

from __future__ import annotations

import functools
import time
import weakref

import cv2
import numpy as np

from manyeyes.errors import UsageError
from manyeyes.recognition.predictor import Predictor

# Windows along a side of the image; each calls for side² answers of the model, in batches that come out even.
_SIDES = (4, 8, 12)
_BATCH_SIZE = 16
# Each window is this many times as wide as the way to the next, so that they overlap.
_OVERLAP = 3
# The blur that takes detail away, as a share of the longer side. Blur keeps brightness and colour of the surroundings,
# which a grey patch does not: a patch is a thing by itself, which the model may take for something.
_BLUR = 1 / 8


def saliency(
    predictor: Predictor, pixels: np.ndarray, label: int | None = None, *, max_seconds: float = 1.0, side: int = 0
) -> np.ndarray:
    """Tell how much each pixel of an image contributes to the answer `label`.

    The same predictor gives the same map for the same image.

    Args:
        pixels: a model input, uint8 (height, width, channels), as of Predictor.preprocess.
        label: the class that is asked about; default: the likeliest.
        max_seconds: about how long it may take; the number of windows is chosen for it, once for a predictor.
        side: the number of windows along a side of the image, 4 to 32; default: of 4, 8, 12 as `max_seconds` allows.

    Returns:
        float32 (height, width) in [0, 1]: 0 where nothing is lost without the pixel, 1 where most is.

    Raises:
        UsageError: the pixels are no model input, there is no such label, or no such side.
    """
    probabilities = predictor.probabilities(pixels[None])
    label = int(probabilities[0].argmax()) if label is None else label
    if not 0 <= label < probabilities.shape[1]:
        raise UsageError(f"There is no label {label}: the model has {probabilities.shape[1]} classes, from 0 on.")
    if side and not 4 <= side <= 32:
        raise UsageError(f"side={side} is not possible. Use 4 to 32 windows along a side.")
    height, width = pixels.shape[:2]
    side = side or _affordable_side(predictor, max_seconds)
    windows = _windows(side, height, width)
    blurred = cv2.GaussianBlur(pixels, (0, 0), max(1.0, _BLUR * max(height, width))).reshape(pixels.shape)
    difference = blurred.astype(np.float32) - pixels
    whole = _margin(probabilities, label)[0]
    fall = np.zeros((height, width), np.float32)
    for start in range(0, len(windows), _BATCH_SIZE):
        part = windows[start : start + _BATCH_SIZE]
        batch = np.rint(pixels + part[..., None] * difference).astype(np.uint8)
        lost = whole - _margin(predictor.probabilities(batch), label)
        fall += np.tensordot(lost.astype(np.float32), part, axes=1)
    fall /= windows.sum(axis=0)
    np.maximum(fall, 0, out=fall)
    highest = float(fall.max())
    return fall / highest if highest > 0 else fall


def overlay(pixels: np.ndarray, saliency_map: np.ndarray, strength: float = 0.7) -> bytes:
    """Lay a map over its image, as a PNG of the size of the image.

    The colours are those of cividis, which look alike with and without colour blindness: yellow is what decided.

    Args:
        pixels: uint8 (height, width, 3 or 1), RGB.
        saliency_map: float32 (height, width) in [0, 1].
        strength: how much of a pixel is hidden where the map is 1.
    """
    heat = cv2.applyColorMap(np.uint8(np.rint(255 * np.clip(saliency_map, 0, 1))), cv2.COLORMAP_CIVIDIS)
    image = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, ::-1]
    # The image itself goes grey, or its own colours would be read as the map's.
    grey = np.repeat(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_BGR2GRAY)[:, :, None], 3, axis=2)
    done, encoded = cv2.imencode(".png", cv2.addWeighted(heat, strength, grey, 1 - strength, 0))
    if not done:
        raise RuntimeError("OpenCV can't encode PNG")
    return encoded.tobytes()


def _margin(probabilities: np.ndarray, label: int) -> np.ndarray:
    # Of a model that is sure a probability moves too little to be seen; its log odds do.
    p = np.clip(probabilities[:, label], 1e-9, 1 - 1e-9)
    return np.log(p) - np.log1p(-p)


@functools.lru_cache(maxsize=8)
def _windows(side: int, height: int, width: int) -> np.ndarray:
    """Soft windows, float32 (side², height, width): 1 inside, 0 outside."""
    cells = side + _OVERLAP - 1
    windows = []
    for row in range(side):
        for column in range(side):
            grid = np.zeros((cells, cells), np.float32)
            grid[row : row + _OVERLAP, column : column + _OVERLAP] = 1
            windows.append(cv2.resize(grid, (width, height), interpolation=cv2.INTER_LINEAR))
    return np.stack(windows)


_seconds_per_image: weakref.WeakKeyDictionary[Predictor, float] = weakref.WeakKeyDictionary()


def _affordable_side(predictor: Predictor, max_seconds: float) -> int:
    if predictor not in _seconds_per_image:
        batch = np.zeros((_BATCH_SIZE, *predictor.bundle.info.input_shape), np.uint8)
        predictor.logits(batch)
        started = time.perf_counter()
        predictor.logits(batch)
        _seconds_per_image[predictor] = (time.perf_counter() - started) / _BATCH_SIZE
    affordable = [side for side in _SIDES if side**2 * _seconds_per_image[predictor] <= max_seconds]
    return max(affordable, default=_SIDES[0])
