"""`manyeyes predict`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from manyeyes.cli import common

if TYPE_CHECKING:
    from manyeyes.recognition.batch import PredictResult

_MAX_CLASSES_SHOWN = 15


def command(
    bundle: Annotated[str, typer.Argument(metavar="BUNDLE", help="The bundle that recognises.", show_default=False)],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="An image, a folder, a pattern in quotes, a table or a dataset directory.",
            show_default=False,
        ),
    ],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="The file to write; ends in .parquet or .jsonl.", show_default=False)
    ],
    top_k: Annotated[int, typer.Option(help="Classes to keep per image.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Images that the model takes at once.")] = 32,
    split: Annotated[str | None, typer.Option(help="Of a dataset: train, val or test; default: all.")] = None,
    backend: Annotated[str | None, typer.Option(help="auto, openvino or onnxruntime; default: the bundle's.")] = None,
    engine: common.EngineName = "local",
    workers: common.NumWorkers = None,
    engine_config: common.EngineConfig = None,
    engine_set: common.EngineSet = None,
    ship_env: common.ShipEnv = False,
    json_output: common.JsonOutput = False,
) -> None:
    """Recognise every image of SOURCE by a BUNDLE and write one row an image to OUT.

    Example: `manyeyes predict bundles/fashion photos/ predictions.parquet`
    """
    from manyeyes import config
    from manyeyes.errors import DataError
    from manyeyes.recognition.batch import predict

    with common.progress_bar("images", hidden=json_output) as progress:
        task = progress.add_task("Predicting", total=None)
        result = predict(
            bundle,
            source,
            out,
            engine=common.make_engine(engine, workers, engine_config, engine_set, ship_env),
            top_k=top_k,
            batch_size=batch_size,
            split=split,
            backend=backend,  # type: ignore[arg-type]
            on_progress=lambda num_done: progress.update(task, completed=num_done),
        )
    if json_output:
        common.print_json(config.to_dict(result))
    else:
        _print_result(result)
    if not result.num_predicted:
        raise DataError(f"None of the {result.num_seen} inputs could be recognised; {result.out} says why for each.")


def _print_result(result: PredictResult) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = common.output()
    table = Table(title="Predicted classes", title_justify="left")
    table.add_column("class")
    table.add_column("images", justify="right")
    for class_name, number in list(result.predicted.items())[:_MAX_CLASSES_SHOWN]:
        table.add_row(escape(class_name), f"{number:,}")
    if (num_more := len(result.predicted) - _MAX_CLASSES_SHOWN) > 0:
        table.add_row(f"… {num_more} more", f"{sum(list(result.predicted.values())[_MAX_CLASSES_SHOWN:]):,}")
    console.print(table)
    console.print(
        f"{result.num_seen:,} seen = {result.num_predicted:,} predicted + {result.num_failed:,} failed"
        f"{_listed(result.failed)}; {sum(result.skipped.values()):,} other files passed over{_listed(result.skipped)}.",
        soft_wrap=True,
        markup=False,
    )
    console.print(
        f"{result.seconds:.1f} s, {result.images_per_second:,.0f} images/s. Written: {result.out}",
        soft_wrap=True,
        markup=False,
    )


def _listed(counts: dict[str, int]) -> str:
    return f" ({', '.join(f'{reason}: {number:,}' for reason, number in counts.items())})" if counts else ""
