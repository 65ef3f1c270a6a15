"""`report`: gather all that there is to say of a run, an evaluation or a cross-validation, and write it as one page."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import manyeyes
from manyeyes import config, storage
from manyeyes.errors import DatasetError, UsageError
from manyeyes.evaluation.metrics import Summary
from manyeyes.intervals import wilson_interval
from manyeyes.report import pictures
from manyeyes.report.balance import Balance, read_balance
from manyeyes.report.card import model_card
from manyeyes.report.figures import Figure, figures_of, fold_figures_of
from manyeyes.report.page import render
from manyeyes.report.pictures import SALIENCY_SECONDS, Pictures
from manyeyes.report.provenance import Facts, machine, provenance_of, settings_of
from manyeyes.report.subject import Subject, load_evaluation, open_subject, read_metrics
from manyeyes.training.run import METRICS_NAME

REPORT_NAME = "report.html"
CARD_NAME = "model_card.md"
# Points of a curve over steps: more than a screen has columns for.
_MAX_POINTS = 400


@dataclass(frozen=True)
class Curve:
    """How one training went.

    Attributes:
        name: "" where there is one.
        epochs, steps: lines of metrics.jsonl; of the steps a selection.
    """

    name: str
    epochs: tuple[dict[str, Any], ...]
    steps: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Report:
    """All that a report says.

    Attributes:
        subject: what it is about.
        metrics: of the evaluation; of a cross-validation over the pooled held-out predictions; None without either.
        figures: of `metrics`; fold_figures: means over folds.
        curves: one a training.
        made_at: ISO 8601, UTC.
    """

    subject: Subject
    class_names: tuple[str, ...]
    metrics: Summary | None
    figures: tuple[Figure, ...]
    fold_figures: tuple[Figure, ...]
    curves: tuple[Curve, ...]
    pictures: Pictures
    balance: Balance | None
    provenance: tuple[Facts, ...]
    notices: tuple[str, ...]
    machine: str
    made_at: str

    @property
    def title(self) -> str:
        """For the page and its window."""
        subject = self.subject
        if subject.crossval is not None:
            settings = subject.crossval.settings
            times = f", {settings.repeats} times" if settings.repeats > 1 else ""
            return f"{subject.name}: {settings.folds}-fold cross-validation{times}"
        return f"{subject.name} on {subject.evaluation.split}" if subject.evaluation is not None else subject.name


def write_report(
    uri: str,
    out: str | None = None,
    *,
    split: str | None = None,
    card: bool = False,
    explain_seconds: float = SALIENCY_SECONDS,
    on_progress: Callable[[str], None] | None = None,
) -> tuple[str, ...]:
    """Write a page that shows a run, an evaluation or a cross-validation, and opens without a network.

    Args:
        uri: what `train`, `evaluate` or `crossval` wrote.
        out: the file to write; default: report.html in `uri`.
        split: of a run: which of its evaluations; default: test, else val, else train.
        card: also write model_card.md beside it; for runs and evaluations.
        explain_seconds: about how long it may take to find the pixels that decided; 0: they are not shown.
        on_progress: called with what is done next.

    Returns:
        The URIs of what was written.

    Raises:
        UsageError: there is nothing to report at `uri`, or `out` can't be written.
    """
    subject = open_subject(uri, split)
    if card and subject.crossval is not None:
        raise UsageError(f"{uri} is a cross-validation, which has no model to make a card of. Give a run.")
    out = storage.absolute(out if out is not None else storage.join(subject.uri, REPORT_NAME))
    directory = out.rpartition("/")[0]
    storage.check_writable(directory)
    report = gather(subject, explain_seconds=explain_seconds, on_progress=on_progress)
    storage.write_bytes(out, render("report", report.title, page_content(report)))
    if not card:
        return (out,)
    card_uri = storage.join(directory, CARD_NAME)
    storage.write_bytes(card_uri, model_card(report).encode("utf-8", "replace"))
    return out, card_uri


def gather(
    subject: Subject,
    *,
    explain_seconds: float = SALIENCY_SECONDS,
    on_progress: Callable[[str], None] | None = None,
) -> Report:
    """Read all that there is to say; what is gone becomes a notice."""
    tell = on_progress or (lambda text: None)
    notices = list(subject.notices)
    metrics = None
    if subject.crossval is not None:
        metrics = subject.crossval.pooled
        class_names = subject.crossval.class_names
        dataset, fingerprint = subject.crossval.dataset, subject.crossval.dataset_fingerprint
    elif subject.evaluation is not None:
        metrics = subject.evaluation.metrics
        notices += subject.evaluation.remarks
        class_names = subject.evaluation.class_names
        dataset, fingerprint = subject.evaluation.dataset, subject.evaluation.dataset_fingerprint
    else:
        assert subject.run is not None
        class_names = subject.run.class_names
        dataset, fingerprint = subject.run.dataset, subject.run.dataset_fingerprint
    tell("Reading the dataset's counts")
    balance = None
    try:
        balance = read_balance(dataset, fingerprint)
        notices += balance.notices
    except (DatasetError, OSError) as error:
        notices.append(f"What became of the data is not shown: {error}")
    tell("Drawing examples, and finding the pixels that decided" if explain_seconds else "Drawing examples")
    drawn = _draw(subject, explain_seconds)
    notices += drawn.notices
    curves = tuple(_curves(subject, notices))
    return Report(
        subject=subject,
        class_names=class_names,
        metrics=metrics,
        figures=figures_of(metrics) if metrics is not None else (),
        fold_figures=fold_figures_of(subject.crossval) if subject.crossval is not None else (),
        curves=curves,
        pictures=drawn,
        balance=balance,
        provenance=provenance_of(subject),
        notices=tuple(dict.fromkeys(notices)),
        machine=machine(),
        made_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _draw(subject: Subject, explain_seconds: float) -> Pictures:
    if subject.evaluation is not None:
        evaluations = [subject.evaluation]
    elif subject.crossval is not None:
        # Of the first repeat, as the pooled predictions.
        folds = [fold.fold for fold in subject.crossval.folds if fold.repeat == 0]
        directories = [storage.join(subject.uri, "folds", f"repeat-0-fold-{fold}", "evaluation") for fold in folds]
        try:
            evaluations = [load_evaluation(directory) for directory in directories]
        except UsageError as error:
            return Pictures(notices=(f"No pictures of examples: {error}",))
    else:
        return Pictures()
    size = max(found.notable.size for found in evaluations)
    # What will be left of each when all are merged: the others needn't be drawn.
    mistakes = sorted((e for f in evaluations for e in f.notable.mistakes), key=lambda e: (-e.probability, e.path))[
        :size
    ]
    uncertain = sorted((e for f in evaluations for e in f.notable.uncertain), key=lambda e: (e.margin, e.path))[:size]
    drawn = Pictures()
    for found in evaluations:
        drawn += pictures.draw(
            found.dataset,
            found.dataset_fingerprint,
            found.split,
            found.model,
            found.model_fingerprint,
            [example for example in found.notable.mistakes if example in mistakes],
            [example for example in found.notable.uncertain if example in uncertain],
            explain_seconds=explain_seconds / len(evaluations),
        )
    return drawn.first(size)


def _curves(subject: Subject, notices: list[str]) -> Iterator[Curve]:
    if subject.run is not None:
        runs = [("", subject.run.uri)]
    elif subject.crossval is not None:
        runs = [
            (
                f"fold {fold.fold}" if subject.crossval.settings.repeats == 1 else f"{fold.repeat}.{fold.fold}",
                storage.join(subject.uri, "folds", f"repeat-{fold.repeat}-fold-{fold.fold}", "run"),
            )
            for fold in subject.crossval.folds
        ]
    else:
        runs = []
    for name, uri in runs:
        lines, num_damaged = read_metrics(uri)
        if num_damaged:
            lines_told = "1 line" if num_damaged == 1 else f"{num_damaged} lines"
            notices.append(f"{storage.join(uri, METRICS_NAME)} has {lines_told} that can't be read.")
        epochs = tuple(line for line in lines if line.get("kind") == "epoch")
        steps = [line for line in lines if line.get("kind") == "step"]
        if epochs or steps:
            every = -(-len(steps) // _MAX_POINTS) or 1
            # Of the folds only the epochs are drawn.
            yield Curve(name, epochs, () if name else tuple(steps[::every]))


def page_content(report: Report) -> dict[str, Any]:
    """What the page's scripts draw, as plain JSON values."""
    subject = report.subject
    content: dict[str, Any] = {
        "title": report.title,
        "kind": subject.kind,
        "uri": subject.uri,
        "class_names": report.class_names,
        "figures": [config.to_dict(figure) for figure in report.figures],
        "fold_figures": [config.to_dict(figure) for figure in report.fold_figures],
        "curves": [config.to_dict(curve) for curve in report.curves],
        "mistakes": [_picture(each) for each in report.pictures.mistakes],
        "uncertain": [_picture(each) for each in report.pictures.uncertain],
        "balance": config.to_dict(report.balance) if report.balance is not None else None,
        "provenance": [config.to_dict(facts) for facts in report.provenance],
        "settings": settings_of(subject),
        "notices": report.notices,
        "made": {"at": report.made_at, "on": report.machine, "by": f"Manyeyes {manyeyes.__version__}"},
        "metrics": metrics_content(report.metrics) if report.metrics is not None else None,
        "folds": None,
    }
    if subject.evaluation is not None:
        found = subject.evaluation
        content["on"] = {"dataset": found.dataset, "split": found.split}
        content["model"] = {"uri": found.model, "kind": found.model_kind, "name": found.model_name}
    if subject.crossval is not None:
        content["on"] = {"dataset": subject.crossval.dataset, "split": ", ".join(subject.crossval.settings.splits)}
        content["folds"] = [config.to_dict(fold) for fold in subject.crossval.folds]
    return content


def metrics_content(metrics: Summary) -> dict[str, Any]:
    """The parts of a summary that are drawn; large ones are packed."""
    columns: dict[str, list[Any]] = {
        "support": [found.support for found in metrics.per_class],
        "predicted": [found.num_predicted for found in metrics.per_class],
    }
    for name in ("precision", "recall", "f1", "roc_auc", "average_precision"):
        columns[name] = [_rounded(getattr(found, name)) for found in metrics.per_class]
    for name in ("precision", "recall"):
        intervals = [getattr(found, f"{name}_interval") for found in metrics.per_class]
        columns[f"{name}_low"] = [_rounded(interval.low) for interval in intervals]
        columns[f"{name}_high"] = [_rounded(interval.high) for interval in intervals]
    return {
        "num_examples": metrics.num_examples,
        "confidence": metrics.confidence,
        "num_classes_without_support": metrics.num_classes_without_support,
        "num_classes_never_predicted": metrics.num_classes_never_predicted,
        "num_classes_left_out": metrics.num_classes_left_out,
        "classes": columns,
        "confusion": [_packed(row) for row in metrics.confusion_matrix],
        "calibration": [
            {
                "temperature": found.temperature,
                "ece": found.ece,
                "log_loss": found.log_loss,
                "bins": [_bin(each, metrics.confidence) for each in found.bins],
            }
            for found in (metrics.calibration, metrics.uncalibrated)
            if found is not None
        ],
    }


def _packed(row: Sequence[int]) -> list[int]:
    """A row of counts without its zeros: gap to the cell before, count, and so on."""
    packed, before = [], -1
    for column, count in enumerate(row):
        if count:
            packed += [column - before, count]
            before = column
    return packed


def _bin(found: Any, confidence: float) -> dict[str, Any]:
    values = config.to_dict(found)
    if found.num_examples:
        interval = wilson_interval(round(found.accuracy * found.num_examples), found.num_examples, confidence)
        values |= {"accuracy_low": interval.low, "accuracy_high": interval.high}
    return values


def _picture(picture: pictures.Picture) -> dict[str, Any]:
    example = picture.example
    return {
        "path": example.path,
        "label": example.label,
        "predicted": example.predicted,
        "probability": example.probability,
        "margin": example.margin,
        "image": picture.image,
        "overlay": picture.overlay,
        "tiny": picture.is_tiny,
    }


def _rounded(value: float | None) -> float | None:
    # Digits beyond these say nothing, and there may be thousands of classes.
    return None if value is None else round(value, 5)
