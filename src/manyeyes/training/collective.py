"""What workers of a gang exchange while they train: sums and gathers of tensors over all of them.

Variables stay plain ones of each process: workers hold equal copies because they start equal and apply equal sums, so
only what is exchanged goes through here (docs/decisions/0100).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import tensorflow as tf

from manyeyes.engines.base import GangContext
from manyeyes.training import backend
from manyeyes.training.ring import Ring
from manyeyes.training.step import traced

Kind = Literal["auto", "ring", "tensorflow"]


def connect(context: GangContext, secret: str = "", kind: Kind = "auto") -> Collective:
    """Meet the other workers of a gang.

    Args:
        secret: that all workers know.
        kind: "ring": sockets, for CPUs; "tensorflow": NCCL between GPUs, gRPC between CPUs, to be set up before any
            operation runs in this process (see backend.prepare); "auto": TensorFlow's if every worker has a GPU of its
            own, as NCCL demands.

    Raises:
        ConnectionError: a worker did not come.
    """
    if context.world_size == 1:
        return Collective(context)
    if kind == "tensorflow":
        return TensorFlowCollective(context)
    ring = Ring(context, secret)
    # Agreed on by all: hosts may differ in what they have.
    if kind == "auto" and ring.gather(np.array([backend.has_own_gpu(context)])).all():
        ring.close()
        return TensorFlowCollective(context)
    return RingCollective(context, ring)


class Collective:
    """Of one worker alone: all exchanges are free. The others are derived from it.

    Attributes:
        is_quick: whether an exchange of a few numbers costs next to nothing.
    """

    is_quick = True

    def __init__(self, context: GangContext) -> None:
        self._seconds = 0.0
        self.rank = context.rank
        self.world_size = context.world_size

    def sum(self, tensor: Any) -> tf.Tensor:
        """The sum of a tensor over all workers, on each of them: the same bits."""
        return tensor

    def gather(self, tensor: Any) -> tf.Tensor:
        """The tensors of all workers by rank, on each of them: shape (n, …) becomes (world_size, n, …)."""
        return tf.convert_to_tensor(tensor)[None]

    def take_seconds(self) -> float:
        """The time spent on exchanges, and on waiting for others in them, since this was asked last."""
        taken, self._seconds = self._seconds, 0.0
        return taken

    def gather_numbers(self, numbers: list[float]) -> np.ndarray:
        """float64 (world_size, n)."""
        return np.asarray(self.gather(np.asarray(numbers, np.float64)))

    @contextlib.contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    def among_workers(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Return `fn` so that `gather_inside` works in it; to be called in a traced function, by all workers alike."""
        return fn

    def gather_inside(self, tensor: tf.Tensor) -> tf.Tensor:
        """`gather` in a function of `among_workers`, with gradients."""
        return tensor[None]


class RingCollective(Collective):
    """Over sockets; see training.ring."""

    def __init__(self, context: GangContext, ring: Ring) -> None:
        super().__init__(context)
        self._ring = ring
        self._last: tf.Operation | None = None

    def sum(self, tensor: Any) -> tf.Tensor:
        """See Collective.sum."""
        return tf.constant(self._sum(np.asarray(tensor)))

    def gather(self, tensor: Any) -> tf.Tensor:
        """See Collective.gather."""
        return tf.constant(self._gather(np.asarray(tensor)))

    def gather_inside(self, tensor: tf.Tensor) -> tf.Tensor:
        """See Collective.gather_inside."""

        @tf.custom_gradient
        def gather(mine: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
            return (
                self._in_order(self._gather, mine, (self.world_size, *mine.shape)),
                # Each worker's result depends on every worker's tensor, so what comes back for mine comes from all.
                lambda upstream: self._in_order(lambda array: self._sum(array)[self.rank], upstream, mine.shape),
            )

        return gather(tensor)

    def _sum(self, array: np.ndarray) -> np.ndarray:
        with self._timed():
            return self._ring.sum(array)

    def _gather(self, array: np.ndarray) -> np.ndarray:
        with self._timed():
            return self._ring.gather(array)

    def _in_order(self, exchange: Callable[[np.ndarray], np.ndarray], tensor: tf.Tensor, shape: Any) -> tf.Tensor:
        """Make an operation of an exchange, in the order of tracing: TensorFlow may run what is independent in any."""
        graph = tf.compat.v1.get_default_graph()
        before = [self._last] if self._last is not None and self._last.graph is graph else []
        with tf.control_dependencies(before):
            result = tf.numpy_function(exchange, [tensor], tensor.dtype)
        self._last = result.op
        return tf.ensure_shape(result, shape)


class TensorFlowCollective(Collective):
    """By `tf.distribute`: NCCL on GPUs, a ring over gRPC on CPUs. Exchanges inside a step are not timed."""

    is_quick = False

    def __init__(self, context: GangContext) -> None:
        super().__init__(context)
        cluster = tf.train.ClusterSpec({"worker": list(context.addresses)})
        resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
            cluster, task_type="worker", task_id=context.rank, rpc_layer="grpc"
        )
        # Left to itself (AUTO), TensorFlow takes gRPC between GPUs too.
        kind = "NCCL" if tf.config.get_visible_devices("GPU") else "RING"
        options = tf.distribute.experimental.CommunicationOptions(
            implementation=tf.distribute.experimental.CommunicationImplementation(kind)
        )
        self._strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver, options)

    def sum(self, tensor: Any) -> tf.Tensor:
        """See Collective.sum."""
        with self._timed():
            return self._traced(_all_reduce)(tensor)

    def gather(self, tensor: Any) -> tf.Tensor:
        """See Collective.gather."""
        with self._timed():
            return self._traced(_all_gather)(tensor)

    def among_workers(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """See Collective.among_workers."""
        return lambda *arguments: self._strategy.run(fn, arguments)

    def gather_inside(self, tensor: tf.Tensor) -> tf.Tensor:
        """See Collective.gather_inside."""
        return _all_gather(tensor)

    @functools.cache  # noqa: B019  lives as long as the process
    def _traced(self, exchange: Callable[[tf.Tensor], tf.Tensor]) -> Callable[[Any], tf.Tensor]:
        return traced(self.among_workers(exchange), reduce_retracing=True)


def _all_reduce(tensor: tf.Tensor) -> tf.Tensor:
    # A tensor that comes from outside has no device, and TensorFlow asks for one.
    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(tensor))


def _all_gather(tensor: tf.Tensor) -> tf.Tensor:
    return tf.distribute.get_replica_context().all_gather(tf.identity(tensor)[None], axis=0)
