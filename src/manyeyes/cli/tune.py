"""`manyeyes tune`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from manyeyes.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from manyeyes.training.search import Trial
    from manyeyes.training.tune import TuneResult

_NUM_SHOWN = 10


def command(
    dataset: common.DatasetArgument,
    recipe: Annotated[str, typer.Option(help="Recipe (TOML) whose [search] section declares ranges.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Directory to write.")],
    trials: Annotated[int, typer.Option(help="Trainings in all, with those of earlier calls.")] = 20,
    metric: Annotated[str, typer.Option(help="What counts: val_accuracy or val_loss.")] = "val_accuracy",
    prune: Annotated[
        bool, typer.Option("--prune/--no-prune", help="Whether a trial that is worse than most is given up early.")
    ] = True,
    seed: Annotated[int, typer.Option(help="Of the choices.")] = 0,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any setting of `train`, for all trials; may be repeated.")
    ] = None,
    engine: common.EngineName = "local",
    workers: common.NumWorkers = None,
    engine_config: common.EngineConfig = None,
    engine_set: common.EngineSet = None,
    ship_env: common.ShipEnv = False,
    json_output: common.JsonOutput = False,
) -> None:
    """Search the settings with which a recipe does best on the val split of a DATASET.

    The recipe's [search] section declares ranges:

        "optimizer.learning_rate" = {low = 1e-4, high = 1e-1, log = true}

        "model.dropout" = {low = 0.0, high = 0.5}

        "optimizer.name" = ["sgd", "adamw"]

    Trials run side by side, one a worker. What is done is kept: the same command again goes on, also with more trials.
    The result is a recipe.

    Example: `manyeyes tune digits --recipe search.toml --trials 30 --out tuned`
    """
    import shlex
    from typing import cast

    from manyeyes.errors import UsageError
    from manyeyes.training.search import Metric, Search
    from manyeyes.training.tune import tune

    if metric not in ("val_accuracy", "val_loss"):
        raise UsageError(f"--metric {metric} is not known. Use val_accuracy or val_loss.")
    console = common.console()
    with common.progress_bar("trials", hidden=json_output) as progress:
        bar = progress.add_task("Tuning", total=None)

        def on_trial(num_done: int, num_trials: int, last: Trial | None) -> None:
            progress.update(bar, completed=num_done, total=num_trials)
            if last is not None:
                (progress.console if console.is_terminal else console).print(_line(last), markup=False, soft_wrap=True)

        result = tune(
            dataset,
            out,
            Search.load(recipe, assignments or ()),
            num_trials=trials,
            metric=cast(Metric, metric),
            prune=prune,
            seed=seed,
            engine=common.make_engine(engine, workers, engine_config, engine_set, ship_env),
            on_trial=on_trial,
        )
    if json_output:
        common.print_json(result.to_dict())
        return
    printer = common.output()
    printer.print(_table(result))
    printer.print(
        f"Chosen by its {metric.replace('_', ' ')}, which flatters it: measure it on other examples.\n"
        f"Written: {result.recipe}\n"
        f"Next: manyeyes crossval {shlex.quote(dataset)} --recipe {shlex.quote(result.recipe)} --out CV",
        soft_wrap=True,
        markup=False,
    )


def _line(trial: Trial) -> str:
    values = ", ".join(f"{key}={_short(value)}" for key, value in trial.values.items())
    reached = "" if trial.best is None else f" {trial.best:.4f} after {len(trial.by_epoch)} epochs"
    return f"trial {trial.number}: {trial.state}{reached} ({values}){': ' + trial.why if trial.why else ''}"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(result: TuneResult) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from manyeyes.training.tune import ranked

    keys = list(result.best.values)
    table = Table()
    table.add_column("trial", justify="right")
    table.add_column(result.metric.replace("_", " "), justify="right")
    table.add_column("state")
    for key in keys:
        table.add_column(escape(key), justify="right")
    for trial in ranked(result.trials, result.metric)[:_NUM_SHOWN]:
        style = "bold" if trial.number == result.best.number else ""
        shown = [escape(_short(trial.values[key])) for key in keys]
        table.add_row(str(trial.number), f"{trial.best:.4f}", str(trial.state), *shown, style=style)
    return table
