"""The `manyeyes` command."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Annotated

import typer

import manyeyes
from manyeyes.engines.base import COMMAND_VARIABLE
from manyeyes.errors import ManyeyesError

# In the order of the journey; each is a module of this package with a function `command`.
VERBS = (
    "ingest",
    "audit",
    "train",
    "tune",
    "evaluate",
    "crossval",
    "report",
    "compare",
    "export",
    "predict",
    "serve",
    "watch",
    "verify-scaling",
    "doctor",
)

app = typer.Typer(
    name="manyeyes",
    help="From labelled images to a recogniser that answers in real time.\n\n"
    "Start with: `manyeyes ingest FOLDER DATASET`; every verb ends by saying the next.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for verb in VERBS:
    app.command(verb)(importlib.import_module(f"manyeyes.cli.{verb.replace('-', '_')}").command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"manyeyes {manyeyes.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ[COMMAND_VARIABLE] = "1"


def run() -> None:
    """Entry point: a known error becomes one line on standard error and its exit code (see manyeyes.errors)."""
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except ManyeyesError as error:
        print(f"manyeyes: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader of our output went away (`manyeyes … | head`): end quietly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        # The machine's answer, not a fault of the program: no permission, no space, too many open files.
        where = f"{error.filename}: " if error.filename else ""
        print(f"manyeyes: error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(ManyeyesError.exit_code)
    except KeyboardInterrupt:
        print("manyeyes: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
