"""`evaluate`: a run or a bundle and a split in, metrics out; every example exactly once, over shards by an engine."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import manyeyes
from manyeyes import config, storage
from manyeyes.data.dataset import Dataset
from manyeyes.engines.base import Engine
from manyeyes.engines.registry import create_engine
from manyeyes.errors import DatasetError, EngineError, MissingExtraError, UsageError
from manyeyes.evaluation import plots
from manyeyes.evaluation.costs import read_cost_matrix
from manyeyes.evaluation.metrics import Summary, summarize
from manyeyes.evaluation.notable import NUM_NOTABLE, Notable
from manyeyes.evaluation.predictions import DIRECTORY_NAME
from manyeyes.evaluation.recogniser import Kind, Recogniser
from manyeyes.evaluation.remarks import remarks
from manyeyes.evaluation.tasks import Findings, Job, Part, cut, evaluate_part
from manyeyes.recognition.inputs import remaining_preprocessing
from manyeyes.training.run import METRICS_NAME

FORMAT = "manyeyes.evaluation"
FORMAT_VERSION = 1
RESULT_NAME = "evaluation.json"
CONFUSION_MATRIX_NAME = "confusion_matrix.png"
LEARNING_CURVES_NAME = "learning_curves.png"
# Files of cross-validations and searches, whose directories also have predictions/ and more.
_OF_OTHERS = {"crossval.json": "a cross-validation", "tune.json": "a search", "plan.json": "an unfinished job"}
_PART = re.compile(r"part-\d{5,}\.parquet")


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found; evaluation.json holds all but `files` and `notices`.

    Attributes:
        model, model_kind, model_name, model_fingerprint: what was evaluated; `model` is its URI.
        dataset, dataset_fingerprint, split: on what.
        class_names: label i is class_names[i].
        metrics: all numbers.
        notable: examples that are worth a look.
        remarks: what one should know before one believes the figures, for people.
        files: URIs of what was written.
        notices: what was left out, and why.
    """

    model: str
    model_kind: Kind
    model_name: str
    model_fingerprint: str
    dataset: str
    dataset_fingerprint: str
    split: str
    class_names: tuple[str, ...]
    metrics: Summary
    notable: Notable = field(default_factory=Notable)
    remarks: tuple[str, ...] = ()
    manyeyes_version: str = manyeyes.__version__
    format: str = FORMAT
    format_version: int = FORMAT_VERSION
    files: tuple[str, ...] = field(default=())
    notices: tuple[str, ...] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return config.to_dict(self)


def evaluate(
    model: str,
    dataset: str,
    *,
    split: str = "test",
    engine: Engine | None = None,
    batch_size: int = 64,
    confidence: float = 0.95,
    out: str | None = None,
    predictions: bool = False,
    cost_matrix: str | None = None,
    num_notable: int = NUM_NOTABLE,
    on_progress: Callable[[int, int], None] | None = None,
) -> EvaluationResult:
    """Measure how well a model recognises the examples of a split.

    Args:
        model: URI of a run (its best checkpoint is taken) or of a bundle.
        dataset: URI of the dataset directory.
        split: "train", "val" or "test".
        engine: default: for a run the driver's own process, as TensorFlow uses all cores; for a bundle one local
            worker per core. The metrics are the same for every engine and number of workers.
        batch_size: images that the model takes at once.
        confidence: of the intervals.
        out: directory to write evaluation.json and the pictures to; default: RUN/evaluation/SPLIT/ for a run, nothing
            is written for a bundle. An earlier evaluation there is replaced when the new one is done, with its
            predictions, which would not fit the new numbers; of anything else nothing is touched.
        predictions: also keep what the model says of every example, in `out`/predictions/ (see
            predictions.read_predictions).
        cost_matrix: URI of a CSV file, see costs.read_cost_matrix; the mean cost of an example is then computed too.
        num_notable: how many of the most confident mistakes and of the least certain answers to keep.
        on_progress: called with the number of examples that were handed out so far, and the number of all.

    Returns:
        All metrics, and the URIs of what was written.

    Raises:
        UsageError: there is neither a run nor a bundle, an argument is out of range, or `out` can't be written or
            holds what is no evaluation.
        DatasetError: the dataset is missing or damaged, has no such split, or has other classes or image sizes.
        CheckpointError, BundleError: the model is damaged.
        MissingExtraError: a library that the model needs is not installed.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} is below 1. Give at least 1.")
    if not 0 < confidence < 1:
        raise UsageError(f"confidence={confidence} is not between 0 and 1. Give e.g. 0.95.")
    if num_notable < 0:
        raise UsageError(f"num_notable={num_notable} is below 0. Give 0 or more.")
    # Tasks run in other working directories, on a cluster's nodes.
    recogniser = Recogniser.open(storage.absolute(model))
    data = Dataset(storage.absolute(dataset))
    chosen = data.split(split)
    _require_same_classes(recogniser, data)
    _require_same_shape(recogniser, data)
    costs = read_cost_matrix(cost_matrix, data.class_names) if cost_matrix is not None else None
    if out is None and recogniser.kind == "run":
        out = storage.join(recogniser.uri, "evaluation", split)
    if out is not None:
        out = storage.absolute(out)
        storage.check_writable(out)
        _require_place(out)
    elif predictions:
        raise UsageError("Predictions of a bundle need a directory to be kept in. Give one by --out.")
    left = remaining_preprocessing(recogniser.preprocessing, data.preprocessing)
    if engine is None:
        engine = create_engine("inline" if recogniser.kind == "run" else "local")
    with _aside(out if predictions else None) as kept:
        job = Job(recogniser, data, left, batch_size, num_notable, kept)
        parts = _handed_out(cut(chosen), chosen.num_examples, on_progress)
        found = engine.map_reduce(functools.partial(evaluate_part, job), Findings.__add__, parts)
        num_evaluated = found.sums.num_examples if found else 0
        if found is None or num_evaluated != chosen.num_examples:
            raise EngineError(
                f"{num_evaluated} examples were evaluated, but the split {split!r} has {chosen.num_examples}. "
                f"The engine {engine.name} lost or repeated a task; please report this."
            )
        result = EvaluationResult(
            model=recogniser.uri,
            model_kind=recogniser.kind,
            model_name=recogniser.name,
            model_fingerprint=recogniser.fingerprint,
            dataset=data.uri,
            dataset_fingerprint=data.manifest.fingerprint,
            split=split,
            class_names=data.class_names,
            metrics=summarize(found.sums, data.class_names, confidence, costs),
            notable=found.notable,
            remarks=tuple(remarks(recogniser, data, split, found)),
        )
        return _write(result, out, kept) if out is not None else result


def _handed_out(
    parts: Iterator[Part], num_examples: int, on_progress: Callable[[int, int], None] | None
) -> Iterator[Part]:
    num_done = 0
    for part in parts:
        if on_progress is not None:
            on_progress(num_done, num_examples)
        yield part
        num_done += part.num_examples
    if on_progress is not None:
        on_progress(num_examples, num_examples)


def _require_same_classes(recogniser: Recogniser, data: Dataset) -> None:
    of_model, of_dataset = recogniser.class_names, data.class_names
    if of_model == of_dataset:
        return
    missing = [name for name in of_model if name not in of_dataset]
    extra = [name for name in of_dataset if name not in of_model]
    differences = []
    if missing:
        differences.append(f"only the model knows {_listed(missing)}")
    if extra:
        differences.append(f"only the dataset has {_listed(extra)}")
    if not differences:
        first = next(i for i, (a, b) in enumerate(zip(of_model, of_dataset, strict=False)) if a != b)
        differences.append(
            f"their order differs, first at label {first}: {of_model[first]!r} in the model, "
            f"{of_dataset[first]!r} in the dataset"
        )
    raise DatasetError(
        f"{data.uri} and {recogniser.uri} have other classes: {'; '.join(differences)}. "
        "Ingest the images with the model's classes (--class-names FILE)."
    )


def _require_same_shape(recogniser: Recogniser, data: Dataset) -> None:
    channels = recogniser.input_shape[2]
    if data.manifest.encoding == "raw" and data.image_shape is not None and data.image_shape[2] != channels:
        raise DatasetError(
            f"{data.uri} stores pixels with {data.image_shape[2]} channels, but {recogniser.uri} takes {channels}. "
            f"Ingest with {channels} channels."
        )


def _listed(class_names: list[str], most: int = 5) -> str:
    shown = ", ".join(map(repr, class_names[:most]))
    return shown + (f" and {len(class_names) - most} more" if len(class_names) > most else "")


def _require_place(out: str) -> None:
    """Nothing is overwritten or removed but what an earlier evaluation wrote."""
    try:
        found = {item.name: item.is_directory for item in storage.iterate_directory(out)}
    except FileNotFoundError:
        return
    mend = "Give another --out."
    for name, what in _OF_OTHERS.items():
        if name in found:
            raise UsageError(f"{out} holds {what} ({name}). {mend}")
    kept = storage.join(out, DIRECTORY_NAME)
    if RESULT_NAME in found:
        uri = storage.join(out, RESULT_NAME)
        try:
            values = storage.read_json(uri)
        except ValueError:
            values = None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UsageError(f"{uri} was not written by evaluate. {mend}")
        odd = [name for name in _names_in(kept) if not _PART.fullmatch(name)] if DIRECTORY_NAME in found else []
        if odd:
            raise UsageError(f"{kept} has {odd[0]!r}, which evaluate did not write. {mend}")
        return
    # evaluation.json is written before all others: without it they are of something else.
    for name in (CONFUSION_MATRIX_NAME, LEARNING_CURVES_NAME, DIRECTORY_NAME):
        if name in found and (not found[name] or _names_in(storage.join(out, name))):
            raise UsageError(f"{out} has {name}, but no {RESULT_NAME}: it is of something else. {mend}")


def _names_in(directory: str) -> list[str]:
    return [item.name for item in storage.iterate_directory(directory) if storage.ASIDE_MARK not in item.name]


@contextlib.contextmanager
def _aside(out: str | None) -> Iterator[str | None]:
    """A directory for predictions that are not whole yet; what is left in it goes. None without `out`."""
    if out is None:
        yield None
        return
    uri = storage.join(out, f"{storage.ASIDE_MARK}{DIRECTORY_NAME}")
    # Of an evaluation that was killed.
    storage.remove(uri, recursive=True)
    try:
        yield uri
    finally:
        storage.remove(uri, recursive=True)


def _write(result: EvaluationResult, out: str, predictions: str | None) -> EvaluationResult:
    values = result.to_dict()
    del values["files"], values["notices"]
    files = [storage.join(out, RESULT_NAME)]
    kept = storage.join(out, DIRECTORY_NAME)
    _require_place(out)
    # In this order predictions never lie beside the numbers of another evaluation, nor without any.
    storage.remove(kept, recursive=True)
    storage.write_json(files[0], values)
    if predictions is not None:
        storage.rename(predictions, kept)
        files.append(kept)
    notices = []
    metrics_uri = storage.join(result.model, METRICS_NAME)
    try:
        uri = storage.join(out, CONFUSION_MATRIX_NAME)
        storage.write_bytes(uri, plots.confusion_matrix_png(result.metrics, result.class_names))
        files.append(uri)
        epochs = plots.read_epochs(metrics_uri) if result.model_kind == "run" else []
        if epochs:
            uri = storage.join(out, LEARNING_CURVES_NAME)
            storage.write_bytes(uri, plots.learning_curves_png(epochs))
            files.append(uri)
        elif result.model_kind == "run":
            notices.append(f"No learning curves: {metrics_uri} has no epoch yet.")
    except MissingExtraError as error:
        notices.append(f"No pictures: {error}")
    return dataclasses.replace(result, files=tuple(files), notices=tuple(notices))
