from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

import manyeyes
from manyeyes import storage
from manyeyes.cli.main import app
from manyeyes.engines.registry import create_engine
from manyeyes.errors import DatasetError, UsageError


def name(example) -> str:
    return example.path.rsplit("/", 1)[-1]


def names(clusters) -> set[frozenset[str]]:
    return {frozenset(map(name, cluster.examples)) for cluster in clusters}


@pytest.fixture(scope="module")
def audited(messy, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("audit") / "out")
    return manyeyes.audit(messy, engine=create_engine("inline"), out=out)


def test_every_planted_duplicate_and_leak_is_found_and_nothing_else(audited):
    assert names(audited.leaks) == {frozenset({"00.png", "copy.png"}), frozenset({"02.png", "again.jpg"})}
    assert names(audited.conflicts) == {frozenset({"04.png", "other label é.png"})}
    assert names(audited.clusters) == names(audited.leaks) | names(audited.conflicts) | {
        frozenset({"flat 1.png", "flat 2.png"})
    }
    assert {frozenset(map(name, c.examples)): c.all_copies for c in audited.leaks} == {
        frozenset({"00.png", "copy.png"}): True,
        frozenset({"02.png", "again.jpg"}): False,
    }
    assert (audited.num_copies, audited.num_near_duplicates, audited.num_flat) == (3, 1, 3)
    assert all(cluster.is_leak for cluster in audited.clusters[:2])  # the worst first


def test_groups_in_several_splits_are_named(audited):
    (group,) = audited.straddling_groups
    assert group.group == "scene" and group.num_examples == {"train": 1, "test": 1}


def test_tiny_and_missing_classes_are_named(audited):
    problems = {each.class_name: each.problems for each in audited.classes}
    assert problems == {"cat": (), "dog": (), "bird": ("missing_in_val", "missing_in_test", "few_in_train")}
    counts = {each.class_name: each.num_examples for each in audited.classes}
    assert counts["bird"] == {"train": 3, "val": 0, "test": 0}
    assert audited.imbalance == round(max(c["train"] for c in counts.values()) / 3, 4)


def test_odd_images_are_named_by_what_is_odd(audited):
    found = {(outlier.kind, name(outlier.example)) for outlier in audited.outliers}
    odd = {("dark", "dark.png"), ("blurred", "dark.png"), ("blurred", "blurred.png"), ("small", "small.png")}
    assert found == odd | {("wide", "wide.png")} | {("blurred", f"flat {i}.png") for i in (1, 2, 3)}
    wide = next(outlier for outlier in audited.outliers if outlier.kind == "wide")
    assert wide.value == 16 and wide.distance > 3 and audited.distributions["aspect"].high_fence < 16


def test_a_clean_dataset_has_no_findings(clean):
    result = manyeyes.audit(clean, engine=create_engine("inline"))
    assert result.num_examples == 48 and not result.clusters and not result.straddling_groups and not result.outliers
    # 36 of two classes to train on: balanced, and in every split.
    assert result.imbalance == 1 and not any(each.problems for each in result.classes)
    assert result.files == () and result.num_judged is None


def test_the_json_is_the_same_for_every_engine_order_and_cut_into_shards(audited, messy, make_dataset):
    def content(result):
        values = result.to_dict()
        for of_this_run in ("dataset", "dataset_fingerprint", "files"):
            del values[of_this_run]
        # Paths differ by where the source lay.
        return json.dumps(values, sort_keys=True).replace(source_of(result.dataset), "")

    def source_of(dataset):
        return storage.read_json(storage.join(dataset, "manifest.json"))["source"]["uri"].rsplit("/", 1)[0]

    expected = content(audited)
    assert content(manyeyes.audit(messy, engine=create_engine("local", 2))) == expected
    reordered = make_dataset("messy", seed=5)
    assert content(manyeyes.audit(reordered, engine=create_engine("inline"))) == expected


def test_out_holds_the_whole_result_and_sheets_that_show_the_images(audited):
    folder = Path(audited.files[0]).parent
    values = json.loads((folder / "audit.json").read_text())
    assert values == {key: value for key, value in json.loads(json.dumps(audited.to_dict())).items() if key != "files"}
    assert [Path(uri).name for uri in audited.files] == ["audit.json", "leaks.png", "duplicates.png", "outliers.png"]
    leaks = cv2.imread(str(folder / "leaks.png"))
    assert leaks is not None and leaks.shape[1] > 900
    # Two lines of two photos each: the first tile of a line is that of the second once more.
    height = (leaks.shape[0] - 8) // 2
    for top in (8, 8 + height):
        tiles = [leaks[top + 18 : top + 130, 8 + 120 * i : 120 + 120 * i].astype(int) for i in range(3)]
        assert tiles[0].std() > 15 and np.abs(tiles[0] - tiles[1]).mean() < 10
        assert (tiles[2] == 255).all()


def test_a_folder_that_is_no_dataset_and_a_distance_out_of_range_are_refused(messy, tmp_path):
    with pytest.raises(DatasetError, match="manyeyes ingest"):
        manyeyes.audit(str(tmp_path / "nothing"), engine=create_engine("inline"))
    with pytest.raises(UsageError, match="Use 0 to 8"):
        manyeyes.audit(messy, engine=create_engine("inline"), distance=-1)


def test_the_command_prints_tables_or_json(messy, clean):
    done = CliRunner().invoke(app, ["audit", messy, "--engine", "inline"], env={"COLUMNS": "300"})
    assert done.exit_code == 0, done.output
    for text in ("2 clusters of 4 examples", "other label é.png", "Groups in several splits: scene", "--fix"):
        assert text in done.stdout
    # In a process of its own: nothing but JSON on standard output.
    command = [sys.executable, "-m", "manyeyes.cli.main", "audit", clean, "--engine", "inline", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["num_examples"] == 48 and done.stderr == ""
