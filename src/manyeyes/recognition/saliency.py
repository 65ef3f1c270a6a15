"""Which pixels decided: halves of the image are blurred away in many ways, and the share of each part is solved for.

Needs no gradients, so it works on every backend and precision; chosen by measurement:
docs/decisions/0112-saliency-and-streams.md.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import cv2
import numpy as np

from manyeyes.errors import UsageError
from manyeyes.recognition.predictor import Predictor

# Cells along a side of the map, and answers of the model that it takes: what is solved for needs more than its cells.
_LEVELS = ((4, 32), (5, 64), (7, 144), (8, 288))
# By level: for whoever has to know what a map costs.
NUM_ANSWERS = tuple(num_masks for _, num_masks in _LEVELS)
_BATCH_SIZE = 16
# Ridge of the least squares, as a share of what the answers weigh: half of the cells are hidden at a time.
_RIDGE = 0.5
# The blur that takes detail away, as a share of the longer side. Blur keeps brightness and colour of the surroundings,
# which a grey patch does not: a patch is a thing by itself, which the model may take for something.
_BLUR = 1 / 8
# Pixels along the shorter side of an input whose model is taken to be fast.
_SMALL_SIDE = 96
# Of the shorter side of a picture, so that people see it.
_MIN_SIDE = 224


def saliency(
    predictor: Predictor,
    pixels: np.ndarray,
    label: int | None = None,
    *,
    level: int | None = None,
) -> np.ndarray:
    """Tell how much each pixel of an image contributes to the answer `label`.

    A bundle gives the same map for the same image, wherever and whenever it is asked.

    Args:
        pixels: a model input, uint8 (height, width, channels), as of Predictor.preprocess.
        label: the class that is asked about; default: the likeliest.
        level: 0 to 3: 4 x 4 cells by 32 answers of the model, 5 x 5 by 64, 7 x 7 by 144, or 8 x 8 by 288; default: see
            default_level.

    Returns:
        float32 (height, width) in [0, 1]: 0 where nothing is lost without the pixel, 1 where most is.

    Raises:
        UsageError: the pixels are no model input, there is no such label, or no such level.
    """
    info = predictor.bundle.info
    if pixels.dtype != np.uint8 or pixels.shape != info.input_shape:
        raise UsageError(f"The image is {pixels.dtype} {pixels.shape}; expected uint8 {info.input_shape}.")
    if label is None:
        label = int(predictor.logits(pixels[None])[0].argmax())
    if not 0 <= label < len(info.class_names):
        raise UsageError(f"There is no label {label}: the model has {len(info.class_names)} classes, from 0 on.")
    if level is not None and not 0 <= level < len(_LEVELS):
        raise UsageError(f"level={level} is not one of {', '.join(map(str, range(len(_LEVELS))))}.")
    chosen = default_level(info.input_shape) if level is None else level
    return solve(predictor.probabilities, pixels, label, chosen)


def default_level(input_shape: tuple[int, int, int]) -> int:
    """The level for a model's input: 3 for small images, whose models answer fast, else 1: about a second on two cores.

    By size and not by a measured speed, or a busy machine would give another map for the same image.
    """
    return 3 if min(input_shape[:2]) <= _SMALL_SIDE else 1


def solve(probabilities: Callable[[np.ndarray], np.ndarray], pixels: np.ndarray, label: int, level: int) -> np.ndarray:
    """See `saliency`, for any model.

    Args:
        probabilities: from uint8 (n, height, width, channels), n <= 16, to float (n, num_classes).
    """
    height, width = pixels.shape[:2]
    cells, num_masks = _LEVELS[level]
    hidden = _hidden(cells, num_masks)
    difference = _blurred(pixels).astype(np.float32) - pixels
    lost = []
    for start in range(0, num_masks, _BATCH_SIZE):
        # One after the other: a batch of floats would be larger than the caches.
        batch = np.stack(
            [
                np.rint(pixels + cv2.resize(mask, (width, height))[..., None] * difference).astype(np.uint8)
                for mask in hidden[start : start + _BATCH_SIZE]
            ]
        )
        lost.append(-_margin(probabilities(batch), label))
    weights = _least_squares(hidden.reshape(num_masks, -1), np.concatenate(lost)).reshape(cells, cells)
    fall = cv2.resize(weights.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    np.maximum(fall, 0, out=fall)
    highest = float(fall.max())
    return fall / highest if highest > 0 else fall


def overlay(pixels: np.ndarray, saliency_map: np.ndarray, strength: float = 0.7) -> bytes:
    """Lay a map over its image, as a PNG: of the size of the image, or of a multiple of it for a small one.

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
    picture = cv2.addWeighted(heat, strength, grey, 1 - strength, 0)
    factor = -(-_MIN_SIDE // min(picture.shape[:2]))
    if factor > 1:
        picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)
    done, encoded = cv2.imencode(".png", picture)
    if not done:
        raise RuntimeError("OpenCV can't encode PNG")
    return encoded.tobytes()


def _margin(probabilities: np.ndarray, label: int) -> np.ndarray:
    # Of a model that is sure a probability moves too little to be seen; its log odds do.
    p = np.clip(probabilities[:, label], 1e-9, 1 - 1e-9)
    return np.log(p) - np.log1p(-p)


def _blurred(pixels: np.ndarray) -> np.ndarray:
    # A strong blur of a large image is that of a small one, a hundred times as fast.
    height, width = pixels.shape[:2]
    scale = min(1.0, 56 / max(height, width))
    small = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    soft = cv2.GaussianBlur(small, (0, 0), max(1.0, _BLUR * max(small.shape[:2])))
    return cv2.resize(soft, (width, height)).reshape(pixels.shape)


@functools.lru_cache(maxsize=len(_LEVELS))
def _hidden(cells: int, num_masks: int) -> np.ndarray:
    """Which cells are hidden, float32 (num_masks, cells, cells) of 0 and 1: by a hash, and then their opposite."""
    masks = []
    for index in range(num_masks // 2):
        digest = hashlib.sha256(f"{cells} {index}".encode()).digest()
        bits = np.unpackbits(np.frombuffer(digest, np.uint8))[: cells * cells].reshape(cells, cells)
        masks += [bits, 1 - bits]
    return np.stack(masks).astype(np.float32)


def _least_squares(hidden: np.ndarray, lost: np.ndarray) -> np.ndarray:
    """How much is lost by each cell, if what is lost by several is their sum."""
    centred = hidden - 0.5
    gram = centred.T @ centred + _RIDGE * len(hidden) / 4 * np.eye(hidden.shape[1])
    return np.linalg.solve(gram, centred.T @ (lost - lost.mean()))
