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

    from manyeyes.engines.base import Engine

DatasetArgument = Annotated[
    str, typer.Argument(metavar="DATASET", help="Dataset directory, made by `manyeyes ingest`.", show_default=False)
]
EngineName = Annotated[
    str, typer.Option("--engine", help=f"Where the job runs: {', '.join(ENGINE_NAMES)}.", rich_help_panel="Execution")
]
NumWorkers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Tasks at once; default: one per core, or what the cluster offers.",
        rich_help_panel="Execution",
    ),
]
EngineConfig = Annotated[
    str | None,
    typer.Option(
        "--engine-config",
        metavar="FILE",
        help="TOML file with settings of the engine: master, executors … (docs/guides/).",
        rich_help_panel="Execution",
    ),
]
EngineSet = Annotated[
    list[str] | None,
    typer.Option(
        "--engine-set",
        metavar="KEY=VALUE",
        help="One setting of the engine, over those of the file, e.g. master=spark://host:7077; may be repeated.",
        rich_help_panel="Execution",
    ),
]
ShipEnv = Annotated[
    bool,
    typer.Option(
        "--ship-env",
        help="Send this Python environment to the cluster's nodes (packed once), where it is not installed.",
        rich_help_panel="Execution",
    ),
]
WithReport = Annotated[
    bool, typer.Option("--report/--no-report", help="Whether to write report.html beside the numbers.")
]
JsonOutput = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON on standard output and nothing else there.")
]


def engine_settings(config_path: str | None, assignments: list[str] | None) -> dict[str, Any]:
    """What --engine-config and --engine-set say.

    Raises:
        ConfigError: there is no such file, or it can't be read; or an assignment is none.
    """
    from manyeyes import config

    found = config.load_toml(config_path, "engine configuration") if config_path else {}
    return config.override(found, assignments or ())


def make_engine(
    name: str,
    workers: int | None,
    config_path: str | None = None,
    assignments: list[str] | None = None,
    ship_env: bool = False,
) -> Engine:
    """The engine that the options under "Execution" name.

    Raises:
        UsageError: no such engine, or no such setting of it.
    """
    from manyeyes.engines.registry import create_engine

    settings = engine_settings(config_path, assignments)
    return create_engine(name, workers, settings | ({"ship_env": True} if ship_env else {}))


def console() -> Console:
    """The console for people: standard error, so that standard output stays clean for results."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def output() -> Console:
    """The console for results that people read: standard output; `soft_wrap=True` keeps a line in one piece."""
    from rich.console import Console

    return Console(highlight=False)


def write_report(directory: str) -> None:
    """Write report.html into what `evaluate` or `crossval` has just written, and say where it is."""
    from manyeyes.report.build import write_report

    with console().status("Writing the report"):
        (uri,) = write_report(directory)
    console().print(f"Report: {uri}", soft_wrap=True, markup=False)


def print_json(content: Any) -> None:
    """Print one JSON document on standard output."""
    sys.stdout.write(json.dumps(content, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


@contextmanager
def progress_bar(unit: str = "images", *, hidden: bool = False) -> Iterator[Progress]:
    """A progress bar on standard error with count, rate and time left; silent where that is not a terminal.

    What an engine says meanwhile (the URL of a job, its counters, a lost executor) is printed above the bar.
    """
    import logging

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

        class Above(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                progress.console.print(record.getMessage(), markup=False, soft_wrap=True)

        handler, log = Above(), logging.getLogger("manyeyes.engines")
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
        try:
            yield progress
        finally:
            log.removeHandler(handler)
