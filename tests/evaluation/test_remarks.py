"""An evaluation says where its figures flatter the model, and where its intervals are too narrow."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyeyes.data.dataset import Dataset
from manyeyes.data.manifest import Manifest
from manyeyes.data.view import ViewRows, write_view
from manyeyes.engines.inline import InlineEngine
from manyeyes.evaluation import tasks
from manyeyes.evaluation.evaluate import EvaluationResult, evaluate
from manyeyes.evaluation.tables import tables
from manyeyes.report.build import gather
from manyeyes.report.subject import open_subject


def measured(model: str, dataset: str, out: Path, split: str = "test") -> EvaluationResult:
    return evaluate(model, dataset, split=split, out=str(out), engine=InlineEngine())


def view_with_some_of_train_in_test(dataset: str, out: Path) -> str:
    """As `audit --fix` makes it where near-duplicates lie in both: 7 of train come into test."""
    data = Dataset(dataset)
    rows = []
    for shard in data.manifest.shards:
        labels = np.concatenate([group.labels for group in data.rows(shard)])
        splits = np.full(len(labels), shard.split, dtype="U5")
        if shard.split == "train":
            splits[10:17] = "test"
        rows.append(ViewRows(shard, labels, splits))
    write_view(data, str(out), rows)
    return str(out)


@pytest.mark.parametrize("kind", ["run", "bundle"])
def test_a_model_that_was_trained_on_what_it_is_measured_on_is_said(
    kind, small_run, small_bundle, small_dataset, tmp_path
):
    model = small_run if kind == "run" else small_bundle
    assert measured(model, small_dataset, tmp_path / "own").remarks == ()
    view = view_with_some_of_train_in_test(small_dataset, tmp_path / "view")
    found = measured(model, view, tmp_path / "moved")
    (remark,) = found.remarks
    assert remark.startswith("The model was trained on 7 of these 37 examples: the figures flatter it.")
    assert remark in list(tables(found))
    assert remark in gather(open_subject(str(tmp_path / "moved")), explain_seconds=0).notices
    (remark,) = measured(model, small_dataset, tmp_path / "train", "train").remarks
    assert "trained on 96 of these 96 examples" in remark
    assert measured(model, view, tmp_path / "val", "val").remarks == ()


def test_a_view_of_what_a_run_was_trained_on_is_doubted_when_that_is_gone(small_run, small_dataset, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    values = json.loads((run / "config.json").read_text())
    values |= {"dataset": str(tmp_path / "gone"), "dataset_fingerprint": "0" * 16}
    (run / "config.json").write_text(json.dumps(values))
    view = view_with_some_of_train_in_test(small_dataset, tmp_path / "view")
    (remark,) = measured(str(run), view, tmp_path / "out").remarks
    assert remark.startswith("Whether the model was trained on some of these examples is not known")
    assert measured(str(run), small_dataset, tmp_path / "other").remarks == ()


def with_groups(dataset: str, out: Path, groups: list[str | None]) -> str:
    shutil.copytree(dataset, out)
    file = out / "shards" / "test-00000.parquet"
    table = pq.read_table(file)
    table = table.set_column(table.schema.get_field_index("group"), "group", pa.array(groups, pa.string()))
    pq.write_table(table, file, row_group_size=16, use_dictionary=False, write_page_checksum=True)
    content = file.read_bytes()
    manifest = Manifest.load(str(out))
    shards = tuple(
        dataclasses.replace(shard, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
        if shard.split == "test"
        else shard
        for shard in manifest.shards
    )
    dataclasses.replace(manifest, shards=shards).save(str(out))
    return str(out)


def test_groups_of_examples_are_said_as_intervals_take_examples_for_independent(
    small_bundle, small_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(tasks, "TASK_EXAMPLES", 1)
    data = with_groups(small_dataset, tmp_path / "data", [f"patient {row % 4}" for row in range(28)] + [None, None])
    (remark,) = measured(small_bundle, data, tmp_path / "out").remarks
    assert remark.startswith("28 examples are of 4 groups. Intervals take examples for independent")
    monkeypatch.setattr(tasks, "MAX_GROUPS", 2)
    monkeypatch.setattr("manyeyes.evaluation.remarks.MAX_GROUPS", 2)
    (remark,) = measured(small_bundle, data, tmp_path / "out").remarks
    assert remark.startswith("28 examples are of more than 2 groups.")
    alone = with_groups(small_dataset, tmp_path / "alone", [f"patient {row}" for row in range(30)])
    monkeypatch.setattr(tasks, "MAX_GROUPS", 100)
    assert measured(small_bundle, alone, tmp_path / "out").remarks == ()
