"""`manyeyes crossval`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from manyeyes.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from manyeyes.evaluation.crossval import CrossvalResult
    from manyeyes.evaluation.paired import Comparison

_SETTINGS = "Settings"


def command(
    dataset: common.DatasetArgument,
    out: Annotated[str, typer.Option("--out", "-o", help="Directory to write.")],
    folds: Annotated[int, typer.Option(help="Parts; each is held out once.")] = 5,
    repeats: Annotated[int, typer.Option(help="Times that all of it is done, each with another division.")] = 1,
    recipe: Annotated[
        str | None,
        typer.Option(help="TOML file of settings, e.g. one of configs/.", rich_help_panel=_SETTINGS),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="As of `train`.", rich_help_panel=_SETTINGS)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="As of `train`.", rich_help_panel=_SETTINGS)] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any setting of `train`; may be repeated.", rich_help_panel=_SETTINGS),
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(
            help="Splits of the dataset that take part, by commas; default: train and val. The test split is left for "
            "the end."
        ),
    ] = None,
    val: Annotated[
        float,
        typer.Option(
            help="Share of what is not held out that chooses the best epoch and is not trained on; 0: the last epoch."
        ),
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of the divisions.")] = 0,
    group_duplicates: Annotated[
        bool,
        typer.Option(
            "--group-duplicates/--no-group-duplicates",
            help="Whether near-duplicates are kept in one fold (see `manyeyes audit`).",
        ),
    ] = True,
    against: Annotated[
        str | None,
        typer.Option(help="Directory of another cross-validation on the same folds, to compare with by paired tests."),
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = 0.95,
    engine: common.EngineName = "local",
    workers: common.NumWorkers = None,
    engine_config: common.EngineConfig = None,
    engine_set: common.EngineSet = None,
    ship_env: common.ShipEnv = False,
    report: common.WithReport = True,
    json_output: common.JsonOutput = False,
) -> None:
    """Train and measure a recipe on each of K folds of a DATASET, each example held out once.

    Folds run side by side, one a worker. What is done is kept: the same command again goes on. Prints each figure with
    its spread and interval, and keeps the predictions for the held-out examples as Parquet.

    Example: `manyeyes crossval digits --recipe configs/cnn.toml --folds 5 --out cv/cnn`

    Two recipes: `manyeyes crossval digits --recipe configs/rnn.toml --out cv/rnn --against cv/cnn`
    """
    from manyeyes.evaluation.crossval import Failure, FoldResult, crossval
    from manyeyes.evaluation.folds import FoldSettings
    from manyeyes.evaluation.paired import compare
    from manyeyes.training.settings import TrainSettings

    options = {"model.name": model, "train.epochs": epochs}
    chosen = [f"{key}={value}" for key, value in options.items() if value is not None] + (assignments or [])
    named = () if splits is None else tuple(name.strip() for name in splits.split(","))
    settings = FoldSettings(folds, repeats, seed, named, group_duplicates, val)
    runner = common.make_engine(engine, workers, engine_config, engine_set, ship_env)
    console = common.console()
    with common.progress_bar("folds", hidden=json_output) as progress:
        bar = progress.add_task("Cross-validating", total=None)

        def on_fold(num_done: int, num_folds: int, last: FoldResult | Failure | None) -> None:
            progress.update(bar, completed=num_done, total=num_folds)
            if isinstance(last, FoldResult):
                text = f"repeat {last.repeat}, fold {last.fold}: accuracy {last.figures['accuracy']:.2%}"
            elif last is not None:
                text = f"repeat {last.repeat}, fold {last.fold} failed: {last.why}"
            else:
                return
            (progress.console if console.is_terminal else console).print(text, markup=False, soft_wrap=True)

        result = crossval(
            dataset,
            out,
            TrainSettings.load(recipe, chosen),
            settings,
            engine=runner,
            confidence=confidence,
            against=against,
            on_fold=on_fold,
        )
    comparison = compare(out, against, confidence) if against is not None else None
    if json_output:
        from manyeyes import config

        common.print_json(result.to_dict() | ({"comparison": config.to_dict(comparison)} if comparison else {}))
        if report:
            common.write_report(result.out)
        return
    printer = common.output()
    printer.print(_table(result))
    printer.print(
        f"Interval: corrected resampled t over {len(result.folds)} folds, whose training sets overlap. Held-out "
        f"predictions of the first repeat, pooled: accuracy {result.pooled.accuracy:.2%} "
        f"({result.pooled.accuracy_interval.low:.2%} to {result.pooled.accuracy_interval.high:.2%}, Wilson).",
        soft_wrap=True,
        markup=False,
    )
    if comparison is not None:
        printer.print(_comparison_table(comparison, out, str(against)))
    printer.print(f"Written: {result.out}", soft_wrap=True, markup=False)
    if report:
        common.write_report(result.out)


def _table(result: CrossvalResult) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("figure")
    for name in ("mean", "std over folds", f"{100 * result.confidence:g}% interval"):
        table.add_column(name, justify="right")
    for name, found in result.figures.items():
        form = ".4f" if name == "log_loss" else ".2%"
        interval = (
            "none: no spread"
            if found.low is None or found.high is None
            else f"{found.low:{form}} to {found.high:{form}}"
        )
        table.add_row(name.replace("_", " "), f"{found.mean:{form}}", f"{found.std:{form}}", interval)
    return table


def _comparison_table(comparison: Comparison, first: str, second: str) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{escape(first)} less {escape(second)}, same folds")
    table.add_column("figure")
    for name in ("difference", "interval", "p"):
        table.add_column(name, justify="right")
    for name, found in comparison.figures.items():
        form = "+.4f" if name == "log_loss" else "+.2%"
        low, high = found.difference.low, found.difference.high
        interval = "" if low is None or high is None else f"{low:{form}} to {high:{form}}"
        table.add_row(
            name.replace("_", " "),
            f"{found.difference.mean:{form}}",
            interval,
            "" if found.p_value is None else f"{found.p_value:.3g}",
        )
    counts = comparison.mcnemar
    table.add_row(
        "only one is right", f"{counts.only_first} : {counts.only_second}", "McNemar", f"{counts.p_value:.3g}"
    )
    return table
