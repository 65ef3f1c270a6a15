"""`manyeyes verify-scaling`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from manyeyes.cli.common import (
    EngineConfig,
    EngineName,
    EngineSet,
    JsonOutput,
    ShipEnv,
    make_engine,
    output,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from manyeyes.training.scaling import Report


def command(
    dataset: Annotated[
        str | None,
        typer.Argument(help="Dataset directory with images of one size; default: a generated one.", metavar="DATASET"),
    ] = None,
    workers: Annotated[
        str, typer.Option("--workers", help="Numbers of workers to compare, the first with all others.")
    ] = "1,2,4",
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps after which weights are compared.")] = 100,
    engine: EngineName = "local",
    engine_config: EngineConfig = None,
    engine_set: EngineSet = None,
    ship_env: ShipEnv = False,
    as_json: JsonOutput = False,
) -> None:
    """Prove that the number of workers changes nothing: same examples, same gradients, same weights.

    Trains a small CNN on each number of workers and compares. The exit code is 4 where a claim does not hold. What
    bit-identical weights cost (--virtual-workers) is said below the table.

    Example: `manyeyes verify-scaling --workers 1,2 --engine spark --engine-set master=local[2]`
    """
    from manyeyes.errors import UsageError
    from manyeyes.training.scaling import verify_scaling

    try:
        sizes = [int(size) for size in workers.split(",")]
    except ValueError:
        raise UsageError(f"--workers {workers} is not a list of numbers. Expected e.g. --workers 1,2,4.") from None
    made = make_engine(engine, max(1, *sizes), engine_config, engine_set, ship_env)
    with progress_bar("runs", hidden=as_json) as progress:
        bar = progress.add_task("training", total=len(sizes) + 1)
        report = verify_scaling(made, sizes, dataset, steps, lambda world_size: progress.advance(bar))
    if as_json:
        print_json({**dataclasses.asdict(report), "holds": report.holds})
    else:
        _print(report)
    if not report.holds:
        raise typer.Exit(4)


def _print(report: Report) -> None:
    from rich.table import Table

    table = Table("claim", "workers", "difference", "allowed", "")
    for check in report.checks:
        found = "same bits" if check.found == 0 and check.allowed == 0 else f"{check.found:.1e}"
        allowed = "none" if check.allowed == 0 else f"{check.allowed:.0e}"
        table.add_row(check.claim, check.workers, found, allowed, "holds" if check.holds else "FAILS")
    out = output()
    out.print(table)
    costs = ", ".join(f"{cost:.2f} on {workers}" for workers, cost in report.exact_cost.items())
    out.print(f"Time of a step with virtual workers / without, by workers: {costs}", soft_wrap=True)
