"""The fused batch normalisation of training is Keras's, only faster. (Over several workers: test_allreduce.py.)"""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf

from manyeyes.training.norms import fuse_norms

# Relative differences that rounding explains; bfloat16 has 8 bits.
TOLERANCES = {"float32": 2e-5, "mixed_bfloat16": 2e-2}


def _model(policy: str) -> keras.Model:
    image = keras.Input((6, 5, 3), dtype="float64" if policy == "float64" else "float32")
    # Without a bias, whose gradient would be nothing but rounding.
    x = keras.layers.Conv2D(4, 3, use_bias=False, dtype=policy, name="conv")(image)
    return keras.Model(image, keras.layers.BatchNormalization(momentum=0.8, dtype=policy, name="norm")(x))


def _step(model: keras.Model, images: np.ndarray, weights: np.ndarray) -> list[np.ndarray]:
    """Outputs, gradients, and the moving statistics afterwards."""

    @tf.function
    def step():  # type: ignore[no-untyped-def]
        with tf.GradientTape() as tape:
            outputs = tf.cast(model(images, training=True), tf.float32)
            loss = tf.reduce_sum(outputs * weights)
        return [outputs, *tape.gradient(loss, model.trainable_variables)]

    return [array.numpy() for array in step()] + [v.numpy() for v in model.non_trainable_variables]


@pytest.mark.parametrize("policy", TOLERANCES)
def test_fused_norms_give_the_outputs_gradients_and_statistics_of_keras(policy: str) -> None:
    draw = np.random.default_rng(0)
    images = draw.normal(3, 2, (8, 6, 5, 3)).astype(np.float32)
    upstream = draw.normal(0, 1, (8, 4, 3, 4)).astype(np.float32)
    model = _model(policy)
    model.get_layer("norm").gamma.assign([0.5, 1.0, 1.5, -1.0])
    start = model.get_weights()
    expected = _step(model, images, upstream)
    model.set_weights(start)
    plain_call = model.get_layer("norm").call
    assert fuse_norms(model) == 1
    assert model.get_layer("norm").call is not plain_call
    for found, wanted in zip(_step(model, images, upstream), expected, strict=True):
        assert np.max(np.abs(found - wanted)) <= TOLERANCES[policy] * np.max(np.abs(wanted))


def test_a_frozen_norm_and_a_model_that_predicts_keep_to_the_moving_statistics() -> None:
    images = np.random.default_rng(0).normal(3, 2, (8, 6, 5, 3)).astype(np.float32)
    model = _model("float32")
    expected = model(images, training=False).numpy()
    statistics = [v.numpy() for v in model.non_trainable_variables]
    fuse_norms(model)
    np.testing.assert_array_equal(model(images, training=False), expected)
    model.get_layer("norm").trainable = False
    np.testing.assert_array_equal(model(images, training=True), expected)
    for variable, before in zip(model.get_layer("norm").non_trainable_variables[-2:], statistics, strict=True):
        np.testing.assert_array_equal(variable, before)


def test_a_float64_model_is_normalised_in_float64() -> None:
    model = _model("float64")
    fuse_norms(model)
    images = np.random.default_rng(0).normal(3, 2, (8, 6, 5, 3))
    conv, norm = model.get_layer("conv"), model.get_layer("norm")
    x = conv(images).numpy()
    wanted = (x - x.mean((0, 1, 2))) / np.sqrt(x.var((0, 1, 2)) + norm.epsilon)
    np.testing.assert_allclose(model(images, training=True), wanted, rtol=0, atol=1e-12)
