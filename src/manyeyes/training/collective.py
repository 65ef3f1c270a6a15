"""What workers of a gang exchange while they train: TensorFlow's collectives, on tensors that are packed into one."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from manyeyes.engines.base import GangContext


class Collective:
    """Sums and gathers tensors over all workers. With one worker it does nothing, at no cost.

    TensorFlow's collectives are set up when the object is made, which must be before any operation runs in this process
    (see backend.prepare). Variables stay plain ones of this process: workers hold equal copies because they start
    equal and apply equal sums, so only what is exchanged concerns `tf.distribute` (docs/decisions/0100).
    """

    def __init__(self, context: GangContext) -> None:
        self.rank = context.rank
        self.world_size = context.world_size
        self._strategy: Any = None
        if context.world_size > 1:
            cluster = tf.train.ClusterSpec({"worker": list(context.addresses)})
            resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
                cluster, task_type="worker", task_id=context.rank, rpc_layer="grpc"
            )
            # AUTO is NCCL on GPUs and a ring over gRPC on CPUs.
            self._strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)

    def among_workers(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return `fn` so that `all_reduce` and `all_gather` reach the other workers from within it.

        To be called in a traced function; all workers must call it alike.
        """
        return fn if self._strategy is None else lambda *arguments: self._strategy.run(fn, arguments)

    def sum(self, tensor: Any) -> tf.Tensor:
        """The sum of a tensor over all workers, on each of them: the same bits."""
        return tensor if self._strategy is None else self._traced(all_reduce)(tensor)

    def gather(self, tensor: Any) -> tf.Tensor:
        """The tensors of all workers by rank, on each of them: shape (n, …) becomes (world_size, n, …)."""
        if self._strategy is None:
            return tf.convert_to_tensor(tensor)[None]
        return self._traced(all_gather)(tensor)

    def gather_numbers(self, numbers: list[float]) -> np.ndarray:
        """float64 (world_size, n)."""
        return self.gather(np.asarray(numbers, np.float64)).numpy()

    @functools.cache  # noqa: B019  lives as long as the process
    def _traced(self, exchange: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[Any], tf.Tensor]:
        return tf.function(self.among_workers(exchange), reduce_retracing=True)


def all_reduce(tensor: tf.Tensor) -> tf.Tensor:
    """Inside of `among_workers`: the sum over all workers."""
    # A tensor that comes from outside has no device, and TensorFlow asks for one.
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(tensor))


def all_gather(tensor: tf.Tensor) -> tf.Tensor:
    """Inside of `among_workers`: the tensors of all workers by rank, with a new first axis."""
    return tf.distribute.get_replica_context().all_gather(tf.identity(tensor)[None], axis=0)
