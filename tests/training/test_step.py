"""Steps against formulas written in NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from manyeyes.data.pipeline import Batch
from manyeyes.training.building import balanced_weights
from manyeyes.training.optimizers import create_optimizer
from manyeyes.training.replica import Replica
from manyeyes.training.settings import OptimizerSettings
from manyeyes.training.step import Loss, update_average
from manyeyes.training.strategy import Totals

SHAPE = (3, 2, 1)
NUM_CLASSES = 3
PLAIN_SGD = OptimizerSettings(name="sgd", momentum=0.0, weight_decay=0.0)


def linear_model() -> keras.Model:
    """Softmax regression on pixels / 255."""
    image = keras.Input(SHAPE, dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 255, dtype="float32", name="normalise")(image)
    x = keras.layers.Flatten(name="flatten")(x)
    return keras.Model(image, keras.layers.Dense(NUM_CLASSES, dtype="float32", name="logits")(x))


def deep_model() -> keras.Model:
    """A convolution, a norm, a GRU (whose bias has two dimensions) and a dense layer."""
    image = keras.Input(SHAPE, dtype="uint8", name="image")
    x = keras.layers.Rescaling(1 / 255, dtype="float32", name="normalise")(image)
    x = keras.layers.Conv2D(4, 2, padding="same", name="conv")(x)
    x = keras.layers.BatchNormalization(momentum=0.5, name="norm")(x)
    x = keras.layers.Reshape((6, 4), name="rows")(x)
    x = keras.layers.GRU(4, name="gru")(x)
    x = keras.layers.Dropout(0.1, name="head_dropout")(x)
    return keras.Model(image, keras.layers.Dense(NUM_CLASSES, dtype="float32", name="logits")(x))


def make_replica(
    settings: OptimizerSettings,
    loss: Loss | None = None,
    make_model: Callable[[], keras.Model] = linear_model,
    loss_scaling: bool = False,
) -> Replica:
    keras.utils.set_random_seed(3)
    replica = Replica(loss or Loss(NUM_CLASSES), settings.ema)
    replica.build(make_model, lambda model: create_optimizer(settings, model, loss_scaling=loss_scaling))
    return replica


def make_batch(num: int, seed: int = 0, **values: Any) -> Batch:
    draw = np.random.default_rng(seed)
    defaults = {
        "images": draw.integers(0, 256, (num, *SHAPE), dtype=np.uint8),
        "labels": draw.integers(0, NUM_CLASSES, num).astype(np.int32),
        "example_indices": np.arange(num),
        "epoch": 0,
        "step": 0,
        "global_size": num,
    }
    return Batch(**{**defaults, **values})


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exp / exp.sum(axis=1, keepdims=True)


def linear_gradients(kernel: np.ndarray, bias: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Of the summed cross-entropy / global_size."""
    x = batch.images.reshape(len(batch), -1) / 255.0
    error = (softmax(x @ kernel + bias) - np.eye(NUM_CLASSES)[batch.labels]) / batch.global_size
    return x.T @ error, error.sum(axis=0)


def weights_by_name(replica: Replica) -> dict[str, np.ndarray]:
    return {variable.path: np.array(variable.numpy()) for variable in replica.model.weights}


@pytest.mark.parametrize("size", [1, 8])
def test_a_step_of_sgd_is_the_formula_for_one_example_and_for_a_batch(size: int) -> None:
    replica = make_replica(PLAIN_SGD)
    kernel, bias = replica.model.get_weights()
    batch = make_batch(size)
    kernel_gradient, bias_gradient = linear_gradients(kernel, bias, batch)

    replica.step(batch, 0.3, 0)

    found_kernel, found_bias = replica.model.get_weights()
    np.testing.assert_allclose(found_kernel, kernel - 0.3 * kernel_gradient, atol=1e-6)
    np.testing.assert_allclose(found_bias, bias - 0.3 * bias_gradient, atol=1e-6)


def test_a_part_of_a_global_batch_counts_by_the_size_of_the_whole() -> None:
    replica = make_replica(PLAIN_SGD)
    kernel, bias = replica.model.get_weights()
    batch = make_batch(3, global_size=8)
    kernel_gradient, _ = linear_gradients(kernel, bias, batch)

    replica.step(batch, 1.0, 0)

    np.testing.assert_allclose(replica.model.get_weights()[0], kernel - kernel_gradient, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_two_steps_with_momentum_and_decoupled_weight_decay_are_the_formula(nesterov: bool) -> None:
    replica = make_replica(OptimizerSettings(name="sgd", momentum=0.9, nesterov=nesterov, weight_decay=0.1))
    kernel, bias = replica.model.get_weights()
    velocity, bias_velocity = np.zeros_like(kernel), np.zeros_like(bias)
    for step, learning_rate in enumerate([0.5, 0.2]):
        batch = make_batch(4, seed=step)
        kernel_gradient, bias_gradient = linear_gradients(kernel, bias, batch)
        replica.step(batch, learning_rate, step)
        velocity = 0.9 * velocity - learning_rate * kernel_gradient
        bias_velocity = 0.9 * bias_velocity - learning_rate * bias_gradient
        kernel = kernel * (1 - learning_rate * 0.1)
        kernel = kernel + (0.9 * velocity - learning_rate * kernel_gradient if nesterov else velocity)
        bias = bias + (0.9 * bias_velocity - learning_rate * bias_gradient if nesterov else bias_velocity)
    np.testing.assert_allclose(replica.model.get_weights()[0], kernel, atol=1e-6)
    np.testing.assert_allclose(replica.model.get_weights()[1], bias, atol=1e-6)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars", "muon"])
def test_weight_decay_leaves_biases_and_norms_alone(name: Any) -> None:
    settings = OptimizerSettings(name=name, weight_decay=0.5, clip_norm=0.0)
    replica = make_replica(settings, make_model=deep_model)
    before = weights_by_name(replica)
    optimizer = replica.optimizer
    optimizer.learning_rate.assign(0.1)
    variables = list(replica.model.trainable_variables)

    @tf.function
    def step_without_gradient() -> None:
        optimizer.apply([tf.zeros_like(variable.value) for variable in variables], variables)

    step_without_gradient()

    decayed = {path for path, value in weights_by_name(replica).items() if not np.array_equal(value, before[path])}
    assert decayed == {path for path in before if path.endswith("kernel")}
    for path in decayed:
        np.testing.assert_allclose(weights_by_name(replica)[path], before[path] * 0.95, rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lars", "muon"])
def test_every_optimizer_lowers_the_loss(name: Any) -> None:
    settings = OptimizerSettings(name=name)
    replica = make_replica(settings, make_model=deep_model)
    batch = make_batch(16, labels=(np.arange(16) % NUM_CLASSES).astype(np.int32))
    batch.images[np.arange(16), batch.labels] = 255
    before = replica.evaluate([batch]).mean_loss
    for step in range(40):
        replica.step(batch, settings.peak_learning_rate(None) * 3, step)
    assert replica.evaluate([batch]).mean_loss < 0.9 * before


def test_lars_moves_a_kernel_by_a_fixed_share_of_its_norm() -> None:
    replica = make_replica(OptimizerSettings(name="lars", momentum=0.0, weight_decay=0.0))
    kernel, bias = replica.model.get_weights()
    batch = make_batch(8)
    _, bias_gradient = linear_gradients(kernel, bias, batch)

    replica.step(batch, 2.0, 0)

    found_kernel, found_bias = replica.model.get_weights()
    assert np.linalg.norm(found_kernel - kernel) == pytest.approx(2.0 * 0.001 * np.linalg.norm(kernel), rel=1e-4)
    np.testing.assert_allclose(found_bias, bias - 2.0 * bias_gradient, atol=1e-6)


def test_muon_moves_a_convolution_along_all_its_directions_alike() -> None:
    replica = make_replica(OptimizerSettings(name="muon", weight_decay=0.0), make_model=deep_model)
    before = weights_by_name(replica)["conv/kernel"]
    replica.step(make_batch(8), 0.1, 0)
    update = (weights_by_name(replica)["conv/kernel"] - before).reshape(-1, 4)
    singular = np.linalg.svd(update, compute_uv=False) / (0.1 * 0.2 * np.sqrt(4))
    # Newton-Schulz with Muon's coefficients brings singular values near 1, not to it.
    assert singular.max() < 1.3
    assert np.sort(singular)[1:].min() > 0.3


def test_clipping_cuts_the_global_norm_of_the_gradient() -> None:
    replica = make_replica(OptimizerSettings(name="sgd", momentum=0.0, weight_decay=0.0, clip_norm=0.01))
    before = replica.model.get_weights()
    replica.step(make_batch(8), 1.0, 0)
    moved = [after - start for after, start in zip(replica.model.get_weights(), before, strict=True)]
    assert np.sqrt(sum((part**2).sum() for part in moved)) == pytest.approx(0.01, rel=1e-3)


def test_label_smoothing_mix_and_class_weights_are_their_formula() -> None:
    draw = np.random.default_rng(5)
    logits = draw.normal(size=(6, NUM_CLASSES))
    labels, labels_b = draw.integers(0, NUM_CLASSES, (2, 6)).astype(np.int32)
    lam = draw.uniform(size=6).astype(np.float32)
    class_weights = (0.5, 1.0, 3.0)

    found = Loss(NUM_CLASSES, 0.1, class_weights).per_example(tf.constant(logits), labels, labels_b, lam)

    log_probabilities = np.log(softmax(logits))

    def weighted_entropy(label: np.ndarray) -> np.ndarray:
        own = log_probabilities[np.arange(6), label]
        return -np.array(class_weights)[label] * (0.9 * own + 0.1 * log_probabilities.mean(axis=1))

    expected = lam * weighted_entropy(labels) + (1 - lam) * weighted_entropy(labels_b)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)


def test_balanced_classes_weigh_the_same_in_sum() -> None:
    counts = [10, 30, 60]
    weights = balanced_weights(counts)
    np.testing.assert_allclose(np.array(counts) * weights, 100 / 3)
    assert balanced_weights([5, 0, 5])[1] == 0


def test_totals_count_losses_right_answers_and_examples() -> None:
    replica = make_replica(PLAIN_SGD)
    batches = [make_batch(8, seed=1), make_batch(3, seed=2)]
    totals = replica.evaluate(batches)
    kernel, bias = replica.model.get_weights()
    loss, num_right = 0.0, 0
    for batch in batches:
        logits = batch.images.reshape(len(batch), -1) / 255.0 @ kernel + bias
        loss -= np.log(softmax(logits))[np.arange(len(batch)), batch.labels].sum()
        num_right += (logits.argmax(axis=1) == batch.labels).sum()
    assert totals.num_examples == 11
    assert totals.num_right == num_right
    assert totals.loss == pytest.approx(loss, rel=1e-5)
    assert Totals().accuracy == 0


def test_average_of_weights_is_its_formula() -> None:
    draw = np.random.default_rng(1)
    average = tf.Variable(draw.normal(size=4))
    expected = average.numpy()
    for step in range(30):
        weights = draw.normal(size=4)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weights
        update_average([average], [tf.constant(weights)], 0.7, tf.constant(step, tf.int64))
    np.testing.assert_allclose(average.numpy(), expected, rtol=1e-9)


def test_averaged_weights_are_evaluated_and_the_trained_ones_stay() -> None:
    replica = make_replica(OptimizerSettings(name="sgd", momentum=0.0, ema=0.99), make_model=deep_model)
    for step in range(20):
        replica.step(make_batch(8, seed=step), 1.0, step)
    trained = replica.arrays()["model"]
    batch = make_batch(32, seed=99)
    averaged_loss = replica.evaluate([batch]).loss
    for key, array in replica.arrays()["model"].items():
        np.testing.assert_array_equal(array, trained[key])

    plain = make_replica(PLAIN_SGD, make_model=deep_model)
    arrays = {**trained, **replica.arrays()["ema"]}
    plain.load_arrays({"model": arrays, "optimizer": plain.arrays()["optimizer"]}, "test")
    assert averaged_loss == plain.evaluate([batch]).loss


def test_a_frozen_backbone_does_not_change_and_learns_again_when_freed() -> None:
    replica = make_replica(OptimizerSettings(name="adamw"), make_model=deep_model)
    replica.let_learn("head")
    before = weights_by_name(replica)
    replica.step(make_batch(8), 0.1, 0)
    frozen = weights_by_name(replica)
    changed = {path for path in before if not np.array_equal(before[path], frozen[path])}
    assert changed == {"logits/kernel", "logits/bias"}

    replica.let_learn("all")
    replica.reset_optimizer()
    for key, array in replica.arrays()["optimizer"].items():
        if "learning_rate" not in key:
            assert not array.any(), key
    replica.step(make_batch(8), 0.1, 1)
    freed = weights_by_name(replica)
    assert all(not np.array_equal(frozen[path], freed[path]) for path in freed)
    # The first step of Adam with a fresh state moves every weight with a gradient by about the learning rate.
    moved = np.abs(freed["logits/bias"] - frozen["logits/bias"])
    np.testing.assert_allclose(moved, 0.1, rtol=1e-2)


def test_float16_gradients_are_scaled_so_that_small_ones_survive() -> None:
    settings = OptimizerSettings(name="sgd", momentum=0.0, weight_decay=0.0)
    replica = make_replica(settings, loss_scaling=True)
    kernel, bias = replica.model.get_weights()
    batch = make_batch(8)
    kernel_gradient, _ = linear_gradients(kernel, bias, batch)
    replica.step(batch, 0.3, 0)
    np.testing.assert_allclose(replica.model.get_weights()[0], kernel - 0.3 * kernel_gradient, atol=1e-5)
    assert any("dynamic_scale" in key for key in replica.arrays()["optimizer"])


def test_the_first_step_with_a_loss_that_is_not_finite_is_remembered() -> None:
    replica = make_replica(PLAIN_SGD)
    for step in range(5):
        replica.step(make_batch(8, seed=step), 0.1 if step < 2 else float("inf"), step)
    # Step 2 ruins the weights; step 3 is the first to see it.
    assert replica.first_bad_step() == 3
