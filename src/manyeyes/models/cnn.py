"""A small convolutional network for small images (28 to 64 pixels), made to train in minutes on a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from manyeyes.models import layers


@dataclass(frozen=True)
class CnnOptions(layers.Options):
    """Settings of `cnn`.

    Attributes:
        width: filters of the first stage; every further stage has twice as many.
        stages: groups of convolutions; the image is halved between two of them.
        convolutions: 3 x 3 convolutions in each stage but the first, which has one: at full size a convolution costs
            most and teaches least.
    """

    width: int = 16
    stages: int = 3
    convolutions: int = 2


def cnn(image: Any, options: CnnOptions) -> Any:
    """Map uint8 images (N, H, W, C) to features (N, width * 2 ** (stages - 1))."""
    layers.require_size("cnn", image, 2 ** (options.stages - 1))
    x = layers.normalise(image)
    for stage in range(options.stages):
        if stage > 0:
            x = keras.layers.MaxPooling2D(name=f"stage{stage}_pool")(x)
        for index in range(1 if stage == 0 else options.convolutions):
            x = layers.conv_norm_relu(x, options.width * 2**stage, 3, f"stage{stage}_{index}")
    return keras.layers.GlobalAveragePooling2D(name="pool")(x)
