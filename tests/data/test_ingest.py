from __future__ import annotations

import struct
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ingesting import encode, examples, files, make, photo, quarantine
from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings
from manyeyes.data.manifest import Manifest
from manyeyes.engines.local import LocalEngine
from manyeyes.errors import DatasetError, Reason, UsageError


def test_a_folder_becomes_a_dataset_in_which_every_image_has_its_label(photos, tmp_path):
    result = make(photos, tmp_path / "d")
    assert result.num_seen == result.num_written == 60 and not result.was_complete
    assert result.written == {"train": 48, "val": 6, "test": 6}
    rows = list(examples(result.dataset))
    assert sorted(path for _, path, *_ in rows) == sorted(f"{'abc'[n % 3]}/{n:03d}.jpg" for n in range(60))
    opened = Dataset(result.dataset)
    assert opened.class_names == ("a", "b", "c") and opened.image_shape == (16, 16, 3)
    for _, path, label, image, _ in rows:
        assert opened.class_names[label] == path[0]
        assert np.array_equal(image, opened.preprocessing(Path(photos, path).read_bytes()))
    assert Counter((split, label) for split, _, label, *_ in rows)["val", 0] == 2
    assert [path for _, path, *_ in rows] != sorted(path for _, path, *_ in rows)


def corrupt_tree(root: Path) -> dict[str, Reason]:
    """180 good images and one bad for each reason, twice; returns path -> reason of the bad."""
    for number in range(180):
        path = root / "abc"[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(photo(number)))
    good = encode(photo(1000, 200, 300))
    bad: dict[str, Reason] = {}
    bomb = bytearray(encode(photo(1), ".png"))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)
    bomb[29:33] = struct.pack(">I", __import__("zlib").crc32(bomb[12:29]))
    contents = {
        "empty.jpg": (b"", Reason.EMPTY),
        "text.jpg": (b"<html>404</html>", Reason.NOT_AN_IMAGE),
        "icon.ico": (b"\0\0\x01\0" + bytes(60), Reason.UNSUPPORTED_FORMAT),
        "cut.jpg": (good[: len(good) // 2], Reason.TRUNCATED),
        "bomb.png": (bytes(bomb), Reason.TOO_MANY_PIXELS),
        "flipped.png": (flip(encode(photo(2, 50, 60), ".png")), Reason.CORRUPT),
    }
    for name, (content, reason) in contents.items():
        for folder in "ab":
            (root / folder / name).write_bytes(content)
            bad[f"{folder}/{name}"] = reason
    for number in range(3):
        (root / "c" / f"link{number}.jpg").symlink_to(root / "nowhere")
        bad[f"c/link{number}.jpg"] = Reason.UNREADABLE
        (root / f"root{number}.jpg").write_bytes(good)
        bad[f"root{number}.jpg"] = Reason.MISSING_LABEL
    for number in range(2):
        (root / "z").mkdir(exist_ok=True)
        (root / "z" / f"{number}.jpg").write_bytes(good)
        bad[f"z/{number}.jpg"] = Reason.UNKNOWN_LABEL
        (root / "a" / f"notes{number}.txt").write_text("x")
    return bad


def flip(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 0xFF
    return bytes(changed)


def test_counts_balance_when_a_tenth_of_the_images_is_corrupt(tmp_path):
    (tmp_path / "s").mkdir()
    bad = corrupt_tree(tmp_path / "s")
    result = make(tmp_path / "s", tmp_path / "d", IngestSettings(size=(16, 16), class_names=("a", "b", "c")))
    assert result.num_seen == 180 + len(bad) + 2
    assert result.num_written == 180
    assert result.quarantined == {reason.value: n for reason, n in sorted(Counter(bad.values()).items())}
    assert result.skipped == {"not_an_image_name": 2}
    rows = quarantine(result.dataset)
    assert {path: row["reason"] for path, row in rows.items()} == {path: reason.value for path, reason in bad.items()}
    assert rows["a/text.jpg"]["bytes"] == b"<html>404</html>" and rows["a/text.jpg"]["label"] == "a"
    assert rows["c/link0.jpg"]["bytes"] is None
    assert not {path for _, path, *_ in examples(result.dataset)} & set(bad)
    assert Manifest.load(result.dataset).balances


def test_a_pixel_bomb_is_refused_by_its_header(photos, tmp_path):
    result = make(photos, tmp_path / "d", IngestSettings(size=(16, 16), max_pixels=599))
    assert result.quarantined == {"too_many_pixels": 60} and result.num_written == 0
    assert make(photos, tmp_path / "e", IngestSettings(size=(16, 16), max_pixels=600)).num_written == 60


def test_large_originals_are_not_kept_in_quarantine(tmp_path):
    for label in "ab":
        (tmp_path / "s" / label).mkdir(parents=True)
        (tmp_path / "s" / label / "ok.jpg").write_bytes(encode(photo(1)))
    (tmp_path / "s" / "a" / "small.jpg").write_bytes(bytes(64 * 1024))
    (tmp_path / "s" / "a" / "large.jpg").write_bytes(bytes(64 * 1024 + 1))
    make(tmp_path / "s", tmp_path / "d")
    rows = quarantine(tmp_path / "d")
    assert len(rows["a/small.jpg"]["bytes"]) == 64 * 1024 and rows["a/large.jpg"]["bytes"] is None


@pytest.mark.slow
def test_the_bytes_are_the_same_for_any_number_of_workers(photos, tmp_path):
    make(photos, tmp_path / "inline")
    for num_workers in (1, 2, 4):
        make(photos, tmp_path / str(num_workers), engine=LocalEngine(num_workers))
        assert files(tmp_path / str(num_workers)) == files(tmp_path / "inline")


def test_a_second_run_changes_nothing_and_other_arguments_are_refused(photos, tmp_path):
    make(photos, tmp_path / "d")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")}
    again = make(photos, tmp_path / "d")
    assert again.was_complete and again.num_written == 60
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "d").rglob("*")} == before
    other = IngestSettings(size=(18, 18))
    with pytest.raises(UsageError, match=r"other arguments \(size: \[16, 16\], now \[18, 18\]\).*--overwrite"):
        make(photos, tmp_path / "d", other)
    replaced = make(photos, tmp_path / "d", IngestSettings(size=(18, 18), overwrite=True))
    assert replaced.image_shape == (18, 18, 3)
    make(photos, tmp_path / "fresh", other)
    assert files(tmp_path / "d") == files(tmp_path / "fresh")


def test_the_seed_changes_splits_and_order_but_not_the_images(photos, tmp_path):
    make(photos, tmp_path / "a")
    make(photos, tmp_path / "b", IngestSettings(size=(16, 16), seed=1))
    first, second = list(examples(str(tmp_path / "a"))), list(examples(str(tmp_path / "b")))
    assert {path for _, path, *_ in first} == {path for _, path, *_ in second}
    assert {path for split, path, *_ in first if split == "val"} != {
        path for split, path, *_ in second if split == "val"
    }


def test_without_shuffle_the_order_is_that_of_the_source(photos, tmp_path):
    make(photos, tmp_path / "d", IngestSettings(size=(16, 16), shuffle=False))
    for split in ("train", "val", "test"):
        paths = [path for of, path, *_ in examples(str(tmp_path / "d")) if of == split]
        assert paths == sorted(paths)


def test_a_flipped_byte_in_a_shard_is_an_error_when_it_is_read(photos, tmp_path):
    make(photos, tmp_path / "d")
    path = tmp_path / "d" / "shards" / "train-00000.parquet"
    path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(DatasetError, match="fails its checksum"):
        list(Dataset(str(tmp_path / "d")).rows(Dataset(str(tmp_path / "d")).manifest.shards[0]))
    with pytest.raises(DatasetError, match="fails its checksum"):
        Dataset(str(tmp_path / "d"), verify="full")


# Splits


def table_source(root: Path, rows: list[tuple[str, str | None, str | None]]) -> Path:
    """A CSV of (label, group, split) over one image."""
    root.mkdir()
    (root / "x.png").write_bytes(encode(photo(0), ".png"))
    lines = ["path,label,group,split", *(f"x.png,{label},{group or ''},{split or ''}" for label, group, split in rows)]
    (root / "t.csv").write_text("\n".join(lines))
    return root / "t.csv"


def test_no_group_straddles_two_splits(tmp_path):
    draw = np.random.default_rng(0)
    rows = [("ab"[draw.integers(2)], f"patient {draw.integers(40)}", None) for _ in range(400)]
    result = make(table_source(tmp_path / "s", rows), tmp_path / "d")
    splits: dict[str, set[str]] = {}
    for split, _, _, _, group in examples(result.dataset):
        splits.setdefault(group, set()).add(split)
    assert all(len(found) == 1 for found in splits.values()) and len(splits) == 40
    assert abs(result.written["train"] - 320) < 12 and abs(result.written["val"] - 40) < 12


def test_a_group_follows_its_entry_that_the_source_holds_out(tmp_path):
    held_out = {f"patient {n}": "val" if n < 20 else "test" for n in range(40)}
    rows = [
        ("ab"[n % 2], f"patient {n // 4}", held_out[f"patient {n // 4}"] if n % 4 == 3 else None) for n in range(160)
    ]
    result = make(table_source(tmp_path / "s", rows), tmp_path / "d")
    splits: dict[str, set[str]] = {}
    for split, _, _, _, group in examples(result.dataset):
        splits.setdefault(group, set()).add(split)
    assert splits == {group: {split} for group, split in held_out.items()}


def test_the_splits_of_the_source_are_kept_and_a_missing_val_is_cut_from_train(tmp_path):
    rows = [("ab"[n % 2], None, "test" if n % 4 < 2 else ("train" if n % 8 < 4 else None)) for n in range(400)]
    result = make(table_source(tmp_path / "s", rows), tmp_path / "d")
    assert result.written == {"train": 180, "val": 20, "test": 200}
    rows = [("ab"[n % 2], None, "val" if n % 4 < 2 else None) for n in range(400)]
    assert make(table_source(tmp_path / "s2", rows), tmp_path / "d2").written == {"train": 200, "val": 200}


# Other file systems


def test_source_and_dataset_may_lie_on_any_file_system(photos, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in Path(photos).rglob("*.jpg"):
        memory.pipe_file(f"/photos/{path.relative_to(photos)}", path.read_bytes())
    memory.pipe_file("/photos/.hidden", b"")
    result = make("memory://photos", "memory://dataset")
    assert result.num_written == 60 and result.skipped == {"hidden_file": 1}
    make(photos, tmp_path / "d")
    here = [row[:3] for row in examples(str(tmp_path / "d"))]
    assert [row[:3] for row in examples("memory://dataset")] == here
    assert make("memory://photos", "memory://dataset").was_complete
    assert not memory.exists("/dataset/.ingest")
