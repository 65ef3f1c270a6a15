"""An ingest keeps near-duplicates in one split, whatever was dealt to them first."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyeyes.data import mending
from manyeyes.data.dataset import Dataset
from manyeyes.data.duplicates import ChosenRows, find_duplicates
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.data.manifest import ShardInfo
from manyeyes.data.shards import ShardWriter
from manyeyes.data.splits import is_torn, join_torn
from manyeyes.engines.inline import InlineEngine
from manyeyes.engines.registry import create_engine
from manyeyes.errors import UsageError
from manyeyes.imaging.decode import DecodeLimits

NUM_PICTURES = 36
NUM_VERSIONS = 4


def picture(seed: int) -> np.ndarray:
    """Unlike any of another seed: 9 x 12 random colours, smoothly joined."""
    cells = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return cv2.resize(cells, (96, 72), interpolation=cv2.INTER_CUBIC)


def write(path: Path, image: np.ndarray, quality: int = 95) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, quality])


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """36 pictures in three classes, a third of them in four versions, and one file that is none."""
    root = tmp_path_factory.mktemp("versions")
    for number in range(NUM_PICTURES):
        for version in range(NUM_VERSIONS if number < 12 else 1):
            write(root / "abc"[number % 3] / f"{number:02}-{version}.jpg", picture(number), 95 - 12 * version)
    (root / "a" / "bad.jpg").write_bytes(b"bad")
    return root


def rows_of(dataset: str) -> list[tuple[str, str, str | None]]:
    """(path, split, group) of all examples, where the manifest and the shard's own column agree on the split."""
    opened = Dataset(dataset, verify="full")
    rows = []
    for shard in opened.manifest.shards:
        table = pq.read_table(opened.shard_uri(shard)).to_pydict()
        assert set(table["split"]) == {shard.split}
        rows += [
            (image["path"], shard.split, group) for image, group in zip(table["image"], table["group"], strict=True)
        ]
    return rows


def splits_by(rows, key) -> dict[str, set[str]]:
    found = collections.defaultdict(set)
    for row in rows:
        found[key(row)].add(row[1])
    return found


def files_of(dataset) -> dict[str, bytes]:
    return {str(p.relative_to(dataset)): p.read_bytes() for p in sorted(Path(dataset).rglob("*")) if p.is_file()}


@pytest.mark.parametrize("size", [None, (24, 32)], ids=["jpeg", "raw"])
def test_all_versions_of_a_picture_come_to_one_split_and_the_counts_balance(versions, tmp_path, size):
    dealt, kept = str(tmp_path / "dealt"), str(tmp_path / "kept")
    without = ingest(
        str(versions), dealt, settings=IngestSettings(size=size, group_duplicates=False), engine=InlineEngine()
    )
    result = ingest(str(versions), kept, settings=IngestSettings(size=size), engine=InlineEngine())
    pictures = splits_by(rows_of(dealt), lambda row: row[0].partition("-")[0])
    assert any(len(splits) > 1 for splits in pictures.values()), "nothing was torn: this test says nothing"
    rows = rows_of(kept)
    assert all(len(splits) == 1 for splits in splits_by(rows, lambda row: row[0].partition("-")[0]).values())
    assert sorted(path for path, *_ in rows) == sorted(path for path, *_ in rows_of(dealt))
    before = {path: split for path, split, _ in rows_of(dealt)}
    assert result.num_moved == sum(before[path] != split for path, split, _ in rows) > 0
    manifest = Dataset(kept).manifest
    assert manifest.balances and result.quarantined == {"not_an_image": 1} and result.num_written == without.num_written
    assert set(result.written) == {"train", "val", "test"} and not result.remarks
    # No example of a picture that is alone has moved.
    assert all(before[path] == split for path, split, _ in rows if int(path[2:4]) >= 12)
    # Nothing is left of the shards that were written first.
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["manifest.json", "quarantine", "shards"]
    assert {shard.name for shard in manifest.shards} == {p.name for p in (tmp_path / "kept" / "shards").iterdir()}
    clusters = find_duplicates(Dataset(kept), InlineEngine()).clusters
    split_of = np.concatenate([[shard.split] * shard.num_rows for shard in manifest.shards])
    assert all(len(set(split_of[clusters == each])) == 1 for each in np.unique(clusters[clusters >= 0]))


def test_rows_that_move_keep_their_image_label_size_and_hash(versions, tmp_path):
    def content(dataset):
        found = {}
        for path in sorted(Path(dataset, "shards").iterdir()):
            for row in pq.read_table(path).to_pylist():
                del row["split"]
                found[row["image"]["path"]] = row
        return found

    for name, duplicates in (("dealt", False), ("kept", True)):
        settings = IngestSettings(group_duplicates=duplicates)
        ingest(str(versions), str(tmp_path / name), settings=settings, engine=InlineEngine())
    assert content(tmp_path / "kept") == content(tmp_path / "dealt")


@pytest.mark.slow
def test_any_engine_mends_to_the_same_bytes(versions, tmp_path):
    found = []
    for name, engine in (
        ("inline", InlineEngine()),
        ("one", create_engine("local", 1)),
        ("two", create_engine("local", 2)),
    ):
        ingest(str(versions), str(tmp_path / name), engine=engine)
        found.append(files_of(tmp_path / name))
    assert found[0] == found[1] == found[2]


class StopsInMending(InlineEngine):
    """As if the machine went down after some of the shards were written again."""

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks

    def map(self, fn, items, *, on_result=None):
        if getattr(fn, "func", None) is not mending.write_again:
            return super().map(fn, items, on_result=on_result)
        for _, item in zip(range(self.num_tasks), items, strict=False):
            fn(item)
        raise KeyboardInterrupt


@pytest.mark.parametrize("num_tasks", [0, 2])
def test_an_ingest_that_is_stopped_in_mending_goes_on_to_the_same_bytes(versions, tmp_path, num_tasks):
    ingest(str(versions), str(tmp_path / "whole"), engine=InlineEngine())
    stopped = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        ingest(str(versions), str(stopped), engine=StopsInMending(num_tasks))
    assert not (stopped / "manifest.json").exists()
    before = {path.name: path.stat().st_mtime_ns for path in (stopped / "shards").iterdir()}
    ingest(str(versions), str(stopped), engine=InlineEngine())
    assert files_of(stopped) == files_of(tmp_path / "whole")
    # What was written is not written again.
    after = {path.name: path.stat().st_mtime_ns for path in (stopped / "shards").iterdir()}
    assert all(after[name] == time for name, time in before.items() if name in after)
    again = ingest(str(versions), str(stopped), engine=InlineEngine())
    assert again.was_complete


def test_an_unfinished_ingest_goes_on_without_looking_for_near_duplicates(versions, tmp_path):
    apart = IngestSettings(group_duplicates=False)
    ingest(str(versions), str(tmp_path / "apart"), settings=apart, engine=InlineEngine())
    with pytest.raises(KeyboardInterrupt):
        ingest(str(versions), str(tmp_path / "d"), engine=StopsInMending(2))
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d" / "shards").iterdir()}
    ingest(str(versions), str(tmp_path / "d"), settings=apart, engine=InlineEngine())
    assert files_of(tmp_path / "d") == files_of(tmp_path / "apart")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d" / "shards").iterdir()}
    assert after and all(before[name] == time for name, time in after.items())


def test_a_dataset_of_before_there_was_the_setting_is_one_in_which_each_was_dealt_alone(versions, tmp_path):
    apart = IngestSettings(group_duplicates=False)
    ingest(str(versions), str(tmp_path / "d"), settings=apart, engine=InlineEngine())
    path = tmp_path / "d" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["settings"]["group_duplicates"]
    path.write_text(json.dumps(manifest))
    assert ingest(str(versions), str(tmp_path / "d"), settings=apart, engine=InlineEngine()).was_complete
    with pytest.raises(UsageError, match=r"other arguments \(group_duplicates: False, now True\)"):
        ingest(str(versions), str(tmp_path / "d"), engine=InlineEngine())


@pytest.mark.parametrize("max_bytes", [1 << 30, 9_000])
def test_rewritten_shards_have_full_row_groups_unless_images_are_very_large(versions, tmp_path, monkeypatch, max_bytes):
    ingest(str(versions), str(tmp_path / "d"), settings=IngestSettings(group_duplicates=False), engine=InlineEngine())
    dataset = Dataset(str(tmp_path / "d"))
    shards = dataset.split("train").shards
    # As from many shards, each of which gives up one row.
    parts = tuple(ChosenRows(shard, np.array([row])) for shard in shards for row in range(0, shard.num_rows, 2))
    writer = ShardWriter(
        dataset.uri, "jpeg", dataset.preprocessing, DecodeLimits(), dataset.class_names, row_group_rows=4, seed=0
    )
    monkeypatch.setattr(mending, "MAX_ROW_GROUP_BYTES", max_bytes)
    record = mending.write_again(dataset, writer, mending.RewriteTask("train-again", "val", parts))
    table = pq.read_table(tmp_path / "d" / "shards" / "train-again.parquet").to_pydict()
    expected = [
        path
        for part in parts
        for path in np.array([row for rows in dataset.rows(part.shard) for row in rows.paths])[part.rows]
    ]
    assert [image["path"] for image in table["image"]] == expected and set(table["split"]) == {"val"}
    sizes = record.shard.row_group_rows
    assert sum(sizes) == len(expected) == record.shard.num_rows > 20
    if max_bytes == 1 << 30:
        assert set(sizes[:-1]) == {4}
    else:
        largest = max(len(image["bytes"]) for image in table["image"])
        assert largest < max_bytes and 1 < max(sizes) < 4
    assert record.written == {str(label): table["label"].count(label) for label in range(3)}


def test_moved_rows_come_in_shards_no_larger_than_others_and_need_a_bounded_number_of_row_groups():
    shards = [ShardInfo(f"train-{i}.parquet", "train", (100, 100), 1000, f"{i}") for i in range(30)]
    parts = [ChosenRows(shard, np.array([3, 4, 150])) for shard in shards]
    (alone,) = mending._of_moved("val", parts, shards)
    assert alone.parts == tuple(parts) and alone.name == "val-moved-00000"
    by_rows = list(mending._of_moved("val", parts, [ShardInfo("a", "train", (10,), 10**6, "")]))
    assert [len(task.parts) for task in by_rows] == [3] * 10
    by_bytes = list(mending._of_moved("val", parts, [ShardInfo("a", "train", (10**6,), 75, "")]))
    assert [len(task.parts) for task in by_bytes] == [5] * 6
    assert [task.name for task in by_bytes[:2]] == ["val-moved-00000", "val-moved-00001"]
    many = parts * 20
    assert (
        max(len(task.parts) for task in mending._of_moved("val", many, [ShardInfo("a", "t", (10**6,), 10**6, "")]))
        == 256
    )


def table(root: Path, rows: list[dict]) -> str:
    (root / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(root / "table.jsonl")


def test_groups_that_share_a_picture_stay_together(tmp_path):
    rows = []
    for number in range(60):
        for version in range(2):
            write(tmp_path / f"{number:02}-{version}.jpg", picture(number), 95 - 20 * version)
            # The two versions of each of the first twelve pictures are in two groups of five pictures each.
            group = f"g{version}{number // 5}" if number < 30 else None
            rows.append({"path": f"{number:02}-{version}.jpg", "label": "abc"[number % 3], "group": group})
    ingest(table(tmp_path, rows), str(tmp_path / "d"), engine=InlineEngine())
    found = rows_of(str(tmp_path / "d"))
    assert len(found) == 120
    assert all(len(splits) == 1 for splits in splits_by(found, lambda row: row[0][:2]).values())
    grouped = [row for row in found if row[2] is not None]
    assert all(len(splits) == 1 for splits in splits_by(grouped, lambda row: row[2]).values())
    assert {split for _, split, _ in found} == {"train", "val", "test"}


def test_the_test_split_of_a_source_is_left_as_it_is(tmp_path):
    rows = []
    for number in range(40):
        for version in range(3):
            write(tmp_path / f"{number:02}-{version}.jpg", picture(number), 95 - 20 * version)
            split = {"split": "test" if version == 2 else "train"}
            rows.append({"path": f"{number:02}-{version}.jpg", "label": "ab"[number % 2], **split})
    result = ingest(table(tmp_path, rows), str(tmp_path / "d"), engine=InlineEngine())
    found = rows_of(str(tmp_path / "d"))
    assert {path for path, split, _ in found if split == "test"} == {f"{number:02}-2.jpg" for number in range(40)}
    ours = [row for row in found if row[1] != "test"]
    assert result.num_moved > 0 and {split for _, split, _ in ours} == {"train", "val"}
    (remark,) = result.remarks
    assert remark.startswith("80 examples have near-duplicates in test, as the source has it.")
    assert all(len(splits) == 1 for splits in splits_by(ours, lambda row: row[0][:2]).values())


def test_splits_that_would_be_empty_stay_as_dealt_and_people_are_told(tmp_path):
    for number in range(40):
        write(tmp_path / "src" / "ab"[number % 2] / f"{number:02}.jpg", picture(0), 95 - number)
    result = ingest(str(tmp_path / "src"), str(tmp_path / "d"), engine=InlineEngine())
    assert result.num_moved == 0 and set(result.written) == {"train", "val", "test"}
    (remark,) = result.remarks
    assert "would leave val and test empty" in remark


def test_a_class_of_one_picture_is_named_where_it_is_missing(tmp_path):
    for number in range(60):
        write(tmp_path / "src" / "various" / f"{number:02}.jpg", picture(number))
        write(tmp_path / "src" / "same" / f"{number:02}.jpg", picture(99), 95 - number)
    result = ingest(str(tmp_path / "src"), str(tmp_path / "d"), engine=InlineEngine())
    lost = [remark for remark in result.remarks if "no example of 1 of 2 classes (same)" in remark]
    assert [remark.split()[0] for remark in lost] == ["val", "test"]
    # Whoever asks again is told again.
    again = ingest(str(tmp_path / "src"), str(tmp_path / "d"), engine=InlineEngine())
    assert again.was_complete and (again.num_moved, again.remarks) == (result.num_moved, result.remarks)
    assert result.num_moved > 0 and again.num_seen == again.num_written == 120


def test_a_class_of_one_picture_is_trained_on_however_small_the_share_of_train(tmp_path):
    for number in range(30):
        write(tmp_path / "src" / "various" / f"{number:02}.jpg", picture(number))
    for number in range(9):
        write(tmp_path / "src" / "same" / f"{number:02}.jpg", picture(99), 95 - number)
    settings = IngestSettings(val=0.45, test=0.45)
    ingest(str(tmp_path / "src"), str(tmp_path / "d"), settings=settings, engine=InlineEngine())
    written = Dataset(str(tmp_path / "d")).manifest.counts.written
    assert {split: counts[0] for split, counts in written.items()} == {"train": 9, "val": 0, "test": 0}


def test_a_split_that_loses_most_of_its_examples_is_named(tmp_path):
    for number in range(50):
        for label, same in (("a", 98), ("b", 99)):
            write(tmp_path / "src" / label / f"{number:02}-same.jpg", picture(same), 95 - number)
            if number < 12:
                write(tmp_path / "src" / label / f"{number:02}.jpg", picture(100 * same + number))
    result = ingest(str(tmp_path / "src"), str(tmp_path / "d"), engine=InlineEngine())
    assert 0 < result.written["val"] < 6 and result.num_written == 124
    assert f"val has {result.written['val']} examples, where 12 were dealt to it" in result.remarks[0]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2), st.integers(0, 3)), min_size=1, max_size=80))
def test_joined_units_lie_in_one_split_each_and_others_do_not_move(rows):
    units, splits, labels = (np.array(column) for column in zip(*rows, strict=True))
    torn = np.flatnonzero(is_torn(units, splits))
    joined = splits.copy()
    keys = [str(row) for row in torn]
    joined[torn] = join_torn(torn, units[torn], labels, splits, ("train", "val", "test"), keys)
    assert not is_torn(units, joined).any()
    for unit in np.unique(units):
        before = splits[units == unit]
        if len(np.unique(before)) == 1:
            assert (joined[units == unit] == before).all()
