"""`compare`: runs, evaluations or cross-validations side by side, with the differences that can be told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import manyeyes
from manyeyes import config, storage
from manyeyes.errors import UsageError
from manyeyes.evaluation import paired
from manyeyes.evaluation.intervals import level_text
from manyeyes.evaluation.predictions import DIRECTORY_NAME
from manyeyes.evaluation.resampling import McNemar
from manyeyes.report import differences
from manyeyes.report.differences import Difference
from manyeyes.report.figures import Figure, figures_of, fold_figures_of
from manyeyes.report.page import render
from manyeyes.report.subject import Subject, open_subject

_FOLDS = "paired on the same folds, corrected resampled t (Nadeau and Bengio)"


@dataclass(frozen=True)
class Entry:
    """One of those compared.

    Attributes:
        name: short and different from the others'.
        f1: of each class; of a cross-validation over the pooled predictions of its first repeat.
        folds: of a cross-validation, the figures of each fold.
    """

    name: str
    uri: str
    model: str
    figures: tuple[Figure, ...]
    f1: tuple[float | None, ...]
    folds: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Against:
    """One of the others less the first.

    Attributes:
        name: of the other.
        how: "folds" or "examples" where it is paired by these, "unpaired" where predictions are missing.
        mcnemar: examples that only one gets right; None where it is unpaired.
    """

    name: str
    how: Literal["folds", "examples", "unpaired"]
    differences: tuple[Difference, ...]
    mcnemar: McNemar | None


@dataclass(frozen=True)
class ComparedResult:
    """What `compare` found.

    Attributes:
        kind: what was compared.
        against: each of the others less the first.
        notices: what one should know before one believes it.
    """

    kind: Literal["evaluation", "crossval"]
    dataset: str
    split: str
    num_examples: int
    confidence: float
    class_names: tuple[str, ...]
    entries: tuple[Entry, ...]
    against: tuple[Against, ...]
    notices: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return config.to_dict(self)


def compare(uris: Sequence[str], *, split: str | None = None) -> ComparedResult:
    """Compare runs and evaluations on the same split of the same dataset, or cross-validations on the same folds.

    Args:
        uris: two or more; the others are compared with the first.
        split: of runs: which of their evaluations.

    Raises:
        UsageError: they can't be compared, and why.
        DataError: kept predictions are not of the same examples.
    """
    if len(uris) < 2:
        raise UsageError(f"{len(uris)} given, but it takes two or more to compare. Give another run or directory.")
    subjects = [open_subject(uri, split) for uri in uris]
    names = _names([subject.uri for subject in subjects])
    if len({subject.crossval is not None for subject in subjects}) > 1:
        raise UsageError(
            "A cross-validation and an evaluation can't be compared: one measures a recipe on held-out folds, the "
            "other a model on a split. Give two of a kind."
        )
    if subjects[0].crossval is not None:
        return _compare_crossvals(subjects, names)
    return _compare_evaluations(subjects, names)


def write_comparison(result: ComparedResult, out: str) -> str:
    """Write the comparison as a page that opens without a network; returns its URI."""
    out = storage.absolute(out)
    content = result.to_dict() | {"made": {"by": f"Manyeyes {manyeyes.__version__}"}}
    storage.write_bytes(out, render("compare", " and ".join(entry.name for entry in result.entries), content))
    return out


def _compare_evaluations(subjects: list[Subject], names: list[str]) -> ComparedResult:
    for subject in subjects:
        if subject.evaluation is None:
            raise UsageError(f"{subject.uri} was not evaluated. {subject.notices[0]}")
    found = [subject.evaluation for subject in subjects if subject.evaluation is not None]
    first = found[0]
    for subject, other in zip(subjects[1:], found[1:], strict=True):
        where, elsewhere = (
            f"{each.split} of {each.dataset} (fingerprint {each.dataset_fingerprint})" for each in (first, other)
        )
        if (other.dataset_fingerprint, other.split) != (first.dataset_fingerprint, first.split):
            raise UsageError(
                f"{subjects[0].uri} and {subject.uri} can't be compared: the first was measured on {where}, the other "
                f"on {elsewhere}. Evaluate both on the same split of the same dataset."
            )
        if other.metrics.confidence != first.metrics.confidence:
            raise UsageError(
                f"{subjects[0].uri} has {level_text(first.metrics.confidence)} intervals, {subject.uri} "
                f"{level_text(other.metrics.confidence)}. Evaluate both with the same --confidence."
            )
    figures = [figures_of(each.metrics) for each in found]
    kept = [_predictions(subject) for subject in subjects]
    notices = [notice for subject in subjects for notice in subject.notices]
    against = []
    for index in range(1, len(found)):
        here, there = kept[index], kept[0]
        by_name = {figure.name: figure for figure in figures[0]}
        told = {
            each.name: differences.unpaired(each, by_name[each.name]) for each in figures[index] if each.name in by_name
        }
        counts = None
        if here is not None and there is not None:
            temperatures = (found[index].metrics.calibration.temperature, first.metrics.calibration.temperature)
            better, counts = differences.paired(
                here, there, temperatures, len(first.class_names), first.metrics.confidence
            )
            told |= {each.name: each for each in better}
        how: Literal["examples", "unpaired"] = "examples" if counts is not None else "unpaired"
        against.append(Against(names[index], how, tuple(told.values()), counts))
    if any(each.how == "unpaired" for each in against):
        lacking = [name for name, uri in zip(names, kept, strict=True) if uri is None]
        notices.append(
            f"{', '.join(lacking)} kept no predictions, so differences are told from the intervals of both as if they "
            "had seen different examples. For paired tests evaluate again with --predictions."
        )
    entries = [
        Entry(name, subject.uri, each.model_name, tuple(own), tuple(of.f1 for of in each.metrics.per_class))
        for name, subject, each, own in zip(names, subjects, found, figures, strict=True)
    ]
    return ComparedResult(
        "evaluation",
        first.dataset,
        first.split,
        first.metrics.num_examples,
        first.metrics.confidence,
        first.class_names,
        tuple(entries),
        tuple(against),
        (*dict.fromkeys(notices), *_several(against)),
    )


def _compare_crossvals(subjects: list[Subject], names: list[str]) -> ComparedResult:
    found = [subject.crossval for subject in subjects if subject.crossval is not None]
    first = found[0]
    against = []
    for name, subject in zip(names[1:], subjects[1:], strict=True):
        # Refuses, in words, what is not on the same folds.
        compared = paired.compare(subject.uri, subjects[0].uri, first.confidence)
        told = [
            Difference(figure, test.difference.mean, test.difference.low, test.difference.high, test.p_value, _FOLDS)
            for figure, test in compared.figures.items()
        ]
        against.append(Against(name, "folds", tuple(told), compared.mcnemar))
    entries = [
        Entry(
            name,
            subject.uri,
            subject.name,
            fold_figures_of(each),
            tuple(of.f1 for of in each.pooled.per_class),
            tuple(fold.figures for fold in each.folds),
        )
        for name, subject, each in zip(names, subjects, found, strict=True)
    ]
    return ComparedResult(
        "crossval",
        first.dataset,
        ", ".join(first.settings.splits),
        first.pooled.num_examples,
        first.confidence,
        first.class_names,
        tuple(entries),
        tuple(against),
        tuple(_several(against)),
    )


def _several(against: Sequence[Against]) -> list[str]:
    if len(against) < 2:
        return []
    return [f"{len(against)} comparisons with the first are made: their p values are not corrected for that."]


def _predictions(subject: Subject) -> str | None:
    assert subject.evaluation_uri is not None
    uri = storage.join(subject.evaluation_uri, DIRECTORY_NAME)
    return uri if storage.list_files(uri, ".parquet") else None


def _names(uris: list[str]) -> list[str]:
    """The ends of the URIs, as long as it takes to tell them apart; numbered where they are the same."""
    parts = [uri.split("/") for uri in uris]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{index}. {uri}" for index, uri in enumerate(uris, 1)]
