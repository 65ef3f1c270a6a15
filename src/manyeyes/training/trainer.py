"""`train`: a dataset and settings in, a run directory out."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from manyeyes import config, storage
from manyeyes.data.dataset import Dataset
from manyeyes.engines.base import Engine, GangContext
from manyeyes.engines.registry import create_engine
from manyeyes.errors import CheckpointError, DatasetError, UsageError
from manyeyes.training import backend, checkpoint, session
from manyeyes.training.events import Notice, OnEvent, ignore
from manyeyes.training.gang import run_gang
from manyeyes.training.interrupts import stop_on_signals
from manyeyes.training.run import CONFIG_NAME, Run, describe_run
from manyeyes.training.session import Job, Outcome
from manyeyes.training.settings import KEEPING, TrainSettings, differing_keys


@dataclass(frozen=True)
class TrainResult:
    """What a training came to.

    Attributes:
        run: URI of the run directory.
        epochs, global_step: that are done, over all sessions of the run.
        loss, accuracy: of the last epoch, under augmentation, mix and dropout; None if no epoch ended in this session.
        val_loss: of the last epoch; None as above or where there is no val split.
        val_accuracy, best_epoch: the best so far, and its epoch (from 1); None where there is no val split.
        num_parameters: values in the model's weights.
        precision: in which it was computed.
        seconds, images_per_second: of this session, with validation and checkpoints in the seconds only.
        input_wait_share: share of the steps' time that was spent waiting for input.
        stopped_early: whether it ended because val accuracy no longer rose.
        interrupted_by: number of the signal that ended it, or None.
    """

    run: str
    epochs: int
    global_step: int
    loss: float | None
    accuracy: float | None
    val_loss: float | None
    val_accuracy: float | None
    best_epoch: int | None
    num_parameters: int
    precision: str
    seconds: float
    images_per_second: float
    input_wait_share: float
    stopped_early: bool
    interrupted_by: int | None


def train(
    dataset: str,
    out: str,
    settings: TrainSettings | None = None,
    *,
    resume: bool = False,
    engine: Engine | None = None,
    num_workers: int | None = None,
    on_event: OnEvent | None = None,
    command: Sequence[str] = (),
) -> TrainResult:
    """Train a model on the train split of a dataset and measure it on the val split after every epoch.

    Args:
        dataset: URI of the dataset directory.
        out: URI of the run directory; must hold no run unless `resume`.
        settings: None: the defaults or, with `resume`, those of the run.
        resume: go on from the newest checkpoint, on this or another number of workers or engine. On the same number,
            and with virtual workers on any, the weights become those of an uninterrupted run, bit for bit.
        engine: that runs the workers; None: processes of this machine.
        num_workers: that train together; None: one, or one for each GPU of this machine.
        on_event: called with what happens (see training.events).
        command: to be kept in config.json.

    Returns:
        What the training came to; `interrupted_by` says whether it has ended.

    Raises:
        UsageError: settings that don't fit the dataset, the model or the engine, or `out` holds another run.
        DatasetError: the dataset is missing or damaged.
        NonFiniteLossError: the loss became NaN or infinite.
        CheckpointError: with `resume`: no whole checkpoint fits.
        TrainingError: workers died too often.
    """
    notify: OnEvent = on_event or ignore
    before = _run_before(out, resume)
    if settings is None:
        settings = TrainSettings.load(base=before.settings) if before else TrainSettings()
    data = Dataset(dataset, verify="auto")
    engine = engine or create_engine("local", num_workers)
    world_size = num_workers or (max(1, backend.num_gpus()) if engine.name == "local" else 1)
    settings = settings.for_workers(world_size, before.settings if before else None)
    strategy = settings.strategy
    settings = settings.for_split(data.split(settings.data.train_split).num_examples, strategy.num_parts(world_size))
    if settings.train.xla and strategy.name == "allreduce" and strategy.syncs_norms(world_size):
        raise UsageError(
            "train.xla=true can't compile exchanges between workers. Leave it out, or set strategy.sync_norms=false."
        )
    if before:
        _require_same_settings(before, settings)
    _require_classes(data, settings.data.train_split, notify)
    run = describe_run(data, out, settings, command)
    if before:
        _require_same_dataset(before, run)
        run = dataclasses.replace(before, uri=run.uri)
    if settings.data.val_split not in data.split_names:
        notify(
            Notice(
                f"The dataset has no split {settings.data.val_split!r}: nothing is measured during training, the last "
                "checkpoint counts as the best. Ingest with a share for val to have it measured."
            )
        )
    # Refuses what can't be shared out, before the run is there.
    num_sharers = strategy.num_sharers(world_size)
    session.pipelines(data, run, settings, num_parts=strategy.num_parts(world_size), world_size=num_sharers)
    newest = _newest_checkpoint(run, notify) if before else None
    job = Job(dataclasses.replace(run, uri=storage.absolute(out)), settings, storage.absolute(dataset), newest)
    with stop_on_signals() as wish:
        if settings.strategy.name == "diloco":
            from manyeyes.training.diloco import run_rounds

            outcome = run_rounds(engine, job, notify, wish)
        elif world_size == 1 and engine.name in ("local", "inline"):
            outcome = session.run_session(job, GangContext(0, 1, ()), notify, wish)
        else:
            outcome = run_gang(engine, job, world_size, notify, wish)
    return _result(out, run, settings, outcome)


def _result(out: str, run: Run, settings: TrainSettings, outcome: Outcome) -> TrainResult:
    state = outcome.state
    return TrainResult(
        run=out,
        epochs=state.epoch,
        global_step=state.global_step,
        loss=outcome.loss,
        accuracy=outcome.accuracy,
        val_loss=outcome.val_loss,
        val_accuracy=state.best_val_accuracy,
        best_epoch=None if state.best_epoch is None else state.best_epoch + 1,
        num_parameters=outcome.num_parameters,
        precision=run.precision,
        seconds=outcome.seconds,
        images_per_second=outcome.images_per_second,
        input_wait_share=outcome.input_wait_share,
        stopped_early=state.finished and state.epoch < settings.train.epochs,
        interrupted_by=outcome.interrupted_by,
    )


def resume_command(dataset: str, out: str) -> str:
    """The command that goes on with an interrupted run."""
    return f"manyeyes train {shlex.quote(dataset)} --out {shlex.quote(out)} --resume"


def _run_before(out: str, resume: bool) -> Run | None:
    if resume:
        return Run.open(out)
    if storage.exists(storage.join(out, CONFIG_NAME)):
        raise UsageError(f"{out} already holds a run. Go on with it by --resume, or give another --out.")
    return None


def _require_same_settings(before: Run, settings: TrainSettings) -> None:
    # A setting that is newer than the run has its default in it.
    of_run = config.to_dict(TrainSettings.load(base=before.settings))
    differing = [key for key in differing_keys(of_run, config.to_dict(settings)) if key not in KEEPING]
    if differing:
        raise UsageError(
            f"{before.uri} was started with other settings: {', '.join(differing)} differ. "
            "Resume with the settings of the run (leave the options out), or give another --out."
        )


def _require_same_dataset(before: Run, run: Run) -> None:
    if run.dataset_fingerprint != before.dataset_fingerprint:
        raise UsageError(
            f"{run.dataset} has fingerprint {run.dataset_fingerprint}, but {before.uri} was trained on "
            f"{before.dataset_fingerprint} ({before.dataset}). Give that dataset, or another --out."
        )


def _require_classes(data: Dataset, split: str, notify: OnEvent) -> None:
    counts = data.manifest.counts.written.get(split)
    if counts is None:
        return
    absent = [name for name, count in zip(data.class_names, counts, strict=False) if not count]
    if len(data.class_names) - len(absent) == 1:
        raise DatasetError(
            f"{data.uri} has examples of one class only in its split {split!r}, none of {', '.join(absent[:5])}. A "
            "classifier needs two or more: ingest more images, and see its quarantine."
        )
    if absent:
        notify(Notice(f"The split {split!r} has no example of: {', '.join(absent[:5])}{' …' if absent[5:] else ''}."))


def _newest_checkpoint(run: Run, notify: OnEvent) -> str | None:
    directory = run.checkpoints_uri
    found = checkpoint.newest_whole(directory, on_damaged=lambda text: notify(Notice(text)))
    names = checkpoint.names(directory)
    # As a writer leaves it that died while it published its first one on S3: only the steps until then are lost.
    is_begun = len(names) == 1 and not storage.exists(storage.join(directory, names[0], checkpoint.STATE_NAME))
    if found is None and names and not is_begun:
        raise CheckpointError(f"All checkpoints of {run.uri} are damaged. Delete it and train again, without --resume.")
    if found is not None and found.settings_fingerprint != run.settings_fingerprint:
        raise CheckpointError(f"The checkpoints of {run.uri} are of other settings than its {CONFIG_NAME}.")
    return None if found is None else found.name
