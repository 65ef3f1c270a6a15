"""`manyeyes train`."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from manyeyes.cli.common import (
    DatasetArgument,
    EngineConfig,
    EngineName,
    EngineSet,
    JsonOutput,
    ShipEnv,
    console,
    make_engine,
    print_json,
)

if TYPE_CHECKING:
    from manyeyes.training.trainer import TrainResult


_SETTINGS = "Settings"


def command(
    dataset: DatasetArgument,
    out: Annotated[str, typer.Option("--out", "-o", help="Run directory to write.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="cnn (default), resnet18, resnet34, resnet50, mobilenet_v2, efficientnet_b0, efficientnet_lite0, gru, "
            "lstm, crnn, or any name in keras.applications.",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option("--recipe", help="TOML file of settings, e.g. one of configs/.", rich_help_panel=_SETTINGS),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option("--epochs", help="Passes over the training examples.", rich_help_panel=_SETTINGS)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            help="Examples per step, over all workers; 1 is plain SGD; default: 64, fewer for small datasets.",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak of the schedule.", rich_help_panel=_SETTINGS)
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option("--optimizer", help="sgd, adamw, lamb, lars or muon.", rich_help_panel=_SETTINGS)
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", help="auto, float32, bfloat16 or float16.", rich_help_panel=_SETTINGS),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option("--seed", help="Of initial weights, order, augmentation, dropout.", rich_help_panel=_SETTINGS),
    ] = None,
    assignments: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any setting, e.g. --set schedule.name=one_cycle or --set model.weights=imagenet; may be repeated.",
            rich_help_panel=_SETTINGS,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            help="Workers that train one model together; default: one, or one for each GPU of this machine.",
            rich_help_panel="Execution",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            help="allreduce: workers take every step together (engines local, spark). diloco: they meet once a round "
            "(any engine).",
            rich_help_panel="Execution",
        ),
    ] = None,
    virtual_workers: Annotated[
        int | None,
        typer.Option(
            "--virtual-workers",
            help="Parts of every batch, whoever computes them: bit-identical weights on any number of workers up to "
            "it. With diloco: slices that train side by side; default: as many as workers.",
            rich_help_panel="Execution",
        ),
    ] = None,
    engine: EngineName = "local",
    engine_config: EngineConfig = None,
    engine_set: EngineSet = None,
    ship_env: ShipEnv = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run at --out where it stopped.")] = False,
    as_json: JsonOutput = False,
) -> None:
    """Train a model on a dataset.

    Later settings win: defaults, recipe, options, --set. Ctrl-C saves a checkpoint, from which --resume goes on, also
    with another number of workers or another engine.

    Example: `manyeyes train digits --model cnn --epochs 5 --out runs/digits`

    On two workers: `manyeyes train digits --workers 2 --out runs/two`
    """
    from manyeyes.training import live
    from manyeyes.training.run import Run
    from manyeyes.training.settings import TrainSettings
    from manyeyes.training.trainer import resume_command, train

    options = {
        "model.name": model,
        "train.epochs": epochs,
        "train.global_batch_size": batch_size,
        "optimizer.learning_rate": learning_rate,
        "optimizer.name": optimizer,
        "train.precision": precision,
        "train.seed": seed,
        "strategy.name": strategy,
        "strategy.virtual_workers": virtual_workers,
    }
    chosen = [f"{key}={value}" for key, value in options.items() if value is not None] + (assignments or [])
    base = Run.open(out).settings if resume else None
    settings = TrainSettings.load(recipe, chosen, base)
    out_console = console()
    with live.live_line(out_console) as show:
        result = train(
            dataset,
            out,
            settings,
            resume=resume,
            engine=make_engine(engine, workers, engine_config, engine_set, ship_env),
            num_workers=workers,
            on_event=show,
            command=("manyeyes", *sys.argv[1:]),
        )
    if as_json:
        print_json(dataclasses.asdict(result))
    if result.interrupted_by is not None:
        saved = f"Interrupted after step {result.global_step}; a checkpoint is saved."
        out_console.print(f"{saved} Go on with: {resume_command(dataset, out)}", soft_wrap=True, markup=False)
        raise typer.Exit(128 + result.interrupted_by)
    if not as_json:
        typer.echo(_summary(result, dataset))


def _summary(result: TrainResult, dataset: str) -> str:
    if result.val_accuracy is not None:
        reached = f"val accuracy {result.val_accuracy:.2%} (epoch {result.best_epoch} of {result.epochs})"
    elif result.accuracy is not None:
        reached = f"train accuracy {result.accuracy:.2%}; no val split to measure on"
    else:
        reached = "nothing left to do"
    early = ", stopped early" if result.stopped_early else ""
    return (
        f"{reached}{early}; {result.seconds:.0f} s at {result.images_per_second:,.0f} images/s\n"
        f"Written: {result.run}\n"
        f"Next: manyeyes evaluate {shlex.quote(result.run)} {shlex.quote(dataset)}"
    )
