"""What the verbs share: options, output for people and for pipes, progress bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyeyes.engines.registry import ENGINE_NAMES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

EngineName = Annotated[
    str, typer.Option("--engine", help=f"Where the job runs: {', '.join(ENGINE_NAMES)}.", rich_help_panel="Execution")
]
NumWorkers = Annotated[
    int | None,
    typer.Option("--workers", help="Number of worker processes; default: one per core.", rich_help_panel="Execution"),
]
JsonOutput = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output and nothing else there.")
]


def console() -> Console:
    """The console for people: standard error, so that standard output stays clean for results."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def output() -> Console:
    """The console for results that people read: standard output; `soft_wrap=True` keeps a line in one piece."""
    from rich.console import Console

    return Console(highlight=False)


def print_json(content: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


@contextmanager
def progress_bar(unit: str = "images", *, hidden: bool = False) -> Iterator[Progress]:
    """A progress bar on standard error with count, rate and time left; silent where that is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Any) -> Text:
            speed = task.finished_speed or task.speed
            return Text(f"{speed:,.0f} {unit}/s" if speed else "", style="progress.data.speed")

    out = console()
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeRemainingColumn(),
        console=out,
        disable=hidden or not out.is_terminal,
    ) as progress:
        yield progress
