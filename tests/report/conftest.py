from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyeyes.engines.inline import InlineEngine
from manyeyes.evaluation.evaluate import EvaluationResult, evaluate
from manyeyes.evaluation.metrics import ClassificationSums, summarize
from manyeyes.evaluation.notable import NotableExample, Place
from manyeyes.report.balance import Balance
from manyeyes.report.build import Report
from manyeyes.report.figures import figures_of
from manyeyes.report.pictures import Picture, Pictures
from manyeyes.report.subject import Subject
from manyeyes.report.thumbnails import data_uri


@pytest.fixture(scope="session")
def evaluation(small_run: str, small_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What `evaluate` writes of the small run, with predictions."""
    out = str(tmp_path_factory.mktemp("report") / "evaluation")
    evaluate(small_run, small_dataset, out=out, predictions=True, engine=InlineEngine())
    return out


@pytest.fixture(scope="session")
def large_report() -> Report:
    """1,000 classes of which each is taken for each other, and 48 pictures that compress as badly as noise."""
    num_classes = 1000
    draw = np.random.default_rng(0)
    labels = draw.integers(0, num_classes, 3000)
    logits = draw.normal(0, 1, (3000, num_classes)).astype(np.float32)
    logits[np.arange(3000), labels] += 2.5
    names = tuple(f"class {label:04d} of a thousand" for label in range(num_classes))
    sums = ClassificationSums.from_logits(logits, labels, temperature=0.7, example_indices=np.arange(3000))
    metrics = summarize(sums, names)
    matrix = draw.integers(1, 1000, (num_classes, num_classes))
    metrics = dataclasses.replace(metrics, confusion_matrix=tuple(map(tuple, matrix.tolist())))

    def picture(index: int) -> Picture:
        pixels = draw.integers(0, 255, (160, 160, 3), dtype=np.uint8)
        example = NotableExample(f"photos/{index}.jpg", index, index + 1, 0.9, 0.01, Place("shard", 0, index))
        return Picture(example, data_uri(pixels), data_uri(pixels[::-1]), is_tiny=False)

    pictures = [picture(index) for index in range(48)]
    written = {"train": [1300 - label for label in range(num_classes)], "test": [50] * num_classes}
    num_seen = sum(map(sum, written.values()))
    found = EvaluationResult("/run", "run", "resnet", "f" * 16, "/data", "e" * 16, "test", names, metrics)
    return Report(
        subject=Subject("evaluation", "/evaluation", None, found, "/evaluation"),
        class_names=names,
        metrics=metrics,
        figures=figures_of(metrics),
        fold_figures=(),
        curves=(),
        pictures=Pictures(tuple(pictures[:24]), tuple(pictures[24:])),
        balance=Balance("/data", "e" * 16, "jpeg", num_seen, written, {}, {}, (), None),
        provenance=(),
        notices=(),
        machine="",
        made_at="2026-01-01T00:00:00+00:00",
    )


@pytest.fixture
def show(page: Any) -> Any:
    """Open a file in the browser and wait until it is drawn."""

    def open_file(path: Path | str) -> Any:
        page.complaints()
        page.open(f"file://{path}")
        page.evaluate("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
        return page

    yield open_file
    page.call("Page.navigate", url="about:blank")
