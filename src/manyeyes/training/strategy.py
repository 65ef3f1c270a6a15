"""The strategy: how batches become weights, on how many workers. The loop knows nothing else of it."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from manyeyes.training.checkpoint import Arrays
from manyeyes.training.clock import Clock, WorkerSpeed


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
    """What the training loop asks for.

    Attributes:
        is_chief: whether this process writes the checkpoints and the metrics.
        steps_per_epoch: global batches in an epoch.
        num_parameters: values in the model's weights.
        clock: how fast the steps go.
        workers: how fast each worker goes; empty where there is one.
        sent_bytes: that workers read from and wrote to the run directory in this session; None where they don't.
    """

    is_chief: bool
    steps_per_epoch: int
    num_parameters: int
    clock: Clock
    workers: tuple[WorkerSpeed, ...]
    sent_bytes: int | None

    def steps(self, epoch: int, start_step: int, global_step: int) -> Generator[int, None, None]:
        """Learn from what is left of an epoch; yields the number of global steps done since it yielded last.

        0 says that it was cut short by a wish to stop.

        Args:
            start_step: steps of the epoch that are done.
            global_step: steps of the run that are done.
        """
        ...

    def must_stop(self, wish: bool, step: int) -> bool:
        """Whether all workers stop after this step of the epoch, because one of them got a wish to."""
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

    def evaluate(self) -> Totals | None:
        """Loss and accuracy on the val split, with the averaged weights where there are; None without the split."""
        ...

    def check(self) -> None:
        """Make sure that all workers have the same weights. Raises TrainingError where they don't."""
        ...

    def arrays(self) -> Arrays:
        """Copies of all variables, as a checkpoint keeps them."""
        ...

    def load_arrays(self, arrays: Arrays, what: str) -> None:
        """Set all variables. Raises CheckpointError where they don't fit."""
        ...
