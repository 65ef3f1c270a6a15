"""Batch normalisation while a model trains: by fused kernels, over a worker's own examples or those of all workers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from manyeyes.training.collective import Collective

# What the kernel takes; in float64 Keras's own formula is used.
_FUSED_DTYPES = ("float32", "bfloat16")


def fuse_norms(
    model: keras.Model, synced_by: Collective | None = None, present: Callable[[], Any] = lambda: 1.0
) -> int:
    """Make the batch normalisations of a model fast and, by option, take their moments over all workers.

    Keras writes a normalisation as a dozen operations, each of which goes through memory; here it is one kernel
    forwards and one backwards (docs/decisions/0100).

    Args:
        synced_by: connects the workers whose examples are normalised together; the model is then called only inside of
            `Collective.among_workers`. None: each part of a batch is normalised by itself.
        present: gives 0 where this worker's images stand in for none (see Replica.stand_in), else 1.

    Returns:
        how many normalisations there are.
    """
    num = 0
    for layer in _norms(model):
        if synced_by is not None:
            layer._moments = functools.partial(_global_moments, synced_by, present, layer)
        if _can_fuse(layer, synced_by):
            layer.call = functools.partial(_call, layer, layer.call, synced_by, present)
        num += 1
    return num


def _norms(layer: Any) -> Iterator[Any]:
    if isinstance(layer, keras.layers.BatchNormalization):
        yield layer
    for inner in getattr(layer, "layers", ()):
        yield from _norms(inner)


def _can_fuse(layer: Any, synced_by: Collective | None) -> bool:
    # On GPUs the gradient of the kernel for given moments is not deterministic, and TensorFlow refuses it.
    on_cpu = not tf.config.get_visible_devices("GPU")
    is_plain = layer.axis == -1 and layer.scale and layer.center and not layer.renorm
    return is_plain and layer.compute_dtype in _FUSED_DTYPES and (on_cpu or synced_by is None)


def _call(
    layer: Any,
    call: Callable[..., Any],
    synced_by: Collective | None,
    present: Callable[[], Any],
    inputs: Any,
    training: bool | None = None,
    mask: Any = None,
) -> Any:
    if not (training and layer.trainable) or mask is not None or len(inputs.shape) != 4:
        return call(inputs, training=training, mask=mask)
    scale, offset = tf.convert_to_tensor(layer.gamma), tf.convert_to_tensor(layer.beta)
    if synced_by is None:
        outputs, mean, variance = _normalise(inputs, scale, offset, layer.epsilon)
    else:
        outputs, mean, variance = _normalise_together(
            inputs, scale, offset, layer.epsilon, synced_by, tf.cast(present(), tf.float32)
        )
    for moving, moment in ((layer.moving_mean, mean), (layer.moving_variance, variance)):
        moving.assign(moving * layer.momentum + tf.stop_gradient(moment) * (1.0 - layer.momentum))
    return outputs


def _normalise(
    inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """The inputs normalised by their own moments, and these: mean and variance of each channel, float32 (channels,)."""
    none = tf.zeros([0])
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs, scale=scale, offset=offset, mean=none, variance=none, epsilon=epsilon, is_training=True
    )
    count = _count_of(inputs)
    # The kernel gives the estimate for the population that a sample comes from.
    return outputs, mean, variance * ((count - 1) / count)


def _normalise_together(
    inputs: tf.Tensor, scale: tf.Tensor, offset: tf.Tensor, epsilon: float, workers: Collective, weight: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """As `_normalise`, by the moments of all workers' inputs.

    Backwards, with x the normalised inputs, g what comes for the outputs and means over the examples of all workers:
    scale / deviation * (g - mean(g) - x * mean(g * x)).
    """

    @tf.custom_gradient
    def normalise(inputs, scale, offset):  # type: ignore[no-untyped-def]
        _, own_mean, own_variance = _normalise(inputs, scale, offset, epsilon)
        count = _count_of(inputs)
        mean, variance, total = _moments_of_all(workers, count, own_mean, own_variance * count, weight)
        outputs, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs, scale=scale, offset=offset, mean=mean, variance=variance, epsilon=epsilon, is_training=False
        )

        def gradient(upstream, *_):  # type: ignore[no-untyped-def]
            direct, for_scale, for_offset, *_ = tf.raw_ops.FusedBatchNormGradV3(
                y_backprop=upstream,
                x=inputs,
                scale=scale,
                reserve_space_1=mean,
                reserve_space_2=variance,
                reserve_space_3=tf.zeros([0]),
                epsilon=epsilon,
                is_training=False,
            )
            of_all = tf.reduce_sum(workers.gather_inside(tf.stack([for_scale, for_offset])), axis=0)
            mean_product, mean_upstream = tf.unstack(tf.math.divide_no_nan(of_all, total) * weight)
            inverse = tf.math.rsqrt(variance + epsilon)
            slope = -scale * inverse * inverse * mean_product
            shift = -scale * inverse * mean_upstream - slope * mean
            indirect = tf.cast(inputs, tf.float32) * slope + shift
            return direct + tf.cast(indirect, direct.dtype), for_scale, for_offset

        return (outputs, mean, variance), gradient

    return normalise(inputs, scale, offset)


def _count_of(inputs: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.size(inputs) // inputs.shape[-1], tf.float32)


def _moments_of_all(
    workers: Collective, count: tf.Tensor, mean: tf.Tensor, squares: tf.Tensor, weight: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Mean and variance of each channel over the examples of all workers, and how many values each has.

    Keras's own `synchronized=True` sums counts, values and squares by three exchanges a layer and takes the variance as
    a difference of two large numbers, which in float32 moves gradients by up to 3e-3. Here each worker gives its mean
    and its sum of squares around it, one exchange brings them together (Chan et al.), and nothing cancels.

    Args:
        count: of this worker's values in a channel.
        mean: (channels,) of this worker's.
        squares: (channels,), the sum of squared differences from that mean.
        weight: 0 where this worker's values count for nothing, else 1.
    """
    num_channels = mean.shape[0]
    told = tf.concat([(count * weight)[None], mean, squares * weight], axis=0)
    counts, means, squares_of_all = tf.split(workers.gather_inside(told), [1, num_channels, num_channels], axis=1)
    # No worker may have an example, where each takes several parts of a small last batch.
    total = tf.reduce_sum(counts)
    global_mean = tf.math.divide_no_nan(tf.reduce_sum(counts * means, axis=0), total)
    spread = tf.reduce_sum(counts * tf.math.squared_difference(means, global_mean), axis=0)
    return global_mean, tf.math.divide_no_nan(tf.reduce_sum(squares_of_all, axis=0) + spread, total), total


def _global_moments(
    workers: Collective, present: Callable[[], Any], layer: Any, inputs: tf.Tensor, mask: Any
) -> tuple[tf.Tensor, tf.Tensor]:
    """For Keras's own formula: mean and variance of each channel over the examples of all workers, with gradients."""
    assert mask is None, "no model of Manyeyes masks what it normalises"
    axes = layer._reduction_axes
    count = tf.cast(tf.size(inputs) // inputs.shape[layer.axis], inputs.dtype)
    mean = tf.reduce_sum(inputs, axes, keepdims=True) / count
    # Differences from the mean add up to nothing, so no gradient goes by way of it.
    squares = tf.reduce_sum(tf.math.squared_difference(inputs, tf.stop_gradient(mean)), axes)
    weight = tf.cast(present(), inputs.dtype)
    global_mean, variance, _ = _moments_of_all(workers, count, tf.reshape(mean, [-1]), squares, weight)
    return global_mean, variance
