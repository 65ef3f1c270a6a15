from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import manyeyes
from manyeyes.auditing.label_errors import find_label_errors
from manyeyes.data.dataset import Dataset
from manyeyes.engines.registry import create_engine
from manyeyes.errors import DataError, MissingExtraError
from manyeyes.evaluation.predictions import Predictions, open_writer, part_uri


def write(directory, paths, labels, logits, num_parts=3):
    for index, rows in enumerate(np.array_split(np.arange(len(paths)), num_parts)):
        with open_writer(part_uri(directory, index), logits.shape[1]) as writer:
            writer.write(Predictions.from_logits([paths[row] for row in rows], labels[rows], logits[rows]))
    return directory


def noisy(num_examples=3000, num_classes=5, seed=0):
    """Labels of which a tenth is wrong, and logits of a model that knows the true ones in 95 of 100 cases."""
    draw = np.random.default_rng(seed)
    true = draw.integers(0, num_classes, num_examples)
    labels = np.where(draw.random(num_examples) < 0.1, (true + 1) % num_classes, true).astype(np.int32)
    seen = np.where(draw.random(num_examples) < 0.95, true, draw.integers(0, num_classes, num_examples))
    logits = draw.normal(0, 1, (num_examples, num_classes)).astype(np.float32)
    logits[np.arange(num_examples), seen] += 5
    return true, labels, logits


def test_planted_label_errors_are_found(tmp_path):
    pytest.importorskip("cleanlab")
    true, labels, logits = noisy()
    paths = [f"{i:05d}.png" for i in range(len(labels))]
    suspects, num_judged = find_label_errors(write(str(tmp_path), paths, labels, logits), 5)
    wrong = {paths[i] for i in np.flatnonzero(true != labels)}
    found = {suspect.path for suspect in suspects}
    assert num_judged == 3000 and len(found & wrong) > 0.85 * len(wrong) and len(found & wrong) > 0.75 * len(found)
    probabilities = [suspect.label_probability for suspect in suspects]
    assert probabilities == sorted(probabilities)
    assert all(suspect.label != suspect.predicted for suspect in suspects)


def test_in_parts_the_same_errors_are_found_as_by_cleanlab_on_all_at_once(tmp_path):
    pytest.importorskip("cleanlab")
    from cleanlab.filter import find_label_issues

    _, labels, logits = noisy(seed=1)
    paths = [f"{i:05d}.png" for i in range(len(labels))]
    suspects, _ = find_label_errors(write(str(tmp_path), paths, labels, logits, num_parts=7), 5)
    exponentials = np.exp(logits.astype(np.float64))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    expected = find_label_issues(labels, probabilities, filter_by="low_self_confidence", n_jobs=1)
    found = {suspect.path for suspect in suspects}
    # Estimated sums may round to one more or less.
    assert len(found ^ {paths[i] for i in np.flatnonzero(expected)}) <= 1


def predictions_of(dataset, directory, wrong=()):
    """A model that is sure of every label but those of `wrong`, of which it is as sure of another."""
    data = Dataset(dataset)
    groups = [group for shard in data.manifest.shards for group in data.rows(shard)]
    paths = [path for group in groups for path in group.paths]
    labels = np.concatenate([group.labels for group in groups])
    logits = np.random.default_rng(0).normal(0, 0.1, (len(paths), len(data.class_names))).astype(np.float32)
    for row, (path, label) in enumerate(zip(paths, labels.tolist(), strict=True)):
        is_wrong = path.rsplit("/", 1)[-1] in wrong
        logits[row, (label + 1) % len(data.class_names) if is_wrong else label] += 6
    return write(directory, paths, labels, logits)


def test_the_audit_names_them_with_split_and_class_and_shows_them(clean, tmp_path):
    pytest.importorskip("cleanlab")
    wrong = {"03.png", "20.png", "45.png"}
    predictions = predictions_of(clean, str(tmp_path / "predictions"), wrong)
    result = manyeyes.audit(clean, engine=create_engine("inline"), predictions=predictions, out=str(tmp_path / "out"))
    assert {error.example.path.rsplit("/", 1)[-1] for error in result.label_errors} == wrong
    for error in result.label_errors:
        assert {error.example.class_name, error.predicted} == {"cat", "dog"} and error.label_probability < 0.1
    assert result.num_judged == 48 and (tmp_path / "out" / "label_errors.png").stat().st_size > 10_000


def test_a_file_that_is_listed_under_two_labels_or_in_two_splits_is_named_by_the_row_that_is_wrong(
    make_dataset, tmp_path
):
    pytest.importorskip("cleanlab")
    dataset = make_dataset("relisted", size=(48, 48))
    data = Dataset(dataset)
    groups = [group for shard in data.manifest.shards for group in data.rows(shard)]
    paths = [path for group in groups for path in group.paths]
    labels = np.concatenate([group.labels for group in groups])
    numbers = [int(Path(path).stem) for path in paths]
    # The model says of each file what it shows.
    shown = [1 if number == 20 else number % 2 for number in numbers]
    logits = np.random.default_rng(0).normal(0, 0.1, (52, 2)).astype(np.float32)
    logits[np.arange(52), shown] += 6
    predictions = write(str(tmp_path / "predictions"), paths, labels, logits)
    result = manyeyes.audit(dataset, engine=create_engine("inline"), predictions=predictions)
    found = [(e.example.path.rsplit("/", 1)[-1], e.example.class_name, e.example.split) for e in result.label_errors]
    assert sorted(found) == [
        ("00.png", "dog", "train"),
        ("05.png", "cat", "test"),
        ("14.png", "dog", "train"),
        ("20.png", "cat", "test"),
        ("20.png", "cat", "train"),
    ]
    more_often = write(str(tmp_path / "more"), [*paths, *paths], np.tile(labels, 2), np.tile(logits, (2, 1)))
    with pytest.raises(DataError, match=r"it has \d\d\.png with label [01], which .* has not, or not as often"):
        manyeyes.audit(dataset, engine=create_engine("inline"), predictions=more_often)


def test_predictions_of_another_dataset_are_refused(clean, messy, tmp_path):
    pytest.importorskip("cleanlab")
    wrong = {"03.png", "20.png", "45.png"}
    of_other_images = predictions_of(messy, str(tmp_path / "messy"), wrong)
    with pytest.raises(DataError, match="3 classes, but the dataset has 2"):
        manyeyes.audit(clean, engine=create_engine("inline"), predictions=of_other_images)
    _, labels, logits = noisy(200, 2)
    elsewhere = write(str(tmp_path / "elsewhere"), [f"elsewhere/{i}.png" for i in range(200)], labels, logits)
    with pytest.raises(DataError, match="is not of this dataset"):
        manyeyes.audit(clean, engine=create_engine("inline"), predictions=elsewhere)


def test_without_cleanlab_the_extra_to_install_is_named_before_any_image_is_read(clean, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanlab.experimental.label_issues_batched", None)
    asked = []
    with pytest.raises(MissingExtraError, match=r"manyeyes\[audit\]"):
        manyeyes.audit(clean, predictions=str(tmp_path), on_progress=lambda *counts: asked.append(counts))
    assert asked == []
