"""How fast a session goes, and what its steps wait for."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

from manyeyes.data.pipeline import Batch

# A worker that computes so many times longer than the median is a straggler.
STRAGGLER_FACTOR = 1.3


@dataclass(frozen=True)
class WorkerSpeed:
    """How fast one worker goes: shares of its time since the session began, or since the report before.

    Attributes:
        rank: of the worker.
        images_per_second: that it computed itself.
        input_wait_share: share of the steps' time spent waiting for input.
        compute_share: share spent on gradients and their application.
        communication_share: share spent on the exchange, with the wait for slower workers.
        is_straggler: whether it computes much longer than the others, so that they wait for it.
    """

    rank: int
    images_per_second: float
    input_wait_share: float
    compute_share: float
    communication_share: float
    is_straggler: bool = False


class Clock:
    """Sums of times over the steps of a session, all but the first, in which the step is compiled."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._num_steps = 0
        self._asked = 0.0
        self.step_seconds = 0.0
        self.wait_seconds = 0.0
        self.communication_seconds = 0.0
        self.num_examples = 0
        self.num_own_examples = 0
        self.num_timed_steps = 0

    @property
    def seconds(self) -> float:
        """Since the session began."""
        return time.perf_counter() - self._start

    @property
    def images_per_second(self) -> float:
        """Of all workers together."""
        return self.num_examples / self.step_seconds if self.step_seconds else 0.0

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a step."""
        return self.step_seconds / max(1, self.num_timed_steps)

    @property
    def input_wait_share(self) -> float:
        """Share of the steps' time spent waiting for input."""
        return self.wait_seconds / self.step_seconds if self.step_seconds else 0.0

    def timed(self, batches: Iterator[Batch]) -> Generator[Batch, None, None]:
        """Yield the batches and time the waiting for them and what is done with them."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            got, communication = time.perf_counter(), self.communication_seconds
            yield batch
            if self._num_steps:
                self.add(
                    seconds=time.perf_counter() - asked,
                    wait_seconds=got - asked,
                    num_examples=batch.global_size,
                    num_own_examples=len(batch),
                )
            else:
                self.communication_seconds = communication
            self._num_steps += 1

    def add(
        self,
        *,
        seconds: float,
        wait_seconds: float,
        num_examples: int,
        num_own_examples: int,
        num_steps: int = 1,
        communication_seconds: float = 0.0,
    ) -> None:
        """Count what some steps took."""
        self.step_seconds += seconds
        self.wait_seconds += wait_seconds
        self.communication_seconds += communication_seconds
        self.num_examples += num_examples
        self.num_own_examples += num_own_examples
        self.num_timed_steps += num_steps

    def readings(self) -> tuple[float, float, float, float]:
        """Sums so far: seconds of the steps, of waiting for input, of communication, and own examples."""
        return self.step_seconds, self.wait_seconds, self.communication_seconds, float(self.num_own_examples)


def speeds_of(readings: list[tuple[float, float, float, float]]) -> tuple[WorkerSpeed, ...]:
    """What the readings of the clocks of all ranks say; none for one rank alone."""
    if len(readings) < 2:
        return ()
    computes = [max(0.0, seconds - wait - communication) for seconds, wait, communication, _ in readings]
    busy = [compute + wait for compute, (_, wait, _, _) in zip(computes, readings, strict=True)]
    median = sorted(busy)[(len(busy) - 1) // 2]
    return tuple(
        WorkerSpeed(
            rank=rank,
            images_per_second=examples / seconds if seconds else 0.0,
            input_wait_share=wait / seconds if seconds else 0.0,
            compute_share=computes[rank] / seconds if seconds else 0.0,
            communication_share=communication / seconds if seconds else 0.0,
            is_straggler=busy[rank] > STRAGGLER_FACTOR * median,
        )
        for rank, (seconds, wait, communication, examples) in enumerate(readings)
    )
