"""The figures of a run's evaluation go into its bundle."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from manyeyes.engines.inline import InlineEngine
from manyeyes.evaluation.evaluate import EvaluationResult, evaluate
from manyeyes.recognition.bundle import Bundle
from manyeyes.training.evaluated import read_evaluation
from manyeyes.training.export import export
from manyeyes.training.run import Run


@pytest.fixture
def run(small_run: str, tmp_path: Path) -> str:
    return shutil.copytree(small_run, str(tmp_path / "run"))


@pytest.fixture
def evaluated(run: str, small_dataset: str) -> EvaluationResult:
    """Of `run`, on val."""
    return evaluate(run, small_dataset, split="val", engine=InlineEngine())


def test_a_bundle_has_the_figures_of_the_evaluation_of_test_before_those_of_val(
    run: str, evaluated: EvaluationResult, small_dataset: str, tmp_path: Path
) -> None:
    of_val = export(run, str(tmp_path / "a"))
    assert of_val.evaluation is not None
    assert of_val.evaluation.split == "val"
    wanted = evaluate(run, small_dataset, engine=InlineEngine())
    of_test = export(run, str(tmp_path / "b"))
    found = Bundle.load(of_test.bundle).info.evaluation
    assert found == of_test.evaluation
    assert found is not None
    assert (found.split, found.num_examples, found.dataset_fingerprint) == ("test", 30, wanted.dataset_fingerprint)
    metrics = wanted.metrics
    assert found.accuracy == metrics.accuracy
    assert found.accuracy_interval == dataclasses.astuple(metrics.accuracy_interval)
    assert (found.top_k_accuracy, found.macro_f1) == (metrics.top_k_accuracy, metrics.macro.f1)
    for name in ("precision", "recall", "f1", "support"):
        assert getattr(found, name) == pytest.approx([getattr(each, name) for each in metrics.per_class], abs=1e-4)
    # The version that requests name says which model answers, whatever is known of it.
    info = Bundle.load(of_test.bundle).info
    assert dataclasses.replace(info, evaluation=None).with_fingerprint().fingerprint == of_test.fingerprint


def test_figures_of_another_checkpoint_or_a_damaged_file_are_left_out_and_it_is_said_why(
    run: str, evaluated: EvaluationResult
) -> None:
    path = Path(run) / "evaluation" / "val" / "evaluation.json"
    values = json.loads(path.read_text())
    state = Run.open(run).state("best")

    def refusal(**changes: Any) -> str:
        path.write_text(json.dumps({**values, **changes}))
        found, why = read_evaluation(run, state)
        assert found is None
        return why

    assert refusal(model_fingerprint="0" * 16) == f"{path} is of another checkpoint"
    for changes in ({"metrics": {}}, {"metrics": []}, {"split": 3}):
        assert f"{path} can't be used" in refusal(**changes)
    path.write_text("{")
    assert f"{path} can't be used" in read_evaluation(run, state)[1]
    # What a later version adds is passed over.
    path.write_text(json.dumps({**values, "more": 1, "metrics": {**values["metrics"], "calibration": {"ece": 0.1}}}))
    found, why = read_evaluation(run, state)
    assert (found is not None, why) == (True, "")
    path.unlink()
    assert read_evaluation(run, state) == (None, "it was not evaluated")
