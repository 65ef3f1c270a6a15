from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import manyeyes
from manyeyes import storage
from manyeyes.cli.main import app
from manyeyes.data.dataset import Dataset
from manyeyes.data.splits import is_torn
from manyeyes.engines.registry import create_engine
from manyeyes.errors import DataError, UsageError


def rows_of(dataset: str) -> dict[str, tuple[str, str]]:
    """File name -> (split, class) of every example."""
    data = Dataset(dataset)
    return {
        path.rsplit("/", 1)[-1]: (shard.split, data.class_names[label])
        for shard in data.manifest.shards
        for group in data.rows(shard)
        for path, label in zip(group.paths, group.labels.tolist(), strict=True)
    }


@pytest.fixture(scope="module")
def mended(messy, tmp_path_factory):
    before = {path: storage.sha256_of_file(str(path)) for path in Path(messy).rglob("*") if path.is_file()}
    out = str(tmp_path_factory.mktemp("fix") / "mended")
    result = manyeyes.audit(messy, engine=create_engine("inline"), fix=out)
    assert before == {path: storage.sha256_of_file(str(path)) for path in Path(messy).rglob("*") if path.is_file()}
    return result


def test_the_mended_dataset_has_no_copies_and_nothing_that_straddles(mended):
    again = manyeyes.audit(mended.fixed.dataset, engine=create_engine("inline"))
    assert not again.leaks and not again.straddling_groups and again.num_copies == 0
    assert mended.leaks and mended.straddling_groups and mended.num_copies


def test_counts_balance_and_every_change_is_listed_with_its_reason(mended, messy):
    fixed = mended.fixed
    assert fixed.left_out == {"exact_copy": 2, "conflicting_labels": 2}
    assert fixed.num_examples + 4 == mended.num_examples == len(rows_of(messy))
    assert fixed.num_examples == sum(fixed.written.values()) == Dataset(fixed.dataset).manifest.counts.num_written
    assert Dataset(fixed.dataset).manifest.balances
    before, after = rows_of(messy), rows_of(fixed.dataset)
    changes = [json.loads(line) for line in Path(fixed.changes).read_text().splitlines()]
    listed = {change["path"].rsplit("/", 1)[-1]: change for change in changes}
    changed = {name for name in before if after.get(name, (None,))[0] != before[name][0]}
    assert set(listed) == changed and len(changes) == len(listed)
    for name, change in listed.items():
        assert change["from"] == before[name][0] and change["to"] == after.get(name, (None,))[0]
    assert Counter(change["reason"] for change in changes) == {
        "exact_copy": 2,
        "conflicting_labels": 2,
        "straddles_splits": fixed.num_moved,
    }


def test_of_copies_the_held_out_one_stays_and_of_conflicting_ones_none(mended):
    after = rows_of(mended.fixed.dataset)
    assert after["copy.png"] == ("test", "cat") and "00.png" not in after
    assert "04.png" not in after and "other label é.png" not in after
    assert ("flat 1.png" in after) + ("flat 2.png" in after) == 1
    assert after["02.png"][0] == after["again.jpg"][0] and after["scene 1.png"][0] == after["scene 2.png"][0]


def test_the_mended_dataset_does_not_depend_on_the_order_of_examples(mended, make_dataset, tmp_path):
    other = make_dataset("messy", seed=9)
    result = manyeyes.audit(other, engine=create_engine("inline"), fix=str(tmp_path / "mended"))
    assert rows_of(result.fixed.dataset) == rows_of(mended.fixed.dataset)


def test_a_directory_that_is_not_empty_is_not_written_to(messy, clean):
    with pytest.raises(UsageError, match="is not empty"):
        manyeyes.audit(messy, engine=create_engine("inline"), fix=clean)


def test_a_mended_dataset_that_would_be_empty_is_refused_and_nothing_is_written(make_dataset, tmp_path):
    conflicting = make_dataset("conflicting", size=(48, 48), val=0, test=0)
    with pytest.raises(DataError, match=r"Nothing .* would be left: each of its 8 examples .* Correct the labels"):
        manyeyes.audit(conflicting, engine=create_engine("inline"), fix=str(tmp_path / "mended"))
    assert not (tmp_path / "mended").exists()


def test_splits_and_classes_that_mending_empties_are_named(make_dataset, mended, tmp_path):
    command = [
        "audit",
        make_dataset("emptying", size=(48, 48)),
        "--engine",
        "inline",
        "--fix",
        str(tmp_path / "mended"),
    ]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    assert "Nothing is left in test." in done.stdout
    assert "In train no example is left of bird." in done.stdout
    assert "In val no example is left of bird, fish." in done.stdout
    assert "Next: manyeyes train" in done.stdout
    assert mended.fixed.emptied == {}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), min_size=1, max_size=60))
def test_a_unit_is_torn_if_its_examples_have_several_splits(rows):
    units, splits = np.array([unit for unit, _ in rows]), np.array([split for _, split in rows])
    expected = [len({split for unit, split in rows if unit == own}) > 1 for own, _ in rows]
    assert is_torn(units, splits).tolist() == expected
