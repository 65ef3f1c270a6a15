"""`manyeyes ingest`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from manyeyes.cli.common import (
    EngineConfig,
    EngineName,
    EngineSet,
    JsonOutput,
    NumWorkers,
    ShipEnv,
    console,
    make_engine,
    print_json,
    progress_bar,
)

if TYPE_CHECKING:
    from manyeyes.data.ingest import IngestResult


def command(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder with one folder per class, .csv/.tsv/.jsonl table (path, label, optional group and split), "
            "folder of IDX files, .tar files of WebDataset (folder or pattern), or Parquet (file or folder).",
        ),
    ],
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Directory (or URI) of the dataset to make.")],
    size: Annotated[
        str | None,
        typer.Option(help="Pixels of stored images, N or HEIGHTxWIDTH. Default: keep each image's own size."),
    ] = None,
    fit: Annotated[
        str, typer.Option(help="How an image comes to --size: crop (fill and cut), pad (show all), stretch.")
    ] = "crop",
    resize_short: Annotated[
        int | None, typer.Option(help="With --fit crop: the shorter side before the cut, e.g. 256 for --size 224.")
    ] = None,
    channels: Annotated[
        str, typer.Option(help="3 (colour), 1 (grey) or auto (1 for grey IDX files, else 3).")
    ] = "auto",
    encoding: Annotated[
        str,
        typer.Option(
            help="raw (decoded pixels, fastest to train on), jpeg (original bytes, or JPEG of quality 92 with --size), "
            "or auto: raw if the size is fixed and an image has at most 128 KiB (208x208 in colour), else jpeg."
        ),
    ] = "auto",
    val: Annotated[float, typer.Option(help="Share of the validation split, where the source has none.")] = 0.1,
    test: Annotated[float, typer.Option(help="Share of the test split, where the source has no splits.")] = 0.1,
    group_duplicates: Annotated[
        bool,
        typer.Option(
            "--group-duplicates/--no-group-duplicates", help="Whether near-duplicates stay in one split, as groups do."
        ),
    ] = True,
    seed: Annotated[int, typer.Option(help="Of splits and order.")] = 0,
    shuffle: Annotated[bool, typer.Option(help="Store examples in a shuffled order, or in that of the source.")] = True,
    source_kind: Annotated[
        str, typer.Option(help="auto, folder, table, idx, webdataset or parquet.", rich_help_panel="Source")
    ] = "auto",
    class_names: Annotated[
        str | None,
        typer.Option(
            help="File with one class name a line, in the order of labels; names integer labels, and any other label "
            "goes to quarantine.",
            rich_help_panel="Source",
        ),
    ] = None,
    image_column: Annotated[str, typer.Option(help="Of a Parquet source.", rich_help_panel="Source")] = "image",
    label_column: Annotated[str, typer.Option(help="Of a Parquet source.", rich_help_panel="Source")] = "label",
    max_pixels: Annotated[
        int, typer.Option(help="Larger images go to quarantine before they are decoded.", rich_help_panel="Source")
    ] = 100_000_000,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset made with other arguments.")
    ] = False,
    engine: EngineName = "local",
    workers: NumWorkers = None,
    engine_config: EngineConfig = None,
    engine_set: EngineSet = None,
    ship_env: ShipEnv = False,
    json_output: JsonOutput = False,
) -> None:
    """Turn labelled images into a dataset: checked, split, shuffled, in Parquet shards.

    Every input is counted: seen = written + quarantined + skipped. If it is interrupted, the same command goes on where
    it stopped.

    Example: `manyeyes ingest photos/ photos.ds --size 160`
    """
    from manyeyes.config import from_dict, to_dict
    from manyeyes.data.ingest import IngestSettings, ingest, parse_size, read_class_names
    from manyeyes.errors import SourceError, UsageError

    if channels not in ("auto", "1", "3"):
        raise UsageError(f"--channels {channels!r} is not possible. Use 3 (RGB), 1 (grey) or auto.")
    settings = from_dict(
        IngestSettings,
        {
            "fit": fit,
            "resize_short": resize_short,
            "channels": None if channels == "auto" else int(channels),
            "encoding": encoding,
            "val": val,
            "test": test,
            "group_duplicates": group_duplicates,
            "seed": seed,
            "shuffle": shuffle,
            "source_kind": source_kind,
            "image_column": image_column,
            "label_column": label_column,
            "class_names": None if class_names is None else read_class_names(class_names),
            "max_pixels": max_pixels,
            "overwrite": overwrite,
            "size": None if size is None else parse_size(size),
        },
    )
    with progress_bar("images", hidden=json_output) as progress:
        bar = progress.add_task("Listing", total=None)

        def on_progress(phase: str, done: int, total: int | None) -> None:
            if phase == "write" and done == 0:
                progress.reset(bar, description="Writing", total=total)
            if phase == "compare":
                progress.reset(bar, description="Looking for near-duplicates", total=None)
            progress.update(bar, completed=done)

        try:
            result = ingest(
                source,
                dataset,
                settings=settings,
                engine=make_engine(engine, workers, engine_config, engine_set, ship_env),
                on_progress=on_progress,
            )
        except KeyboardInterrupt:
            console().print("Interrupted. The same command goes on where it stopped.")
            raise
    if json_output:
        print_json(to_dict(result))
    else:
        _print_result(result, dataset)
    if not result.num_written:
        raise SourceError(
            f"None of the {result.num_seen} inputs could be written; {dataset}/quarantine says why for each."
        )


def _print_result(result: IngestResult, dataset: str) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(highlight=False)
    if result.was_complete:
        text = f"{dataset} is complete already: nothing was done. Add --overwrite if the source has changed."
        out.print(text, markup=False, soft_wrap=True)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("seen", f"{result.num_seen:,}")
    table.add_row("= written", f"{result.num_written:,}")
    for split, count in result.written.items():
        table.add_row(f"    {split}", f"{count:,}")
    table.add_row("+ quarantined", f"{sum(result.quarantined.values()):,}")
    for reason, count in result.quarantined.items():
        table.add_row(f"    {reason}", f"{count:,}")
    table.add_row("+ skipped", f"{sum(result.skipped.values()):,}")
    for reason, count in result.skipped.items():
        table.add_row(f"    {reason}", f"{count:,}")
    out.print(table)
    shape = "x".join(map(str, result.image_shape)) if result.image_shape else "own sizes"
    shards = "1 shard" if result.num_shards == 1 else f"{result.num_shards} shards"
    facts = f"{result.num_classes} classes, {shards}, {result.size_bytes / 1e6:,.1f} MB, "
    facts += f"{result.encoding} {shape}"
    if not result.was_complete:
        facts += f"; {result.seconds:.1f} s, {result.images_per_second:,.0f} images/s"
    out.print(f"\n{facts}", markup=False, soft_wrap=True)
    if result.num_moved:
        moved = "1 example is" if result.num_moved == 1 else f"{result.num_moved:,} examples are"
        out.print(f"{moved} in another split than was drawn, beside near-duplicates.", markup=False, soft_wrap=True)
    for remark in result.remarks:
        out.print(f"Note: {remark}", markup=False, soft_wrap=True)
    if result.num_written:
        out.print(f"Next: manyeyes train {shlex.quote(dataset)} --out RUN", markup=False, soft_wrap=True)
