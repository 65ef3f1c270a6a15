"""A training as people watch it: a live line, and one a worker, on a terminal; plain lines in a file or a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from manyeyes.training.clock import WorkerSpeed
from manyeyes.training.events import EpochEnd, Event, Notice, Progress, Saved, Started

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_PLAIN_LINES = 30.0


@contextmanager
def live_line(console: Console) -> Iterator[Callable[[Event], None]]:
    """Show events on `console`; yields the function that takes them."""
    if console.is_terminal:
        from rich.live import Live
        from rich.text import Text

        with Live(console=console, refresh_per_second=8, transient=True) as live:

            def show(event: Event) -> None:
                if isinstance(event, Saved):
                    return
                if isinstance(event, Progress):
                    lines = [describe(event), *(describe_worker(worker) for worker in event.workers)]
                    live.update(Text("\n".join(lines), no_wrap=True, overflow="ellipsis"))
                else:
                    live.console.print(describe(event), soft_wrap=True, markup=False)

            yield show
        return

    printed_at = time.monotonic()

    def print_plainly(event: Event) -> None:
        nonlocal printed_at
        if isinstance(event, Saved):
            return
        if isinstance(event, Progress):
            if time.monotonic() - printed_at < SECONDS_BETWEEN_PLAIN_LINES:
                return
            printed_at = time.monotonic()
        console.print(describe(event), soft_wrap=True, markup=False)
        for worker in event.workers if isinstance(event, Progress) else ():
            console.print(describe_worker(worker), soft_wrap=True, markup=False)

    yield print_plainly


def describe(event: Event) -> str:
    """One line for people."""
    if isinstance(event, Started):
        model = f"{event.model} ({event.num_parameters:,} parameters, {event.precision})"
        epochs = f"{event.epochs} x {event.num_examples:,} examples, {event.steps_per_epoch:,} steps an epoch"
        going_on = f", going on after step {event.global_step}" if event.global_step else ""
        workers = f" on {event.world_size} workers" if event.world_size > 1 else ""
        return f"{model}: {epochs} with {event.global_batch_size} each{workers}{going_on}"
    if isinstance(event, Progress):
        return (
            # What matters most comes first: a narrow terminal cuts off the end.
            f"epoch {event.epoch} step {event.step:,}  left {_duration(event.remaining_seconds)}  "
            f"loss {event.loss:.4f}  accuracy {event.accuracy:.2%}  {event.images_per_second:,.0f} images/s  "
            f"input wait {event.input_wait_share:.0%}  learning rate {event.learning_rate:.2e}"
        )
    if isinstance(event, EpochEnd):
        val = ""
        if event.val_accuracy is not None:
            best = " (best)" if event.is_best else ""
            val = f"  val loss {event.val_loss:.4f}  val accuracy {event.val_accuracy:.2%}{best}"
        return (
            f"epoch {event.epoch}/{event.epochs}  loss {event.loss:.4f}  accuracy {event.accuracy:.2%}{val}  "
            f"{_duration(event.seconds)}"
        )
    if isinstance(event, Notice):
        return f"note: {event.text}"
    raise TypeError(f"{event!r} is not an event of training.")


def describe_worker(worker: WorkerSpeed) -> str:
    """One line for people."""
    straggler = "  straggler: the others wait for it" if worker.is_straggler else ""
    return (
        f"  worker {worker.rank}  {worker.images_per_second:,.0f} images/s  compute {worker.compute_share:.0%}  "
        f"communication {worker.communication_share:.0%}  input wait {worker.input_wait_share:.0%}{straggler}"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
