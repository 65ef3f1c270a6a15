"""Residual networks (He et al. 2015), with the stride in the 3 x 3 convolution and a stem for small images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import keras

from manyeyes.models import layers

_LARGEST_SMALL_IMAGE = 64


@dataclass(frozen=True)
class ResNetOptions(layers.Options):
    """Settings of `resnet18`, `resnet34` and `resnet50`.

    Attributes:
        width: filters of the first stage; every further stage has twice as many.
        stem: "imagenet" shrinks the image fourfold at the start, "small" not at all; "auto" is "small" for images of at
            most 64 pixels.
    """

    width: int = 64
    stem: Literal["auto", "small", "imagenet"] = "auto"


def resnet18(image: Any, options: ResNetOptions) -> Any:
    """Map uint8 images (N, H, W, C) to features (N, 8 * width)."""
    return _resnet("resnet18", image, options, (2, 2, 2, 2), _basic_block)


def resnet34(image: Any, options: ResNetOptions) -> Any:
    """Map uint8 images (N, H, W, C) to features (N, 8 * width)."""
    return _resnet("resnet34", image, options, (3, 4, 6, 3), _basic_block)


def resnet50(image: Any, options: ResNetOptions) -> Any:
    """Map uint8 images (N, H, W, C) to features (N, 32 * width)."""
    return _resnet("resnet50", image, options, (3, 4, 6, 3), _bottleneck_block)


def _resnet(name: str, image: Any, options: ResNetOptions, depths: tuple[int, ...], block: Any) -> Any:
    small = options.stem == "small" or (options.stem == "auto" and max(image.shape[1:3]) <= _LARGEST_SMALL_IMAGE)
    layers.require_size(name, image, 8 if small else 32)
    x = layers.normalise(image)
    if small:
        x = layers.conv_norm_relu(x, options.width, 3, "stem")
    else:
        x = layers.conv_norm_relu(x, options.width, 7, "stem", strides=2)
        x = keras.layers.MaxPooling2D(3, 2, padding="same", name="stem_pool")(x)
    for stage, depth in enumerate(depths):
        for index in range(depth):
            strides = 2 if stage > 0 and index == 0 else 1
            x = block(x, options.width * 2**stage, strides, f"stage{stage}_{index}")
    return keras.layers.GlobalAveragePooling2D(name="pool")(x)


def _basic_block(x: Any, filters: int, strides: int, name: str) -> Any:
    residual = layers.conv_norm_relu(x, filters, 3, f"{name}_a", strides)
    # A block that starts as the identity (last gamma zero) lets a deep network train at a full learning rate at once.
    residual = layers.conv_norm(residual, filters, 3, f"{name}_b", gamma_initializer="zeros")
    return _join(x, residual, filters, strides, name)


def _bottleneck_block(x: Any, filters: int, strides: int, name: str) -> Any:
    residual = layers.conv_norm_relu(x, filters, 1, f"{name}_a")
    residual = layers.conv_norm_relu(residual, filters, 3, f"{name}_b", strides)
    residual = layers.conv_norm(residual, 4 * filters, 1, f"{name}_c", gamma_initializer="zeros")
    return _join(x, residual, 4 * filters, strides, name)


def _join(x: Any, residual: Any, filters: int, strides: int, name: str) -> Any:
    if strides > 1 or x.shape[-1] != filters:
        x = layers.conv_norm(x, filters, 1, f"{name}_shortcut", strides)
    x = keras.layers.Add(name=f"{name}_add")([x, residual])
    return keras.layers.ReLU(name=f"{name}_relu")(x)
