"""Batch normalisation over the global batch: every worker normalises with the moments of all workers' examples."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from manyeyes.training.collective import Collective


def synchronize_norms(model: keras.Model, collective: Collective, present: Callable[[], Any]) -> int:
    """Make the batch normalisations of a model take their moments over all workers; returns how many there are.

    The model is then called only inside of `collective.among_workers`.

    Args:
        present: gives 0 where this worker's images stand in for none (see Replica.stand_in), else 1.

    Keras's own `synchronized=True` sums counts, values and squares by three exchanges a layer and takes the variance
    as a difference of two large numbers, which in float32 moves gradients by up to 3e-3. Here each worker computes its
    mean and its sum of squares around it, one exchange brings them together (Chan et al.), and nothing cancels.
    """
    num = 0
    for layer in _norms(model):
        layer._moments = functools.partial(_global_moments, collective, present, layer)
        num += 1
    return num


def _norms(layer: Any) -> Iterator[Any]:
    if isinstance(layer, keras.layers.BatchNormalization):
        yield layer
    for inner in getattr(layer, "layers", ()):
        yield from _norms(inner)


def _global_moments(
    collective: Collective, present: Callable[[], Any], layer: Any, inputs: tf.Tensor, mask: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance of each channel over the examples of all workers, float (channels,)."""
    assert mask is None, "no model of Manyeyes masks what it normalises"
    axes = layer._reduction_axes
    num_channels = inputs.shape[layer.axis]
    weight = tf.cast(present(), inputs.dtype)
    count = tf.cast(tf.size(inputs) // num_channels, inputs.dtype)
    mean = tf.reduce_sum(inputs, axes, keepdims=True) / count
    squares = tf.reduce_sum(tf.math.squared_difference(inputs, mean), axes) * weight
    of_all = collective.gather_inside(tf.concat([(count * weight)[None], tf.reshape(mean, [-1]), squares], axis=0))
    counts, means, squares_of_all = tf.split(of_all, [1, num_channels, num_channels], axis=1)
    # No worker may have an example, where each takes several parts of a small last batch.
    total = tf.reduce_sum(counts)
    global_mean = tf.math.divide_no_nan(tf.reduce_sum(counts * means, axis=0), total)
    spread = tf.reduce_sum(counts * tf.math.squared_difference(means, global_mean), axis=0)
    return global_mean, tf.math.divide_no_nan(tf.reduce_sum(squares_of_all, axis=0) + spread, total)
