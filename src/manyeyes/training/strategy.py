"""The strategy: where the model lives and how batches become weights. The loop knows nothing else of it.

`SingleWorker` is the one that stands; strategies over many workers put an exchange between the two halves of the step
(gradients_and_sums, optimizer.apply) or between rounds of steps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import keras
import numpy as np
import tensorflow as tf

from manyeyes.data.pipeline import Batch
from manyeyes.models.registry import set_backbone_trainable
from manyeyes.training import optimizers, weights
from manyeyes.training.checkpoint import Arrays
from manyeyes.training.step import Loss, gradients_and_sums, sums, update_average

Part = Literal["all", "all_but_norms", "head"]


@dataclass(frozen=True)
class Totals:
    """Sums over examples of all workers."""

    loss: float = 0.0
    num_right: float = 0.0
    num_examples: float = 0.0

    @property
    def mean_loss(self) -> float:
        """Loss per example; 0 before the first."""
        return self.loss / self.num_examples if self.num_examples else 0.0

    @property
    def accuracy(self) -> float:
        """Share of right top-1 answers; 0 before the first."""
        return self.num_right / self.num_examples if self.num_examples else 0.0

    def since(self, earlier: Totals) -> Totals:
        """What was added after `earlier`."""
        return Totals(
            self.loss - earlier.loss, self.num_right - earlier.num_right, self.num_examples - earlier.num_examples
        )


class Strategy(Protocol):
    """What the training loop asks for."""

    rank: int
    world_size: int

    def build(
        self,
        make_model: Callable[[], keras.Model],
        make_optimizer: Callable[[keras.Model], keras.optimizers.Optimizer],
    ) -> None:
        """Make the model and the optimizer where they will live."""
        ...

    def let_learn(self, part: Part) -> None:
        """Choose what the steps change: "all", "all_but_norms" (of the backbone), or only the "head"."""
        ...

    def reset_optimizer(self) -> None:
        """Forget momentum and moments, as when the backbone is freed."""
        ...

    def step(self, batch: Batch, learning_rate: float, global_step: int) -> None:
        """Learn from this worker's part of a global batch."""
        ...

    def totals(self) -> Totals:
        """Sums over the steps since they were last set."""
        ...

    def set_totals(self, totals: Totals) -> None:
        """Start the sums from `totals`."""
        ...

    def first_bad_step(self) -> int | None:
        """The first global_step whose loss was not finite, or None."""
        ...

    def evaluate(self, batches: Iterable[Batch]) -> Totals:
        """Loss and accuracy on batches, with the averaged weights where there are."""
        ...

    def arrays(self) -> Arrays:
        """Copies of all variables, as a checkpoint keeps them."""
        ...

    def load_arrays(self, arrays: Arrays, what: str) -> None:
        """Set all variables. Raises CheckpointError where they don't fit."""
        ...


class SingleWorker:
    """One worker that holds the only copy of the model.

    Args:
        loss: what is minimised.
        ema: decay of the averaged weights; 0: none.
    """

    rank = 0
    world_size = 1

    def __init__(self, loss: Loss, ema: float = 0.0) -> None:
        self._loss = loss
        self._ema = ema
        self._totals = tf.Variable(tf.zeros(3, tf.float64), trainable=False)
        self._first_bad_step = tf.Variable(-1, dtype=tf.int64, trainable=False)

    def build(
        self,
        make_model: Callable[[], keras.Model],
        make_optimizer: Callable[[keras.Model], keras.optimizers.Optimizer],
    ) -> None:
        """See Strategy.build."""
        self.model = make_model()
        self.optimizer = make_optimizer(self.model)
        self._averaged = weights.averaged_variables(self.model) if self._ema else []
        self._averages = [tf.Variable(tf.convert_to_tensor(v), trainable=False) for v in self._averaged]
        self._part: Part = "all"
        self._train = self._trace_train_step()
        self._evaluate = self._trace_evaluate_step()

    def let_learn(self, part: Part) -> None:
        """See Strategy.let_learn."""
        if part != self._part:
            set_backbone_trainable(self.model, part != "head", norms=part == "all")
            self._part = part
            self._train = self._trace_train_step()

    def reset_optimizer(self) -> None:
        """See Strategy.reset_optimizer.

        The optimizer has variables for all weights from the start, so that every checkpoint of a run has the same keys.
        All are set to zero together, because the corrections that Adam makes in its first steps count from one number
        of iterations for all weights.
        """
        optimizers.reset(self.optimizer)

    def step(self, batch: Batch, learning_rate: float, global_step: int) -> None:
        """See Strategy.step."""
        labels_b = batch.labels if batch.labels_b is None else batch.labels_b
        lam = np.ones(len(batch.labels), np.float32) if batch.lam is None else batch.lam.astype(np.float32, copy=False)
        self._train(batch.images, batch.labels, labels_b, lam, float(batch.global_size), learning_rate, global_step)

    def totals(self) -> Totals:
        """See Strategy.totals."""
        return Totals(*self._totals.numpy().tolist())

    def set_totals(self, totals: Totals) -> None:
        """See Strategy.set_totals."""
        self._totals.assign([totals.loss, totals.num_right, totals.num_examples])

    def first_bad_step(self) -> int | None:
        """See Strategy.first_bad_step."""
        step = int(self._first_bad_step.numpy())
        return None if step < 0 else step

    def evaluate(self, batches: Iterable[Batch]) -> Totals:
        """See Strategy.evaluate."""
        total = np.zeros(3)
        with self._averages_in_place():
            for batch in batches:
                total += self._evaluate(batch.images, batch.labels).numpy()
        return Totals(*total.tolist())

    def arrays(self) -> Arrays:
        """See Strategy.arrays."""
        parts = {
            "model": weights.arrays_of(self.model.variables),
            "optimizer": weights.arrays_of(self.optimizer.variables),
        }
        if self._ema:
            keys = weights.keyed_variables(self._averaged)
            parts["ema"] = {key: np.array(a.numpy()) for key, a in zip(keys, self._averages, strict=True)}
        return parts

    def load_arrays(self, arrays: Arrays, what: str) -> None:
        """See Strategy.load_arrays."""
        weights.assign(self.model.variables, arrays["model"], f"{what} (model)")
        weights.assign(self.optimizer.variables, arrays["optimizer"], f"{what} (optimizer)")
        if self._ema:
            for key, average in zip(weights.keyed_variables(self._averaged), self._averages, strict=True):
                average.assign(arrays["ema"][key])

    @contextlib.contextmanager
    def _averages_in_place(self) -> Iterator[None]:
        current = [variable.numpy() for variable in self._averaged]
        for variable, average in zip(self._averaged, self._averages, strict=True):
            variable.assign(average)
        try:
            yield
        finally:
            for variable, value in zip(self._averaged, current, strict=True):
                variable.assign(value)

    def _trace_train_step(self) -> Any:
        model, optimizer, loss = self.model, self.optimizer, self._loss
        # tf.function sees the variables that are trainable when it is traced, so freezing needs another one.
        trainable = list(model.trainable_variables)

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8),
                tf.TensorSpec((None,), tf.int32),
                tf.TensorSpec((None,), tf.int32),
                tf.TensorSpec((None,), tf.float32),
                tf.TensorSpec((), tf.float32),
                tf.TensorSpec((), tf.float32),
                tf.TensorSpec((), tf.int64),
            ]
        )
        def train_step(images, labels, labels_b, lam, global_size, learning_rate, global_step):  # type: ignore[no-untyped-def]
            optimizer.learning_rate.assign(learning_rate)
            gradients, added = gradients_and_sums(model, optimizer, loss, images, labels, labels_b, lam, global_size)
            optimizer.apply(gradients, trainable)
            if self._ema:
                update_average(self._averages, self._averaged, self._ema, global_step)
            self._totals.assign_add(added)
            is_first_bad = tf.logical_and(self._first_bad_step < 0, tf.logical_not(tf.math.is_finite(added[0])))
            self._first_bad_step.assign(tf.where(is_first_bad, global_step, self._first_bad_step))

        return train_step

    def _trace_evaluate_step(self) -> Any:
        model = self.model
        plain = Loss(self._loss.num_classes)

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8),
                tf.TensorSpec((None,), tf.int32),
            ]
        )
        def evaluate_step(images, labels):  # type: ignore[no-untyped-def]
            logits = model(images, training=False)
            ones = tf.ones(tf.shape(labels), tf.float32)
            return sums(logits, plain.per_example(logits, labels, labels, ones), labels)

        return evaluate_step
