"""What the backbones share: normalisation of pixels, normalisation layers, and the check of the input size.

Every layer with weights gets a name of its own, so that a weight has the same path in every process and a weights file
fits however many models were built before.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import keras

from manyeyes.errors import ConfigError, UsageError

# Not Keras's 0.99, whose statistics lag behind in a training of a few hundred steps.
NORM_MOMENTUM = 0.9


@dataclass(frozen=True)
class Options:
    """Base of the settings of one model alone, and the whole of them for a model that has none.

    Raises:
        ConfigError: a number is not above zero.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"model.options.{field.name}={value} is not possible. Use a number above 0.")


def normalise(image: Any, scale: float = 1 / 127.5, offset: float = -1.0) -> Any:
    """Map uint8 pixels to float32 `pixel * scale + offset`, by default [0, 255] to [-1, 1].

    It is computed in float32 under every precision: bfloat16 would round the pixels to eight bits a second time.
    """
    return keras.layers.Rescaling(scale, offset, dtype="float32", name="normalise")(image)


def batch_norm(name: str, **arguments: Any) -> keras.layers.Layer:
    """The one place that makes normalisation layers."""
    return keras.layers.BatchNormalization(name=name, **{"momentum": NORM_MOMENTUM, "epsilon": 1e-5, **arguments})


def conv_norm(x: Any, filters: int, kernel_size: int, name: str, strides: int = 1, **norm_arguments: Any) -> Any:
    """Convolution without bias, then batch normalisation; (N, H, W, C) to (N, ceil(H / strides), ..., filters)."""
    x = keras.layers.Conv2D(
        filters,
        kernel_size,
        strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=f"{name}_conv",
    )(x)
    return batch_norm(f"{name}_norm", **norm_arguments)(x)


def conv_norm_relu(x: Any, filters: int, kernel_size: int, name: str, strides: int = 1) -> Any:
    """`conv_norm`, then ReLU."""
    return keras.layers.ReLU(name=f"{name}_relu")(conv_norm(x, filters, kernel_size, name, strides))


def require_size(name: str, image: Any, smallest: int) -> None:
    """Refuse an image that shrinks to nothing in the model.

    Raises:
        UsageError: a side is below `smallest` pixels.
    """
    height, width = image.shape[1:3]
    if min(height, width) < smallest:
        raise UsageError(
            f"Model {name} can't take images of {height} x {width} pixels. "
            f"Use at least {smallest} x {smallest}, or another model."
        )


def require_channels(name: str, image: Any, channels: int) -> None:
    """Refuse an image of another number of channels.

    Raises:
        UsageError: the image has not `channels` channels.
    """
    if image.shape[-1] != channels:
        raise UsageError(
            f"Model {name} can't take images of {image.shape[-1]} channels. "
            f"Ingest them with {channels}, or use another model."
        )
