"""`manyeyes evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from manyeyes.cli import common


def command(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The run (its best checkpoint) or the bundle.", show_default=False)
    ],
    dataset: common.DatasetArgument,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Directory for numbers and pictures; default for a run: in the run."),
    ] = None,
    predictions: Annotated[
        bool, typer.Option("--predictions", help="Also keep what the model says of every example, as Parquet.")
    ] = False,
    cost_matrix: Annotated[
        str | None,
        typer.Option(
            help="CSV file with the cost of each mistake: a row for each true class, a column for each other."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images that the model takes at once.")] = 64,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    engine: Annotated[
        str | None,
        typer.Option(
            help=f"Where the job runs: {', '.join(common.ENGINE_NAMES)}; default: inline for a run, else local.",
            rich_help_panel="Execution",
        ),
    ] = None,
    workers: common.NumWorkers = None,
    engine_config: common.EngineConfig = None,
    engine_set: common.EngineSet = None,
    ship_env: common.ShipEnv = False,
    report: common.WithReport = True,
    json_output: common.JsonOutput = False,
) -> None:
    """Measure how well a RUN or a BUNDLE recognises the examples of a DATASET.

    Gives accuracy, precision, recall, F1, AUC, calibration and more with intervals, and writes evaluation.json,
    pictures, and report.html, which shows it all.

    Example: `manyeyes evaluate runs/fashion datasets/fashion`
    """
    import shlex

    from rich.table import Table

    from manyeyes.evaluation.evaluate import evaluate
    from manyeyes.evaluation.tables import tables

    if engine is None and (workers or engine_config or engine_set or ship_env):
        engine = "local"
    with common.progress_bar("images", hidden=json_output) as progress:
        task = progress.add_task("Evaluating", total=None)
        result = evaluate(
            model,
            dataset,
            split=split,
            engine=common.make_engine(engine, workers, engine_config, engine_set, ship_env) if engine else None,
            batch_size=batch_size,
            confidence=confidence,
            out=out,
            predictions=predictions,
            cost_matrix=cost_matrix,
            on_progress=lambda num_done, total: progress.update(task, completed=num_done, total=total),
        )
    if report and result.files:
        common.write_report(result.files[0].rpartition("/")[0])
    if json_output:
        common.print_json(result.to_dict())
        return
    console = common.output()
    for part in tables(result):
        if isinstance(part, Table):
            console.print(part)
        else:
            console.print(part, soft_wrap=True, markup=False)
    uri = shlex.quote(result.model)
    following = f"manyeyes export {uri} BUNDLE" if result.model_kind == "run" else f"manyeyes serve {uri}"
    console.print(f"Next: {following}", soft_wrap=True, markup=False)
