"""A replica: a model, its optimizer and its averaged weights in this process, and the two halves of a step.

`compute` turns a part of a global batch into gradients and changes nothing; `apply` changes everything. What happens
between the two, or between rounds of steps, is the strategy's.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from manyeyes.data.pipeline import Batch
from manyeyes.models.registry import set_backbone_trainable
from manyeyes.training import optimizers, weights
from manyeyes.training.checkpoint import Arrays
from manyeyes.training.plan import Learning
from manyeyes.training.step import Loss, gradients_and_sums, sums, traced, update_average
from manyeyes.training.strategy import Totals


class Work(NamedTuple):
    """What a part of a global batch gives; over all parts it adds up.

    Attributes:
        gradients: of the sum of losses divided by the size of the global batch, in the order of trainable variables.
        changes: of the statistics (moving averages of normalisations), weighed by the part's share of the batch.
        added: float64 (3,): the sum of losses, the number of right top-1 answers, the number of examples.
    """

    gradients: list[tf.Tensor]
    changes: list[tf.Tensor]
    added: tf.Tensor


@dataclass(frozen=True)
class Packing:
    """How a Work travels: one vector, so that one exchange is enough.

    Attributes:
        shapes: of the gradients, then of the changes.
        num_gradients: how many of them are gradients.
        dtype: of the vector.
        dtypes: of the gradients and changes.
    """

    shapes: tuple[tuple[int, ...], ...]
    num_gradients: int
    dtype: str
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, replica: Replica) -> Packing:
        """The packing for the variables that learn now."""
        variables = [*replica.model.trainable_variables, *replica.statistics]
        dtypes = tuple(str(variable.dtype) for variable in variables)
        return cls(
            shapes=tuple(tuple(variable.shape) for variable in variables),
            num_gradients=len(replica.model.trainable_variables),
            dtype="float64" if "float64" in dtypes else "float32",
            dtypes=dtypes,
        )

    @property
    def size(self) -> int:
        """Numbers in the vector."""
        return sum(math.prod(shape) for shape in self.shapes) + 3

    def pack(self, work: Work) -> tf.Tensor:
        """The vector."""
        tensors = [*work.gradients, *work.changes, work.added]
        return tf.concat([tf.reshape(tf.cast(tensor, self.dtype), [-1]) for tensor in tensors], axis=0)

    def unpack(self, vector: tf.Tensor) -> Work:
        """What was packed. The sums for the metrics are rounded to the dtype of the vector."""
        sizes = [math.prod(shape) for shape in self.shapes]
        *flat, added = tf.split(vector, [*sizes, 3])
        tensors = [
            tf.cast(tf.reshape(tensor, shape), dtype)
            for tensor, shape, dtype in zip(flat, self.shapes, self.dtypes, strict=True)
        ]
        gradients, changes = tensors[: self.num_gradients], tensors[self.num_gradients :]
        return Work(gradients, changes, tf.cast(added, tf.float64))


class Replica:
    """See above.

    Args:
        loss: what is minimised.
        ema: decay of the averaged weights; 0: none.
        seed: of what layers draw (dropout): a pure function of (seed, global_step, part), so that a resumed run and
            another number of workers draw the same.
        compile_with_xla: let XLA compile `compute`.
    """

    def __init__(self, loss: Loss, ema: float = 0.0, seed: int = 0, compile_with_xla: bool = False) -> None:
        self.loss = loss
        self._ema = ema
        self._seed = seed
        # While a step is traced: 0 where its images stand in for none, else 1 (see `stand_in`).
        self.present: tf.Tensor | float = 1.0
        self._compile_with_xla = compile_with_xla
        self._totals = tf.Variable(tf.zeros(3, tf.float64), trainable=False)
        self._first_bad_step = tf.Variable(-1, dtype=tf.int64, trainable=False)

    def build(
        self,
        make_model: Callable[[], keras.Model],
        make_optimizer: Callable[[keras.Model], keras.optimizers.Optimizer],
    ) -> None:
        """Make the model and the optimizer."""
        self.model = make_model()
        self.optimizer = make_optimizer(self.model)
        # Nothing is frozen yet, so that what does not learn by gradients is statistics.
        self.statistics = [v for v in self.model.non_trainable_variables if "float" in str(v.dtype)]
        self._random_states = [v for v in self.model.variables if "seed_generator" in v.path]
        self._averaged = weights.averaged_variables(self.model) if self._ema else []
        self._averages = [tf.Variable(tf.convert_to_tensor(v), trainable=False) for v in self._averaged]
        self._learning: Learning = "all"
        self._trace()

    def let_learn(self, learning: Learning) -> bool:
        """Choose what learns: "all", "all_but_norms" (of the backbone), or only the "head".

        Returns:
            whether that is a change; what was traced before keeps the old choice.
        """
        if learning == self._learning:
            return False
        set_backbone_trainable(self.model, learning != "head", norms=learning == "all")
        self._learning = learning
        self._trace()
        return True

    def reset_optimizer(self) -> None:
        """Forget momentum and moments, as when the backbone is freed.

        The optimizer has variables for all weights from the start, so that every checkpoint of a run has the same keys.
        All are set to zero together, because the corrections that Adam makes in its first steps count from one number
        of iterations for all weights.
        """
        optimizers.reset(self.optimizer)

    @property
    def signature(self) -> list[tf.TensorSpec]:
        """Of the arguments that `arguments_of` makes."""
        return [
            tf.TensorSpec((None, *self.model.input_shape[1:]), tf.uint8),
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None,), tf.int32),
            tf.TensorSpec((None,), tf.float32),
            tf.TensorSpec((), tf.float32),
            tf.TensorSpec((), tf.int64),
            tf.TensorSpec((), tf.int64),
        ]

    @staticmethod
    def arguments_of(batch: Batch, global_step: int, part: int = 0) -> tuple[Any, ...]:
        """The arguments of `compute` for a batch that is one part."""
        labels_b = batch.labels if batch.labels_b is None else batch.labels_b
        lam = np.ones(len(batch.labels), np.float32) if batch.lam is None else batch.lam.astype(np.float32, copy=False)
        # A NumPy integer, as a plain one would be a constant of the traced function.
        place = np.int64(global_step), np.int64(part)
        return batch.images, batch.labels, labels_b, lam, np.float32(batch.global_size), *place

    @staticmethod
    def stand_in(batch: Batch) -> Batch:
        """One black image without a label in place of an empty part, whose work is nothing.

        It lets a worker without examples take part in the exchanges of synchronized normalisations; TensorFlow does not
        keep the shapes of an empty batch through a convolution.
        """
        image = np.zeros((1, *batch.images.shape[1:]), np.uint8)
        nothing = np.full(1, -1, np.int32)
        return replace(
            batch, images=image, labels=nothing, labels_b=None, lam=None, example_indices=np.full(1, -1), part_sizes=()
        )

    def compute(
        self,
        images: tf.Tensor,
        labels: tf.Tensor,
        labels_b: tf.Tensor,
        lam: tf.Tensor,
        global_size: tf.Tensor,
        global_step: tf.Tensor,
        part: tf.Tensor,
    ) -> Work:
        """The first half of a step; to be called in a traced function."""
        drawn = self._drawn_states(global_step, part)
        self.present = present = tf.cast(tf.reduce_all(labels >= 0), tf.float64)
        labels, labels_b = tf.maximum(labels, 0), tf.maximum(labels_b, 0)
        with keras.StatelessScope(state_mapping=drawn) as scope:
            gradients, added = gradients_and_sums(
                self.model, self.optimizer, self.loss, images, labels, labels_b, lam, global_size, present
            )
        share = present * tf.cast(tf.shape(images)[0], tf.float64) / tf.cast(global_size, tf.float64)
        changes = []
        for variable in self.statistics:
            new = scope.get_current_value(variable)
            old = tf.convert_to_tensor(variable)
            changes.append(tf.zeros_like(old) if new is None else (new - old) * tf.cast(share, old.dtype))
        return Work(gradients, changes, added)

    def apply(self, work: Work, learning_rate: tf.Tensor, global_step: tf.Tensor) -> None:
        """The second half of a step; to be called in a traced function."""
        self.optimizer.learning_rate.assign(learning_rate)
        self.optimizer.apply(work.gradients, self._trainable)
        for variable, change in zip(self.statistics, work.changes, strict=True):
            variable.assign(tf.convert_to_tensor(variable) + change)
        if self._ema:
            update_average(self._averages, self._averaged, self._ema, global_step)
        self._totals.assign_add(work.added)
        is_first_bad = tf.logical_and(self._first_bad_step < 0, tf.logical_not(tf.math.is_finite(work.added[0])))
        self._first_bad_step.assign(tf.where(is_first_bad, global_step, self._first_bad_step))

    def step(self, batch: Batch, learning_rate: float, global_step: int, part: int = 0) -> None:
        """Both halves for a batch that nobody else has a part of."""
        self._step(np.float32(learning_rate), *self.arguments_of(batch, global_step, part))

    def totals(self) -> Totals:
        """Sums over the steps since they were last set."""
        return Totals(*self._totals.numpy().tolist())

    def set_totals(self, totals: Totals) -> None:
        """Start the sums from `totals`."""
        self._totals.assign([totals.loss, totals.num_right, totals.num_examples])

    def first_bad_step(self) -> int | None:
        """The first global_step whose loss was not finite, or None."""
        step = int(self._first_bad_step.numpy())
        return None if step < 0 else step

    def evaluate(self, batches: Iterable[Batch]) -> Totals:
        """Loss and accuracy on batches, with the averaged weights where there are; part by part."""
        total = np.zeros(3)
        with self.averages_in_place():
            for batch in batches:
                for part in batch.parts():
                    if len(part):
                        total += self._evaluate(part.images, part.labels).numpy()
        return Totals(*total.tolist())

    def arrays(self) -> Arrays:
        """Copies of all variables, as a checkpoint keeps them."""
        parts = {
            "model": weights.arrays_of(self.model.variables),
            "optimizer": weights.arrays_of(self.optimizer.variables),
        }
        if self._ema:
            keys = weights.keyed_variables(self._averaged)
            parts["ema"] = {key: np.array(a.numpy()) for key, a in zip(keys, self._averages, strict=True)}
        return parts

    def load_arrays(self, arrays: Arrays, what: str) -> None:
        """Set all variables. Raises CheckpointError where they don't fit."""
        weights.assign(self.model.variables, arrays["model"], f"{what} (model)")
        weights.assign(self.optimizer.variables, arrays["optimizer"], f"{what} (optimizer)")
        if self._ema:
            for key, average in zip(weights.keyed_variables(self._averaged), self._averages, strict=True):
                average.assign(arrays["ema"][key])

    @contextlib.contextmanager
    def averages_in_place(self) -> Iterator[None]:
        """While the block runs, the model has the averaged weights, where there are."""
        current = [variable.numpy() for variable in self._averaged]
        for variable, average in zip(self._averaged, self._averages, strict=True):
            variable.assign(average)
        try:
            yield
        finally:
            for variable, value in zip(self._averaged, current, strict=True):
                variable.assign(value)

    def _drawn_states(self, global_step: tf.Tensor, part: tf.Tensor) -> Sequence[tuple[Any, tf.Tensor]]:
        drawn = []
        for number, variable in enumerate(self._random_states):
            state = tf.constant([self._seed, number], tf.int64)
            for coordinate in (global_step, part):
                state = tf.random.experimental.stateless_fold_in(state, coordinate)
            drawn.append((variable, tf.cast(state, variable.dtype)))
        return drawn

    def _trace(self) -> None:
        # tf.function sees the variables that are trainable when it is traced, so freezing needs other ones.
        self._trainable = list(self.model.trainable_variables)
        model, plain = self.model, Loss(self.loss.num_classes)
        self.compute_compiled: Callable[..., Work] = self.compute
        if self._compile_with_xla:
            self.compute_compiled = traced(self.compute, input_signature=self.signature, jit_compile=True)

        @traced(input_signature=[tf.TensorSpec((), tf.float32), *self.signature])
        def step(learning_rate, *arguments):  # type: ignore[no-untyped-def]
            self.apply(self.compute_compiled(*arguments), learning_rate, global_step=arguments[-2])

        @traced(input_signature=self.signature[:2])
        def evaluate(images, labels):  # type: ignore[no-untyped-def]
            logits = model(images, training=False)
            ones = tf.ones(tf.shape(labels), tf.float32)
            return sums(logits, plain.per_example(logits, labels, labels, ones), labels)

        self._step, self._evaluate = step, evaluate
