"""Recurrent networks over images: rows as time steps, or the columns of a convolutional feature map."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import keras

from manyeyes.models import layers

# Unrolled, the recurrence exports to an ONNX graph without Loop nodes, which OpenVINO reads, and trains fast on a CPU;
# the graph grows with the number of steps, so long sequences keep the loop (and run on ONNX Runtime only).
MAX_UNROLLED_STEPS = 64


@dataclass(frozen=True)
class RnnOptions(layers.Options):
    """Settings of `gru` and `lstm`.

    Attributes:
        units: size of the state of one direction.
        layers: recurrent layers on top of each other.
        bidirectional: read the rows from the top and from the bottom.
    """

    units: int = 128
    layers: int = 1
    bidirectional: bool = False


@dataclass(frozen=True)
class CrnnOptions(layers.Options):
    """Settings of `crnn`.

    Attributes:
        width: filters of the first convolution; the second stage has twice as many.
        units: size of the state of one direction of the GRU.
    """

    width: int = 16
    units: int = 64


def gru(image: Any, options: RnnOptions) -> Any:
    """Read uint8 images (N, H, W, C) row by row with GRUs; returns the last state, (N, units or 2 * units)."""
    return _rows(image, options, keras.layers.GRU)


def lstm(image: Any, options: RnnOptions) -> Any:
    """Read uint8 images (N, H, W, C) row by row with LSTMs; returns the last state, (N, units or 2 * units)."""
    return _rows(image, options, keras.layers.LSTM)


def crnn(image: Any, options: CrnnOptions) -> Any:
    """Two convolutional stages that halve the image, then a bidirectional GRU over the columns; (N, 2 * units)."""
    layers.require_size("crnn", image, 4)
    x = layers.normalise(image)
    for stage in range(2):
        x = layers.conv_norm_relu(x, options.width * 2**stage, 3, f"stage{stage}")
        x = keras.layers.MaxPooling2D(name=f"stage{stage}_pool")(x)
    height, width, channels = x.shape[1:]
    x = keras.layers.Permute((2, 1, 3), name="columns_first")(x)
    x = keras.layers.Reshape((width, height * channels), name="columns")(x)
    return _recurrent(x, keras.layers.GRU, options.units, bidirectional=True, name="recurrent0")


def _rows(image: Any, options: RnnOptions, cell: type[keras.layers.Layer]) -> Any:
    height, width, channels = image.shape[1:]
    x = keras.layers.Reshape((height, width * channels), name="rows")(layers.normalise(image))
    for index in range(options.layers):
        x = _recurrent(
            x,
            cell,
            options.units,
            bidirectional=options.bidirectional,
            name=f"recurrent{index}",
            return_sequences=index < options.layers - 1,
        )
    return x


def _recurrent(
    x: Any,
    cell: type[keras.layers.Layer],
    units: int,
    *,
    bidirectional: bool,
    name: str,
    return_sequences: bool = False,
) -> Any:
    layer = cell(units, return_sequences=return_sequences, unroll=x.shape[1] <= MAX_UNROLLED_STEPS, name=name)
    return (keras.layers.Bidirectional(layer, name=name) if bidirectional else layer)(x)
