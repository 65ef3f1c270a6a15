"""Comparing: paired where that is possible, said where it is not, refused where it would mislead."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from typer.testing import CliRunner

from manyeyes.engines.registry import create_engine
from manyeyes.errors import DataError, UsageError
from manyeyes.evaluation.crossval import crossval
from manyeyes.evaluation.folds import FoldSettings
from manyeyes.evaluation.predictions import Predictions, open_writer, part_uri, read_predictions
from manyeyes.report import differences
from manyeyes.report.build import gather, page_content
from manyeyes.report.comparing import compare, write_comparison
from manyeyes.report.figures import Figure
from manyeyes.report.subject import open_subject
from manyeyes.training.settings import TrainSettings


def write(directory: Path, paths: list[str], labels: np.ndarray, logits: np.ndarray) -> str:
    with open_writer(part_uri(str(directory), 0), logits.shape[1]) as writer:
        writer.write(Predictions.from_logits(paths, labels, logits))
    return str(directory)


@pytest.fixture
def other(evaluation: str, tmp_path: Path) -> Path:
    """The same evaluation with other logits."""
    copy = tmp_path / "other"
    shutil.copytree(evaluation, copy)
    (found,) = read_predictions(f"{evaluation}/predictions")
    logits = found.logits + np.random.default_rng(0).normal(0, 4, found.logits.shape)
    write(copy / "predictions", found.paths, found.labels, logits)
    return copy


def test_paired_differences_are_those_of_the_examples(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 4, 500).astype(np.int32)
    truth = 2.0 * np.eye(4)[labels]
    logits = [truth + draw.normal(0, spread, (500, 4)) for spread in (1.2, 1.6)]
    paths = [str(index) for index in range(500)]
    first, second = (write(tmp_path / str(i), paths, labels, each) for i, each in enumerate(logits))
    found, counts = differences.paired(first, second, (1.0, 2.0), 4, 0.95)
    told = {each.name: each for each in found}
    right = [each.argmax(axis=1) == labels for each in logits]
    assert (counts.only_first, counts.only_second) == ((right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum())
    assert told["accuracy"].value == pytest.approx(right[0].mean() - right[1].mean())
    assert told["accuracy"].p_value == pytest.approx(
        scipy.stats.binomtest(counts.only_first, counts.only_first + counts.only_second).pvalue
    )
    probabilities = [
        scipy.special.softmax(each.astype(np.float32) / t, axis=1) for each, t in zip(logits, (1.0, 2.0), strict=True)
    ]
    losses = [-np.log(each[np.arange(500), labels]) for each in probabilities]
    test = scipy.stats.ttest_rel(*losses)
    assert told["log_loss"].value == pytest.approx(np.mean(losses[0] - losses[1]), rel=1e-4)
    assert told["log_loss"].low == pytest.approx(test.confidence_interval(0.95).low, rel=0.02)
    briers = [((each - np.eye(4)[labels]) ** 2).sum(axis=1) for each in probabilities]
    assert told["brier_score"].value == pytest.approx(np.mean(briers[0] - briers[1]), rel=1e-4)
    for name, score in (
        ("balanced_accuracy", sklearn.metrics.balanced_accuracy_score),
        ("macro_f1", lambda truth, found: sklearn.metrics.f1_score(truth, found, average="macro")),
    ):
        expected = score(labels, logits[0].argmax(axis=1)) - score(labels, logits[1].argmax(axis=1))
        assert told[name].value == pytest.approx(expected)
    for each in found:
        assert each.low is not None
        assert each.high is not None
        assert each.low < each.value < each.high


def test_classes_without_example_and_prediction_change_no_difference(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 4, 200).astype(np.int32)
    found = []
    for num_classes in (4, 9):
        uris = []
        for index, spread in enumerate((1.2, 1.6)):
            draw = np.random.default_rng(index)
            logits = np.full((200, num_classes), -99.0)
            logits[:, :4] = 2.0 * np.eye(4)[labels] + draw.normal(0, spread, (200, 4))
            uris.append(write(tmp_path / f"{num_classes}-{index}", [str(row) for row in range(200)], labels, logits))
        found.append({each.name: each for each in differences.paired(*uris, (1.0, 1.0), num_classes, 0.95)[0]})
    for name in ("balanced_accuracy", "macro_f1"):
        few, many = found[0][name], found[1][name]
        assert few.value == pytest.approx(many.value)
        assert (few.low, few.high) == pytest.approx((many.low, many.high))


def test_a_difference_that_is_the_same_for_every_example_has_no_interval_and_no_p(tmp_path: Path) -> None:
    labels = np.arange(40, dtype=np.int32) % 2
    paths = [str(row) for row in range(40)]
    first, second = (write(tmp_path / str(k), paths, labels, k * np.eye(2)[labels]) for k in (2, 1))
    found, _ = differences.paired(first, second, (1.0, 1.0), 2, 0.95)
    for each in found:
        if each.name != "accuracy":
            assert (each.low, each.high, each.p_value) == (None, None, None), each.name


def test_the_paired_interval_of_accuracy_holds_the_true_difference_as_often_as_it_says() -> None:
    # Two models, one of which alone is right on 10 % of the examples, the other alone on 5 %.
    draws = np.random.default_rng(2).multinomial(200, (0.85, 0.1, 0.05), size=1000)
    held = 0
    for _, only_first, only_second in draws.tolist():
        low, high = differences.accuracy_interval(only_first, only_second, 200, 0.9)
        held += low <= 0.05 <= high
    assert 0.88 <= held / 1000 <= 0.93


def test_an_unpaired_interval_joins_those_of_both() -> None:
    def figure(value: float, low: float | None, high: float | None) -> Figure:
        return Figure("accuracy", "Accuracy", value, low, high, "share", True, "", "")

    found = differences.unpaired(figure(0.9, 0.87, 0.92), figure(0.8, 0.76, 0.84))
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1 - math.hypot(0.03, 0.04))
    assert found.high == pytest.approx(0.1 + math.hypot(0.02, 0.04))
    assert found.p_value is None
    assert differences.unpaired(figure(0.9, None, None), figure(0.8, 0.7, 0.9)).low is None


def test_evaluations_with_predictions_are_compared_example_by_example(evaluation: str, other: Path) -> None:
    result = compare([evaluation, str(other)])
    (against,) = result.against
    assert against.how == "examples"
    assert against.mcnemar is not None
    assert against.mcnemar.only_first < against.mcnemar.only_second, "the first is the better one"
    assert result.notices == ()
    (itself,) = compare([evaluation, evaluation]).against
    assert itself.mcnemar == dataclasses.replace(against.mcnemar, only_first=0, only_second=0, p_value=1.0)
    assert {each.value for each in itself.differences} == {0.0}
    for each in itself.differences:
        assert each.low is None or each.low < each.high, f"{each.name} would be certain"
    of_itself = {each.name: each for each in itself.differences}
    for name in ("balanced_accuracy", "macro_f1", "log_loss", "brier_score"):
        assert (of_itself[name].low, of_itself[name].high) == (None, None)
    assert (of_itself["macro_f1"].p_value, of_itself["log_loss"].p_value) == (None, 1.0)


def test_without_predictions_the_difference_is_told_as_unpaired(evaluation: str, other: Path) -> None:
    shutil.rmtree(other / "predictions")
    result = compare([evaluation, str(other)])
    assert result.against[0].how == "unpaired"
    assert result.against[0].mcnemar is None
    assert "other kept no predictions" in result.notices[0]
    assert "--predictions" in result.notices[0]


def test_what_was_measured_on_something_else_is_refused(evaluation: str, other: Path, small_dataset: str) -> None:
    path = other / "evaluation.json"
    values = json.loads(path.read_text())
    for name, value in (("split", "val"), ("dataset_fingerprint", "0" * 16)):
        path.write_text(json.dumps(values | {name: value}))
        with pytest.raises(
            UsageError, match=r"can't be compared: the first was measured on test of .* on .*Evaluate both"
        ):
            compare([evaluation, str(other)])
    path.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="two or more"):
        compare([evaluation])
    (found,) = read_predictions(f"{evaluation}/predictions")
    write(other / "predictions", found.paths[::-1], found.labels, found.logits)
    with pytest.raises(DataError, match="not of the same examples"):
        compare([evaluation, str(other)])


def test_the_command_prints_tables_json_and_a_page(evaluation: str, other: Path, tmp_path: Path, show: Any) -> None:
    from manyeyes.cli.main import app

    page_file = tmp_path / "compare.html"
    done = CliRunner().invoke(app, ["compare", evaluation, str(other), evaluation, "--out", str(page_file)])
    assert done.exit_code == 0, done.output
    for expected in ("30 examples of test", "only one is right", "McNemar", "less", "p values are not corrected"):
        assert expected in done.stdout
    assert re.search(r"Accuracy +│ -\d+\.\d\d points │ +-\d+\.\d\d to [+-]\d+\.\d\d points │", done.stdout)
    done = CliRunner().invoke(app, ["compare", evaluation, str(other), "--json"])
    assert json.loads(done.stdout)["against"][0]["how"] == "examples"
    page = show(page_file)
    assert page.evaluate("document.querySelectorAll('section').length") == 4
    assert "exact McNemar test" in page.text("against-0")
    assert re.search(r"Accuracy\s*−\d+\.\d\d\spoints\s*−\d+\.\d\d to [+−]\d+\.\d\d\spoints", page.text("against-0"))
    assert page.evaluate("document.querySelectorAll('#classes-table tbody tr').length") == 3
    assert [url for url in page.requested() if not url.startswith("data:")] == [f"file://{page_file}"]


@pytest.mark.slow
def test_a_crossvalidation_is_reported_and_compared_on_its_folds(
    small_dataset: str, evaluation: str, tmp_path: Path, show: Any
) -> None:
    options = ("width=4", "stages=2", "convolutions=1")
    recipe = TrainSettings.load(
        None,
        ["model.name=cnn", *(f"model.options.{each}" for each in options), "train.epochs=1", "train.tensorboard=false"],
    )
    first, second = tmp_path / "first", tmp_path / "second"
    settings = FoldSettings(folds=2, group_duplicates=False)
    result = crossval(small_dataset, str(first), recipe, settings, engine=create_engine("inline"))
    report = gather(open_subject(str(first)))
    assert report.title == "cnn: 2-fold cross-validation"
    assert len(report.curves) == 2
    held_out = {path for part in read_predictions(f"{first}/predictions/repeat-0") for path in part.paths}
    assert {each.example.path for each in report.pictures.mistakes} <= held_out
    assert len(report.pictures.uncertain) == 24
    margins = [each.example.margin for each in report.pictures.uncertain]
    assert margins == sorted(margins)
    assert all(each.overlay for each in report.pictures.uncertain)
    content = page_content(report)
    assert content["fold_figures"][0]["value"] == pytest.approx(
        np.mean([fold.figures["accuracy"] for fold in result.folds])
    )
    command = next(block for block in report.provenance if block.title == "Commands").facts[0][1]
    assert command.startswith(f"manyeyes crossval {small_dataset} --out OUT --folds 2 --repeats 1 --seed 0")
    assert command.endswith("--set model.options.stages=2 --set model.options.width=4 --set train.epochs=1 --set "
                            "train.tensorboard=false")  # fmt: skip
    shutil.copytree(first, second)
    compared = compare([str(first), str(second)])
    assert compared.against[0].how == "folds"
    assert {each.p_value for each in compared.against[0].differences} == {1.0}
    page = show(write_comparison(compared, str(tmp_path / "compare.html")))
    assert "paired on the same folds" in page.text("against-0")
    assert page.evaluate("document.querySelectorAll('#folds .ring').length") == 4 * 2 * 2
    with pytest.raises(UsageError, match="A cross-validation and an evaluation can't be compared"):
        compare([str(first), evaluation])
