"""Synchronous data-parallel training: every step, all workers sum their gradients and take the same step."""

from __future__ import annotations

import contextlib
import operator
import zlib
from collections.abc import Generator
from typing import Any

import numpy as np
import tensorflow as tf

from manyeyes.data.order import parts_of_rank
from manyeyes.data.pipeline import Batch, InputPipeline
from manyeyes.errors import TrainingError
from manyeyes.training import tree
from manyeyes.training.checkpoint import Arrays
from manyeyes.training.clock import Clock, WorkerSpeed, speeds_of
from manyeyes.training.collective import Collective
from manyeyes.training.device_feed import on_device
from manyeyes.training.plan import Plan
from manyeyes.training.replica import Packing, Replica
from manyeyes.training.reporting import Life
from manyeyes.training.step import traced
from manyeyes.training.strategy import Totals

# How often workers compare their speeds and, where an exchange takes milliseconds, ask each other for wishes to stop.
SPEEDS_EVERY_STEPS = 10


class AllReduce:
    """See strategy.Strategy.

    The global batch is cut into parts; a worker computes its parts one after another. Their gradients are summed over
    all workers by one exchange, packed with the changes of the normalisations' statistics and the sums for the metrics.

    Args:
        replica: this worker's copy, equal to all others.
        plan: of the run.
        train_pipeline: this worker's parts of the train split.
        val_pipeline: of the val split, or None.
        collective: that connects the workers.
        syncs_norms: whether the model's normalisations exchange their moments (see training.norms).
        is_exact: sum the parts in one fixed order whoever computes them (see training.tree), so that the weights are
            the same bits on any number of workers. Every worker then receives the sums of all, not one sum.
        life: is told what this worker is at.
    """

    def __init__(
        self,
        replica: Replica,
        plan: Plan,
        train_pipeline: InputPipeline,
        val_pipeline: InputPipeline | None,
        collective: Collective,
        *,
        syncs_norms: bool = False,
        is_exact: bool = False,
        life: Life | None = None,
    ) -> None:
        self.replica = replica
        self.clock = Clock()
        self.workers: tuple[WorkerSpeed, ...] = ()
        self.sent_bytes: int | None = None
        self.steps_per_epoch = train_pipeline.steps_per_epoch
        self.num_parameters = int(replica.model.count_params())
        self.is_chief = collective.rank == 0
        self._plan = plan
        self.train_pipeline = train_pipeline
        self._val_pipeline = val_pipeline
        self._collective = collective
        self._syncs_norms = syncs_norms
        self._is_exact = is_exact
        self._life = life or Life()
        self._nodes = tree.nodes_of(train_pipeline.parts)
        self._is_alone = collective.world_size == 1 and train_pipeline.num_parts == 1
        self._readings = [(0.0, 0.0, 0.0, 0.0)] * collective.world_size
        self._trace()

    def steps(self, epoch: int, start_step: int, global_step: int) -> Generator[int, None, None]:
        """See Strategy.steps."""
        if self.replica.let_learn(self._plan.learning(epoch)):
            self._trace()
        if start_step == 0 and self._plan.frees_backbone(epoch):
            self.replica.reset_optimizer()
        with contextlib.closing(on_device(self.train_pipeline.batches(epoch, start_step))) as batches:
            for batch in self.clock.timed(batches):
                self._step(batch, self._plan.learning_rate(epoch, batch.step), global_step)
                self.clock.communication_seconds += self._collective.take_seconds()
                global_step += 1
                self._life.beat("input", global_step)
                yield 1

    def must_stop(self, wish: bool, step: int) -> bool:
        """See Strategy.must_stop."""
        if self._collective.world_size == 1:
            return wish
        shows = step % SPEEDS_EVERY_STEPS == 0
        if not shows and not self._collective.is_quick:
            return False
        told = self._collective.gather_numbers([float(wish), *self.clock.readings()])
        if shows:
            self._compare([tuple(row[1:]) for row in told.tolist()])
        return bool(told[:, 0].any())

    def _compare(self, readings: list[Any]) -> None:
        recent = [
            tuple(a - b for a, b in zip(now, before, strict=True))
            for now, before in zip(readings, self._readings, strict=True)
        ]
        if all(seconds for seconds, *_ in recent):
            self.workers, self._readings = speeds_of(recent), readings

    def totals(self) -> Totals:
        """See Strategy.totals."""
        return self.replica.totals()

    def set_totals(self, totals: Totals) -> None:
        """See Strategy.set_totals."""
        self.replica.set_totals(totals)

    def first_bad_step(self) -> int | None:
        """See Strategy.first_bad_step."""
        return self.replica.first_bad_step()

    def evaluate(self) -> Totals | None:
        """See Strategy.evaluate."""
        if self._val_pipeline is None:
            return None
        with contextlib.closing(on_device(self._val_pipeline.batches(0))) as batches:
            own = self.replica.evaluate(self._beating(batches))
        self._life.beat("exchange")
        told = self._collective.gather_numbers([own.loss, own.num_right, own.num_examples])
        return Totals(*told.sum(axis=0).tolist())

    def check(self) -> None:
        """See Strategy.check."""
        if self._collective.world_size == 1:
            return
        checksum = 0
        for variable in self.replica.model.variables:
            checksum = zlib.crc32(np.ascontiguousarray(variable.numpy()).tobytes(), checksum)
        told = self._collective.gather_numbers([float(checksum)])[:, 0]
        differing = np.flatnonzero(told != told[0]).tolist()
        if differing:
            raise TrainingError(
                f"The weights of worker(s) {differing} differ from those of worker 0, though all apply the same sums. "
                "Do the workers have different processors or libraries? Give them equal ones."
            )

    def arrays(self) -> Arrays:
        """See Strategy.arrays."""
        return self.replica.arrays()

    def load_arrays(self, arrays: Arrays, what: str) -> None:
        """See Strategy.load_arrays."""
        self.replica.load_arrays(arrays, what)

    def _beating(self, batches: Generator[Batch, None, None]) -> Generator[Batch, None, None]:
        for batch in batches:
            self._life.beat("evaluation")
            yield batch

    def _trace(self) -> None:
        """Trace the two halves of a step, for the variables that learn now."""
        replica = self.replica
        packing = Packing.of(replica)

        def packed_work(*arguments):  # type: ignore[no-untyped-def]
            return packing.pack(replica.compute_compiled(*arguments))

        @traced(input_signature=replica.signature)
        def compute(*arguments):  # type: ignore[no-untyped-def]
            return (self._collective.among_workers(packed_work) if self._syncs_norms else packed_work)(*arguments)

        @traced
        def apply(packed, learning_rate, global_step):  # type: ignore[no-untyped-def]
            replica.apply(packing.unpack(packed), learning_rate, global_step)

        self._compute, self._apply = compute, apply
        self._packing = packing

    def _step(self, batch: Batch, learning_rate: float, global_step: int) -> None:
        if self._is_alone:
            self.replica.step(batch, learning_rate, global_step)
            return
        self._apply(self.summed(batch, global_step), np.float32(learning_rate), np.int64(global_step))

    def summed(self, batch: Batch, global_step: int) -> tf.Tensor:
        """The packed work of all workers for a global batch, of which `batch` is this worker's share; float (n,).

        Nothing learns from it. It begins with the gradients, in the order of the variables that learn.
        """
        self._life.beat("compute")
        parts = dict(zip(self.train_pipeline.parts, batch.parts(), strict=True))

        def work_of(part: int) -> tf.Tensor:
            batch = parts[part]
            if len(batch) == 0:
                if not self._syncs_norms:
                    return tf.zeros(self._packing.size, self._packing.dtype)
                batch = Replica.stand_in(batch)
            return self._compute(*Replica.arguments_of(batch, global_step, part))

        nodes = [tree.sum_node(node, work_of, operator.add) for node in self._nodes]
        self._life.beat("exchange")
        return self._sum_exactly(nodes) if self._is_exact else self._collective.sum(sum(nodes[1:], nodes[0]))

    def _sum_exactly(self, nodes: list[tf.Tensor]) -> tf.Tensor:
        world_size, num_parts = self._collective.world_size, self.train_pipeline.num_parts
        nodes_of_ranks = [tree.nodes_of(parts_of_rank(rank, world_size, num_parts)) for rank in range(world_size)]
        most = max(len(nodes) for nodes in nodes_of_ranks)
        padded = nodes + [tf.zeros_like(nodes[0])] * (most - len(nodes))
        gathered = self._collective.gather(tf.stack(padded))
        values = {node: gathered[rank, i] for rank, own in enumerate(nodes_of_ranks) for i, node in enumerate(own)}
        return tree.sum_all(values, num_parts, operator.add)
