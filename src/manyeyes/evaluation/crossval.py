"""`crossval`: how well a recipe does on examples that it was not trained on, measured on every example once a repeat.

OUT/
  plan.json                        what is measured; the same command goes on with what is left
  folds/repeat-0-fold-0/
    dataset/                       a view of the dataset: train, val, and the held-out fold as test
    run/, evaluation/              as of any training and evaluation
    fold.json                      written last
  predictions/repeat-0/            what the models said of the examples that they were not trained on
  crossval.json                    written when all folds are there
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import manyeyes
from manyeyes import config, storage
from manyeyes.data.dataset import Dataset
from manyeyes.engines.base import Engine
from manyeyes.engines.registry import create_engine
from manyeyes.errors import EngineError, ManyeyesError, TaskError, UsageError
from manyeyes.evaluation import predictions
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.folds import HELD_OUT, Folds, FoldSettings, divide
from manyeyes.evaluation.metrics import ClassificationSums, Summary, summarize
from manyeyes.evaluation.resampling import Resampled, resampled
from manyeyes.training.kept_plan import keep_plan
from manyeyes.training.run import CONFIG_NAME
from manyeyes.training.settings import TrainSettings
from manyeyes.training.trainer import train

FORMAT = "manyeyes.crossval"
FORMAT_VERSION = 1
RESULT = "crossval.json"
FOLD = "fold.json"
# So that rows of all files can be numbered.
_MAX_ROWS_OF_FILE = 1 << 32
# Of a fold's evaluation: what mean, spread and interval are made of.
FIGURES = ("accuracy", "balanced_accuracy", "macro_f1", "log_loss")
BOUNDS = dict.fromkeys(FIGURES, (0.0, 1.0)) | {"log_loss": (0.0, math.inf)}


@dataclass(frozen=True)
class FoldResult:
    """One fold.

    Attributes:
        num_train, num_val, num_held_out: examples.
        figures: by name, on the held-out examples (see FIGURES).
        epochs, best_epoch: of the training.
        seconds: that the fold took, in the session that finished it.
    """

    repeat: int
    fold: int
    num_train: int
    num_val: int
    num_held_out: int
    figures: dict[str, float]
    epochs: int
    best_epoch: int | None
    seconds: float


@dataclass(frozen=True)
class Failure:
    """A fold that could not be measured, and why."""

    repeat: int
    fold: int
    why: str


@dataclass(frozen=True)
class CrossvalResult:
    """What a cross-validation found; crossval.json holds it.

    Attributes:
        dataset, dataset_fingerprint: what was divided.
        test_share: size of a fold divided by the size of what was trained on for it, on average.
        folds_fingerprint: of the division: figures with the same one may be paired.
        settings, recipe: of the division, and of the trainings.
        folds: by repeat, then fold.
        figures: by name: mean, spread and interval over the folds (corrected resampled t).
        pooled: all metrics over the held-out predictions of the first repeat, each example once.
        confidence: of all intervals.
    """

    dataset: str
    dataset_fingerprint: str
    folds_fingerprint: str
    test_share: float
    settings: FoldSettings
    recipe: dict[str, Any]
    class_names: tuple[str, ...]
    folds: tuple[FoldResult, ...]
    figures: dict[str, Resampled]
    pooled: Summary
    confidence: float
    manyeyes_version: str = manyeyes.__version__
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    out: str = field(default="")

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return config.to_dict(self)


def crossval(
    dataset: str,
    out: str,
    recipe: TrainSettings | None = None,
    settings: FoldSettings | None = None,
    *,
    engine: Engine | None = None,
    confidence: float = 0.95,
    against: str | None = None,
    on_fold: Callable[[int, int, FoldResult | Failure | None], None] | None = None,
) -> CrossvalResult:
    """Train and measure a recipe on each fold of a dataset.

    A second call with the same arguments goes on with the folds that are left, each from its last checkpoint.

    Args:
        dataset: URI of the dataset directory.
        out: URI of the directory to write.
        recipe: of the trainings; default: the defaults.
        settings: of the division.
        engine: that runs folds side by side, one a task; default: processes of this machine.
        confidence: of the intervals.
        against: directory of a finished cross-validation that this one will be compared with: refused before anything
            is trained, if it has other folds.
        on_fold: called with the number of folds that are done, of all, and what has become of the last one (None at
            the start).

    Raises:
        UsageError: settings that don't fit the dataset, or `out` holds something else.
        DatasetError: the dataset is missing or damaged.
        EngineError: folds failed; the others are kept, and the call can be repeated.
    """
    if not 0 < confidence < 1:
        raise UsageError(f"confidence={confidence} is not between 0 and 1. Give e.g. 0.95.")
    settings, recipe = settings or FoldSettings(), recipe or TrainSettings()
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, train_split="train", val_split="val"))
    dataset, out = storage.absolute(dataset), storage.absolute(out)
    data = Dataset(dataset)
    engine = engine or create_engine("local")
    folds = divide(data, settings, engine)
    settings = folds.settings
    if against is not None:
        require_same_folds(data.manifest.fingerprint, folds.fingerprint, against)
    plan: dict[str, Any] = {
        "dataset": dataset,
        "dataset_fingerprint": data.manifest.fingerprint,
        "folds_fingerprint": folds.fingerprint,
        "settings": config.to_dict(settings),
        "recipe": config.to_dict(recipe),
    }
    plan = keep_plan(out, plan, "cross-validation")
    done, failed = _run_folds(engine, data, folds, out, recipe, confidence, on_fold)
    if failed:
        first = failed[0]
        others = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
        raise EngineError(
            f"{len(failed)} of {len(failed) + len(done)} folds failed: repeat {first.repeat}, fold {first.fold}"
            f"{others} ({first.why}). The others are kept in {out}; the same command again goes on with what is left."
        )
    test_share = sum(each.num_held_out / each.num_train for each in done) / len(done)
    result = CrossvalResult(
        dataset=dataset,
        dataset_fingerprint=data.manifest.fingerprint,
        folds_fingerprint=folds.fingerprint,
        test_share=test_share,
        settings=settings,
        recipe=plan["recipe"],
        class_names=data.class_names,
        folds=tuple(done),
        figures={
            name: resampled([each.figures[name] for each in done], test_share, confidence, BOUNDS[name])
            for name in FIGURES
        },
        pooled=_pool(engine, out, data, len(folds.labels), confidence),
        confidence=confidence,
        out=out,
    )
    storage.write_json(storage.join(out, RESULT), result.to_dict())
    return result


def load_crossval(out: str) -> CrossvalResult:
    """Read what `crossval` wrote.

    Raises:
        UsageError: there is no finished cross-validation.
    """
    uri = storage.join(out, RESULT)
    try:
        return config.from_dict(CrossvalResult, storage.read_json(uri))
    except FileNotFoundError:
        raise UsageError(f"{out} holds no finished cross-validation ({RESULT}). Run manyeyes crossval first.") from None


def require_same_folds(dataset_fingerprint: str, folds_fingerprint: str, against: str) -> None:
    """Refuse to pair what is not measured on the same folds.

    Args:
        against: directory of a cross-validation.

    Raises:
        UsageError: it is not finished, or has other folds.
    """
    other = load_crossval(against)
    if other.dataset_fingerprint != dataset_fingerprint:
        raise UsageError(
            f"{against} can't be compared with: it was measured on the dataset {other.dataset} with fingerprint "
            f"{other.dataset_fingerprint}, not {dataset_fingerprint}."
        )
    if other.folds_fingerprint != folds_fingerprint:
        how = other.settings
        raise UsageError(
            f"{against} can't be compared with: it has other folds. Use what it was made with: --folds {how.folds} "
            f"--repeats {how.repeats} --seed {how.seed} --splits {','.join(how.splits)} "
            f"--{'' if how.group_duplicates else 'no-'}group-duplicates, and the same Manyeyes "
            f"({other.manyeyes_version})."
        )


def held_out_predictions(out: str, repeat: int = 0) -> str:
    """The directory with the predictions of a repeat, for evaluation.predictions.read_predictions."""
    return storage.join(out, predictions.DIRECTORY_NAME, f"repeat-{repeat}")


@dataclass(frozen=True)
class _Task:
    """One fold, as a task gets it; its view is there."""

    out: str
    recipe: TrainSettings
    confidence: float
    repeat: int
    fold: int

    @property
    def uri(self) -> str:
        return storage.join(self.out, "folds", f"repeat-{self.repeat}-fold-{self.fold}")


def _run_folds(
    engine: Engine,
    data: Dataset,
    folds: Folds,
    out: str,
    recipe: TrainSettings,
    confidence: float,
    on_fold: Callable[[int, int, FoldResult | Failure | None], None] | None,
) -> tuple[list[FoldResult], list[Failure]]:
    """Run what is left, and all that was done before: in order, those that are done and those that failed."""
    settings = folds.settings
    tasks = [
        _Task(out, recipe, confidence, repeat, fold)
        for repeat in range(settings.repeats)
        for fold in range(settings.folds)
    ]
    results: dict[str, FoldResult | Failure] = {}

    def note(task: _Task, result: FoldResult | Failure) -> None:
        results[task.uri] = result
        if on_fold is not None:
            on_fold(len(results), len(tasks), result)

    if on_fold is not None:
        on_fold(0, len(tasks), None)
    for task in tasks:
        if (before := _read_fold(task)) is not None:
            note(task, before)
    while left := [task for task in tasks if task.uri not in results]:
        for task in left:
            folds.write_view(data, storage.join(task.uri, "dataset"), task.repeat, task.fold)
        try:
            engine.map(
                _run_fold,
                left,
                on_result=lambda index, result, left=left: note(left[index], result),  # type: ignore[misc]
            )
        except TaskError as error:
            # Its process ended on every attempt, as one does that takes all memory. The others are worth going on for.
            if error.index is None or left[error.index].uri in results:
                raise
            task = left[error.index]
            note(task, Failure(task.repeat, task.fold, error.message))
    found = [results[task.uri] for task in tasks]
    return [each for each in found if isinstance(each, FoldResult)], [
        each for each in found if isinstance(each, Failure)
    ]


def _read_fold(task: _Task) -> FoldResult | None:
    try:
        return config.from_dict(FoldResult, storage.read_json(storage.join(task.uri, FOLD)))
    except FileNotFoundError:
        return None


def _run_fold(task: _Task) -> FoldResult | Failure:
    """Train and measure one fold; idempotent."""
    before = _read_fold(task)
    if before is not None:
        return before
    started = time.perf_counter()
    view, run, evaluation = (storage.join(task.uri, name) for name in ("dataset", "run", "evaluation"))
    try:
        inline = create_engine("inline")
        is_begun = storage.exists(storage.join(run, CONFIG_NAME))
        trained = train(view, run, task.recipe, resume=is_begun, engine=inline, num_workers=1)
        if trained.interrupted_by is not None:
            return Failure(task.repeat, task.fold, f"interrupted after epoch {trained.epochs}")
        measured = evaluate(
            run,
            view,
            split=HELD_OUT,
            engine=inline,
            out=evaluation,
            predictions=True,
            confidence=task.confidence,
        )
    except ManyeyesError as error:
        return Failure(task.repeat, task.fold, str(error))
    _move_predictions(task, storage.join(evaluation, predictions.DIRECTORY_NAME))
    written = Dataset(view).manifest.counts.written
    metrics = measured.metrics
    result = FoldResult(
        repeat=task.repeat,
        fold=task.fold,
        num_train=sum(written["train"]),
        num_val=sum(written.get("val", ())),
        num_held_out=metrics.num_examples,
        figures={
            "accuracy": metrics.accuracy,
            "balanced_accuracy": metrics.balanced_accuracy,
            "macro_f1": metrics.macro.f1,
            "log_loss": metrics.log_loss,
        },
        epochs=trained.epochs,
        best_epoch=trained.best_epoch,
        seconds=time.perf_counter() - started,
    )
    storage.write_json(storage.join(task.uri, FOLD), config.to_dict(result))
    return result


def _move_predictions(task: _Task, directory: str) -> None:
    """To where those of all folds of the repeat are."""
    target = held_out_predictions(task.out, task.repeat)
    storage.make_directory(target)
    for name in storage.list_files(directory, ".parquet"):
        storage.rename(storage.join(directory, name), storage.join(target, f"fold-{task.fold:03d}-{name}"))


def _pool(engine: Engine, out: str, data: Dataset, num_examples: int, confidence: float) -> Summary:
    directory = held_out_predictions(out)
    names = sorted(storage.list_files(directory, ".parquet"))
    files = list(enumerate(storage.join(directory, name) for name in names))
    add = functools.partial(_sums_of, len(data.class_names))
    sums = engine.map_reduce(add, ClassificationSums.__add__, files)
    if sums is None or sums.num_examples != num_examples:
        raise EngineError(
            f"{0 if sums is None else sums.num_examples} of {num_examples} examples have a prediction in {directory}. "
            f"Was it changed? Delete {out} and start again."
        )
    return summarize(sums, data.class_names, confidence)


def _sums_of(num_classes: int, file: tuple[int, str]) -> ClassificationSums:
    number, uri = file
    sums = ClassificationSums.zero(num_classes)
    first = number * _MAX_ROWS_OF_FILE
    for found in predictions.read_file(uri):
        indices = np.arange(first, first + len(found))
        sums += ClassificationSums.from_logits(found.logits, found.labels, example_indices=indices)
        first += len(found)
    return sums


def right_by_path(out: str, repeat: int = 0) -> Iterator[tuple[str, bool]]:
    """Yield (path, whether it was recognised) of the held-out examples of a repeat."""
    for found in predictions.read_predictions(held_out_predictions(out, repeat)):
        yield from zip(found.paths, (found.predicted == found.labels).tolist(), strict=True)
