"""`manyeyes audit`."""

from __future__ import annotations

from typing import Annotated

import typer

from manyeyes.cli import common


def command(
    dataset: common.DatasetArgument,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", help="Directory for audit.json and sheets of the images in question."),
    ] = None,
    predictions: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Predictions for examples that the model was not trained on (`evaluate --predictions`, `crossval`): "
            "finds probable label errors.",
        ),
    ] = None,
    fix: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Write a dataset without copies and leaks: a view, which changes and copies no image.",
        ),
    ] = None,
    distance: Annotated[
        int, typer.Option(help="In how many of 64 bits the hashes of near duplicates may differ, 0 to 8.")
    ] = 6,
    engine: common.EngineName = "local",
    workers: common.NumWorkers = None,
    engine_config: common.EngineConfig = None,
    engine_set: common.EngineSet = None,
    ship_env: common.ShipEnv = False,
    json_output: common.JsonOutput = False,
) -> None:
    """Look for what makes a DATASET's figures dishonest: duplicates, leaks, odd images, wrong labels.

    Example: `manyeyes audit photos.ds --out audit/ --fix photos-mended.ds`
    """
    import shlex

    from rich.table import Table

    from manyeyes.auditing.audit import audit
    from manyeyes.auditing.tables import tables

    with common.progress_bar("images", hidden=json_output) as progress:
        task = progress.add_task("Measuring", total=None)
        result = audit(
            dataset,
            engine=common.make_engine(engine, workers, engine_config, engine_set, ship_env),
            distance=distance,
            predictions=predictions,
            out=out,
            fix=fix,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if json_output:
        common.print_json(result.to_dict())
        return
    console = common.output()
    for part in tables(result):
        if isinstance(part, Table):
            console.print(part)
        else:
            console.print(part, soft_wrap=True, markup=False)
    if result.distance < distance:
        note = f"So many hashes lie close that only a distance of {result.distance} says anything here."
        console.print(note, soft_wrap=True, markup=False)
    if result.fixed is not None and "train" not in result.fixed.written:
        following = f"manyeyes audit {shlex.quote(dataset)} --out AUDIT"
    elif result.fixed is not None:
        following = f"manyeyes train {shlex.quote(result.fixed.dataset)} --out RUN"
    elif result.leaks or result.num_copies or result.straddling_groups:
        following = f"manyeyes audit {shlex.quote(dataset)} --fix MENDED"
    else:
        following = f"manyeyes train {shlex.quote(dataset)} --out RUN"
    console.print(f"Next: {following}", soft_wrap=True, markup=False)
