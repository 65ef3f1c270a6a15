"""The mathematics of one training step: the loss of each example, gradients of their sum, the averaged weights.

Functions of TensorFlow tensors; a strategy puts them together and says what happens between workers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

# Without AutoGraph, which reads and rewrites every function and layer in case it branches in Python on what a tensor
# holds. None does, and it is a second of CPU before the first step of every worker.
traced = functools.partial(tf.function, autograph=False)


@dataclass(frozen=True)
class Loss:
    """Cross-entropy with its options.

    Attributes:
        num_classes: K.
        label_smoothing: e; the target of the true class is 1 - e + e / K, of every other e / K.
        class_weights: K factors on the part of the loss that a label causes; empty: all 1.
    """

    num_classes: int
    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] = ()

    def per_example(self, logits: tf.Tensor, labels: tf.Tensor, labels_b: tf.Tensor, lam: tf.Tensor) -> tf.Tensor:
        """The loss of each example.

        With w the class weights and H(y) the cross-entropy against the smoothed target of label y:
        lam * w[labels] * H(labels) + (1 - lam) * w[labels_b] * H(labels_b).

        Args:
            logits: float (n, K).
            labels, labels_b: int32 (n,), the labels of the two images that are mixed; equal where none is.
            lam: float32 (n,), the share of the first.

        Returns:
            float (n,), of the dtype of the logits.
        """
        log_probabilities = tf.nn.log_softmax(logits)
        share = tf.cast(lam, logits.dtype)
        targets = self._targets(labels, logits.dtype) * share[:, None]
        targets += self._targets(labels_b, logits.dtype) * (1 - share)[:, None]
        return -tf.reduce_sum(targets * log_probabilities, axis=-1)

    def _targets(self, labels: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
        targets = tf.one_hot(labels, self.num_classes, dtype=dtype)
        if self.label_smoothing:
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        if self.class_weights:
            targets *= tf.gather(tf.constant(self.class_weights, dtype), labels)[:, None]
        return targets


def gradients_and_sums(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    loss: Loss,
    images: tf.Tensor,
    labels: tf.Tensor,
    labels_b: tf.Tensor,
    lam: tf.Tensor,
    global_size: tf.Tensor,
    present: tf.Tensor | float = 1.0,
) -> tuple[list[Any], tf.Tensor]:
    """Gradients of `sum of losses / global_size`: those of all workers add up to that of the global batch.

    Args:
        images: uint8 (n, H, W, C), this worker's part of the global batch.
        global_size: float32, the number of examples of the global batch.
        present: 0 where the images stand in for none, and count for nothing; else 1.

    Returns:
        gradients in the order of model.trainable_variables, scaled as optimizer.scale_loss does;
        float64 (3,): the sum of losses, the number of right top-1 answers, n.
    """
    with tf.GradientTape() as tape:
        logits = model(images, training=True)
        losses = loss.per_example(logits, labels, labels_b, lam)
        scaled = optimizer.scale_loss(
            tf.reduce_sum(losses) * tf.cast(present, losses.dtype) / tf.cast(global_size, losses.dtype)
        )
    gradients = tape.gradient(scaled, model.trainable_variables)
    gradients = [
        tf.zeros_like(v) if g is None else g for g, v in zip(gradients, model.trainable_variables, strict=True)
    ]
    main_labels = tf.where(lam >= 0.5, labels, labels_b)
    return gradients, sums(logits, losses, main_labels) * tf.cast(present, tf.float64)


def sums(logits: tf.Tensor, losses: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """float64 (3,): the sum of losses, the number of right top-1 answers, the number of examples."""
    right = tf.argmax(logits, axis=-1, output_type=tf.int32) == labels
    return tf.stack(
        [
            tf.reduce_sum(tf.cast(losses, tf.float64)),
            tf.reduce_sum(tf.cast(right, tf.float64)),
            tf.cast(tf.shape(labels)[0], tf.float64),
        ]
    )


def update_average(average: Sequence[Any], variables: Sequence[Any], decay: float, global_step: tf.Tensor) -> None:
    """Move each average towards its variable: a = d * a + (1 - d) * w, with d = min(decay, (1 + t) / (10 + t)).

    The growing d keeps the initial weights from weighing on the average of a short run.

    Args:
        global_step: t, steps done before this one.
    """
    t = tf.cast(global_step, tf.float64)
    d = tf.minimum(tf.constant(decay, tf.float64), (1 + t) / (10 + t))
    for a, w in zip(average, variables, strict=True):
        a.assign_sub(tf.cast(1 - d, a.dtype) * (a - tf.convert_to_tensor(w)))
