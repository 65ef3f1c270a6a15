"""Tables and pictures stay readable and say what is missing, for few classes and for many."""

from __future__ import annotations

import dataclasses
import io

import cv2
import numpy as np
import pytest
from rich.console import Console

from manyeyes.evaluation import plots
from manyeyes.evaluation.evaluate import EvaluationResult
from manyeyes.evaluation.metrics import ClassificationSums, summarize
from manyeyes.evaluation.tables import tables


def result_with(num_classes: int, *, last_class_has_examples: bool = True) -> EvaluationResult:
    random = np.random.default_rng(num_classes)
    labels = np.repeat(np.arange(num_classes if last_class_has_examples else num_classes - 1), 12)
    logits = random.normal(0, 1, (len(labels), num_classes)).astype(np.float32)
    logits[np.arange(len(labels)), labels] += 2
    class_names = tuple(f"species [red] {label}" for label in range(num_classes))
    metrics = summarize(ClassificationSums.from_logits(logits, labels), class_names)
    return EvaluationResult("runs/a", "run", "cnn", "1", "data", "2", "test", class_names, metrics)


def printed(result: EvaluationResult) -> str:
    console = Console(width=140, record=True, file=io.StringIO())
    for part in tables(result):
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        else:
            console.print(part)
    return console.export_text()


def test_every_one_of_few_classes_is_listed_with_its_name_as_it_is():
    text = printed(result_with(3))
    for label in range(3):
        assert f"species [red] {label}" in text
    assert "Most often confused: species [red]" in text
    assert "no examples" not in text
    assert "fewer than 10 examples" not in text


def test_of_many_classes_the_worst_are_listed():
    result = result_with(200)
    text = printed(result)
    assert "The 15 classes of 200 with the lowest F1" in text
    worst = min(result.metrics.per_class, key=lambda found: found.f1)
    best = max(result.metrics.per_class, key=lambda found: found.f1)
    assert f"│ {worst.class_name} " in text
    assert f"│ {best.class_name} " not in text


def test_a_class_without_examples_is_said():
    text = printed(result_with(3, last_class_has_examples=False))
    assert "1 class has no examples here" in text
    assert "count as 0 in the averages" in text
    assert "left out" not in text
    labels = np.repeat([0, 1], 12)
    sums = ClassificationSums.from_logits(np.eye(5, dtype=np.float32)[labels], labels)
    result = result_with(5)
    metrics = summarize(sums, result.class_names)
    text = printed(dataclasses.replace(result, metrics=metrics))
    assert "3 classes have neither and are left out of the averages." in text


def test_few_examples_of_a_class_are_said():
    result = result_with(3)
    rare = dataclasses.replace(result.metrics.per_class[0], support=9)
    metrics = dataclasses.replace(result.metrics, per_class=(rare, *result.metrics.per_class[1:]))
    assert "1 class has fewer than 10 examples" in printed(dataclasses.replace(result, metrics=metrics))


@pytest.mark.parametrize(("confidence", "shown"), [(0.95, "95%"), (0.975, "97.5%"), (0.999, "99.9%")])
def test_the_confidence_of_the_intervals_is_shown_as_it_was_asked_for(confidence, shown):
    result = result_with(3)
    metrics = dataclasses.replace(result.metrics, confidence=confidence)
    assert f" {shown} interval" in printed(dataclasses.replace(result, metrics=metrics))


def decoded(png: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)


@pytest.mark.parametrize("num_classes", [2, 10, 200])
def test_the_confusion_matrix_is_drawn_dark_on_its_diagonal(num_classes):
    metrics = result_with(num_classes).metrics
    image = decoded(plots.confusion_matrix_png(metrics, [f"class {i}" for i in range(num_classes)]))
    assert 400 < image.shape[0] < 2000
    # The darkest blue of the colour map stands for a large share of a row, white for none.
    num_dark = int((image.max(axis=2) < 140).sum())
    assert num_dark > 2000


def test_learning_curves_stand_one_epoch_and_missing_validation():
    line = {"kind": "epoch", "epoch": 1, "loss": 1.0, "accuracy": 0.5, "learning_rate": 0.1}
    one = plots.learning_curves_png([line | {"val_loss": None, "val_accuracy": None}])
    two = plots.learning_curves_png([line, line | {"epoch": 2, "val_loss": 0.5, "val_accuracy": 0.8}])
    assert decoded(one).shape == decoded(two).shape
    assert not np.array_equal(decoded(one), decoded(two))


def test_epochs_are_read_from_metrics_that_a_killed_training_left(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "step"}\n{"kind": "epoch", "epoch": 1}\n{"kind": "epoch", "epo')
    assert plots.read_epochs(str(metrics)) == [{"kind": "epoch", "epoch": 1}]
    assert plots.read_epochs(str(tmp_path / "none.jsonl")) == []
