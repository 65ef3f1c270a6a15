"""An explanation as a picture."""

from __future__ import annotations

import cv2
import numpy as np

from manyeyes.serving.models import Explanation

_MIN_SIDE = 224


def overlay_png(explanation: Explanation) -> bytes:
    """The model's input with a map of what decided over it: violet is nothing, yellow most. As a PNG."""
    pixels = explanation.pixels
    if pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    heat = cv2.applyColorMap(np.uint8(255 * np.clip(explanation.saliency, 0, 1)), cv2.COLORMAP_INFERNO)
    blended = cv2.addWeighted(cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), 0.5, heat, 0.5, 0)
    scale = -(-_MIN_SIDE // min(blended.shape[:2]))
    if scale > 1:
        blended = cv2.resize(blended, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
    return cv2.imencode(".png", blended)[1].tobytes()
