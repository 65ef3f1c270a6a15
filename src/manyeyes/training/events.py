"""What a training tells whoever watches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from manyeyes.training.clock import WorkerSpeed


@dataclass(frozen=True)
class Started:
    """The loop begins: `global_step` steps are done already."""

    run: str
    model: str
    num_parameters: int
    precision: str
    num_examples: int
    steps_per_epoch: int
    epochs: int
    global_batch_size: int
    global_step: int
    world_size: int = 1


@dataclass(frozen=True)
class Notice:
    """Something that people should know."""

    text: str


@dataclass(frozen=True)
class Progress:
    """Where the loop is, several times a second.

    Attributes:
        epoch: from 1.
        step: steps done of this epoch.
        global_step: steps done of the run.
        loss, accuracy: over this epoch so far; under augmentation, mix and dropout.
        images_per_second, input_wait_share: over this session so far; the share of time that the step waited for input.
        remaining_seconds: until the last epoch ends, by the speed so far.
        workers: how fast each worker goes; empty where there is one.
    """

    epoch: int
    step: int
    global_step: int
    loss: float
    accuracy: float
    learning_rate: float
    images_per_second: float
    input_wait_share: float
    remaining_seconds: float
    workers: tuple[WorkerSpeed, ...] = ()


@dataclass(frozen=True)
class EpochEnd:
    """An epoch is over and its checkpoint stands; `val_…` is None where there is no val split."""

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    val_loss: float | None
    val_accuracy: float | None
    is_best: bool
    seconds: float


@dataclass(frozen=True)
class Saved:
    """A checkpoint stands."""

    global_step: int


Event = Started | Notice | Progress | EpochEnd | Saved
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Take an event where nobody watches."""
