from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from collections import Counter
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings, ingest, parse_size, read_class_names
from manyeyes.data.manifest import Manifest
from manyeyes.engines.inline import InlineEngine
from manyeyes.engines.local import LocalEngine
from manyeyes.errors import DatasetError, Reason, SourceError, UsageError

SMALL = IngestSettings(size=(16, 16))


def photo(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return cv2.resize(draw.integers(0, 256, (4, 5, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image: np.ndarray, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, image[:, :, ::-1])[1].tobytes()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 clean JPEGs in three classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(60):
        path = root / "abc"[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(photo(number)))
    return str(root)


def make(source, dataset, settings=SMALL, engine=None):
    return ingest(str(source), str(dataset), settings=settings, engine=engine or InlineEngine())


def examples(dataset: str):
    """(split, path, label, image, group) of every row."""
    opened = Dataset(dataset, verify="full")
    for shard in opened.manifest.shards:
        for rows in opened.rows(shard):
            for i in range(len(rows)):
                yield shard.split, rows.paths[i], int(rows.labels[i]), rows.images[i], rows.groups[i]


def quarantine(dataset) -> dict[str, dict]:
    tables = [pq.read_table(path) for path in sorted(Path(dataset, "quarantine").glob("*.parquet"))]
    return {row["path"]: row for table in tables for row in table.to_pylist()}


def files(dataset) -> dict[str, bytes]:
    return {str(p.relative_to(dataset)): p.read_bytes() for p in sorted(Path(dataset).rglob("*")) if p.is_file()}


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


# Every kind of source


def write_sources(root: Path, images: list[np.ndarray], labels: list[int]) -> dict[str, Path]:
    encoded = [encode(image, ".png") for image in images]
    (root / "table").mkdir()
    rows, lines, tar_path = ["path,label"], [], root / "w" / "x.tar"
    tar_path.parent.mkdir()
    with tarfile.open(tar_path, "w") as tar:
        for number, (content, label) in enumerate(zip(encoded, labels, strict=True)):
            folder = root / "folder" / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{number:03d}.png").write_bytes(content)
            rows.append(f"../folder/{label}/{number:03d}.png,{label}")
            lines.append(json.dumps({"path": f"../folder/{label}/{number:03d}.png", "label": label}))
            for suffix, member in (("png", content), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    (root / "table" / "t.csv").write_text("\n".join(rows))
    (root / "table" / "t.jsonl").write_text("\n".join(lines))
    column = [{"bytes": content, "path": f"{number:03d}.png"} for number, content in enumerate(encoded)]
    table = pa.table({"image": column, "label": pa.array(labels, pa.int64())})
    (root / "p").mkdir()
    pq.write_table(table, root / "p" / "x.parquet", row_group_size=7)
    (root / "i").mkdir()
    pixels = np.stack(images)
    header = bytes([0, 0, 8, 4]) + struct.pack(">4i", *pixels.shape)
    (root / "i" / "images-idx4-ubyte.gz").write_bytes(gzip.compress(header + pixels.tobytes()))
    (root / "i" / "labels-idx1-ubyte").write_bytes(bytes([0, 0, 8, 1]) + struct.pack(">i", len(labels)) + bytes(labels))
    return {
        "folder": root / "folder",
        "csv": root / "table" / "t.csv",
        "jsonl": root / "table" / "t.jsonl",
        "webdataset": root / "w",
        "parquet": root / "p",
        "idx": root / "i",
    }


def test_every_kind_of_source_gives_the_same_pixels_for_the_same_images(tmp_path):
    images = [photo(number) for number in range(24)]
    labels = [number % 12 for number in range(24)]
    seen = {}
    for kind, source in write_sources(tmp_path, images, labels).items():
        result = make(source, tmp_path / f"{kind}.ds")
        assert result.num_written == 24, kind
        seen[kind] = sorted((label, image.tobytes()) for _, _, label, image, _ in examples(result.dataset))
        assert Dataset(result.dataset).class_names == tuple(map(str, range(12)))
    assert all(rows == seen["folder"] for rows in seen.values())


def test_class_names_name_integer_labels(tmp_path):
    names = tuple(f"class {chr(97 + n)}" for n in range(11))
    sources = write_sources(tmp_path, [photo(number) for number in range(24)], [number % 12 for number in range(24)])
    result = make(sources["csv"], tmp_path / "d", IngestSettings(size=(16, 16), class_names=names))
    assert result.quarantined == {"unknown_label": 2}
    assert Dataset(result.dataset).class_names == names
    assert all(int(path.split("/")[2]) == label for _, path, label, *_ in examples(result.dataset))


def test_grey_idx_images_are_stored_as_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 8, 9), np.uint8)
    (tmp_path / "s").mkdir()
    for prefix in ("train", "t10k"):
        header = bytes([0, 0, 8, 3]) + struct.pack(">3i", *pixels.shape)
        (tmp_path / "s" / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        labels = bytes([0, 0, 8, 1, 0, 0, 0, 40]) + bytes(n % 2 for n in range(40))
        (tmp_path / "s" / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    result = make(tmp_path / "s", tmp_path / "d", IngestSettings())
    assert result.encoding == "raw" and result.image_shape == (8, 9, 1)
    assert result.written == {"train": 36, "val": 4, "test": 40}
    for _, path, label, image, _ in examples(result.dataset):
        index = int(path.split("/")[1])
        assert label == index % 2 and np.array_equal(image[:, :, 0], pixels[index])
    # A recogniser takes the size of its input from here.
    assert Dataset(result.dataset).preprocessing.output_shape == (8, 9, 1)


# Encodings


def pillow(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_all_formats_and_colour_kinds_arrive_right(tmp_path):
    pixels = photo(5, 24, 32)
    image = Image.fromarray(pixels)
    half = image.copy()
    half.putalpha(128)
    turned = Image.Exif()
    turned[0x0112] = 6
    grey = np.asarray(image.convert("L"))
    blended = (pixels.astype(int) * 128 + 255 * 127 + 127) // 255
    cases = {
        "jpeg.jpg": (pillow(image, "JPEG", quality=98, subsampling=0), pixels, 12),
        "png.png": (pillow(image, "PNG"), pixels, 0),
        "webp.webp": (pillow(image, "WEBP", lossless=True), pixels, 0),
        "bmp.bmp": (pillow(image, "BMP"), pixels, 0),
        "tiff.tiff": (pillow(image, "TIFF", compression="tiff_lzw"), pixels, 0),
        "gif.gif": (pillow(image.quantize(256), "GIF"), pixels, 60),
        "grey.png": (pillow(image.convert("L"), "PNG"), np.repeat(grey[:, :, None], 3, 2), 0),
        "alpha.png": (pillow(half, "PNG"), blended, 1),
        "sixteen.png": (
            cv2.imencode(".png", pixels[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes(),
            pixels,
            0,
        ),
        "cmyk.jpg": (pillow(image.convert("CMYK"), "JPEG", quality=98, subsampling=0), pixels, 30),
        "turned.jpg": (
            pillow(image, "JPEG", quality=98, subsampling=0, exif=turned),
            np.rot90(pixels, -1),
            12,
        ),
    }
    for name, (content, _, _) in cases.items():
        for label in "ab":
            (tmp_path / "s" / label).mkdir(parents=True, exist_ok=True)
            (tmp_path / "s" / label / name).write_bytes(content)
    result = make(tmp_path / "s", tmp_path / "d", IngestSettings(val=0, test=0))
    assert result.encoding == "jpeg" and result.quarantined == {} and result.num_written == 2 * len(cases)
    opened = Dataset(result.dataset)
    table = pq.read_table(tmp_path / "d" / "shards" / "train-00000.parquet").to_pylist()
    for row in table:
        name = row["image"]["path"][2:]
        content, expected, tolerance = cases[name]
        assert row["image"]["bytes"] == content, name
        assert (row["height"], row["width"]) == expected.shape[:2], name
        decoded = opened.preprocessing(content)
        assert np.abs(decoded.astype(int) - expected).max() <= tolerance, name


def test_jpeg_encoding_with_a_size_stores_small_jpegs_near_the_raw_pixels(photos, tmp_path):
    raw = make(photos, tmp_path / "raw")
    jpeg = make(photos, tmp_path / "jpeg", IngestSettings(size=(16, 16), encoding="jpeg"))
    assert jpeg.encoding == "jpeg" and jpeg.image_shape == (16, 16, 3)
    pixels = {path: image for _, path, _, image, _ in examples(raw.dataset)}
    for _, path, _, encoded, _ in examples(jpeg.dataset):
        assert encoded[:3] == b"\xff\xd8\xff"
        decoded = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.abs(decoded.astype(int) - pixels[path]).mean() < 4


def test_grey_stays_grey_in_jpeg(photos, tmp_path):
    make(photos, tmp_path / "d", IngestSettings(size=(16, 16), encoding="jpeg", channels=1))
    encoded = next(examples(str(tmp_path / "d")))[3]
    assert cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED).shape == (16, 16)


def test_large_pixels_are_stored_as_jpeg_unless_told(photos, tmp_path):
    assert make(photos, tmp_path / "a", IngestSettings(size=(210, 210))).encoding == "jpeg"
    assert make(photos, tmp_path / "b", IngestSettings(size=(208, 208))).encoding == "raw"


def test_other_tools_find_images_and_class_names_in_a_shard(photos, tmp_path):
    make(photos, tmp_path / "d", IngestSettings())
    file = pq.ParquetFile(tmp_path / "d" / "shards" / "train-00000.parquet")
    features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"] == {"_type": "ClassLabel", "names": ["a", "b", "c"]}
    assert list(features) == ["image", "label", "group", "split", "phash", "width", "height"]
    assert file.schema_arrow.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = next(c for i in range(9) if (c := file.metadata.row_group(0).column(i)).path_in_schema == "image.bytes")
    assert column.compression == "UNCOMPRESSED" and "PLAIN" in column.encodings
    # And it can be a source again.
    again = make(tmp_path / "d" / "shards", tmp_path / "again", IngestSettings())
    assert again.num_written == 60 and again.written == {"train": 48, "val": 6, "test": 6}
    assert Dataset(again.dataset).class_names == ("a", "b", "c")


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


# Bad input


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "No images found"),
        ({"notes.txt": b""}, "No images found in .*1 not_an_image_name"),
        ({"a/x.jpg": b"", "a/y.jpg": b""}, "images of one class only. A classifier needs two or more"),
        ({"x.jpg": b""}, "None of the 1 images in .* has a usable label: 1 missing_label"),
    ],
)
def test_a_source_that_no_classifier_can_learn_from_is_refused(tmp_path, files, message):
    (tmp_path / "s").mkdir()
    for name, content in files.items():
        (tmp_path / "s" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "s" / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        make(tmp_path / "s", tmp_path / "d")


def test_a_destination_that_is_something_else_is_left_alone(photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("x")
    for settings in (SMALL, IngestSettings(size=(16, 16), overwrite=True)):
        with pytest.raises(UsageError, match="not empty and not a Manyeyes dataset"):
            make(photos, tmp_path / "full", settings)
    assert (tmp_path / "full" / "thesis.doc").exists()
    (tmp_path / "app" / "shards").mkdir(parents=True)
    (tmp_path / "app" / "manifest.json").write_text('{"name": "my app"}')
    with pytest.raises(UsageError, match="not empty and not a Manyeyes dataset"):
        make(photos, tmp_path / "app", IngestSettings(size=(16, 16), overwrite=True))
    assert (tmp_path / "app" / "manifest.json").read_text() == '{"name": "my app"}'
    damaged = tmp_path / "damaged"
    make(photos, damaged)
    (damaged / "manifest.json").write_text("{")
    assert make(photos, damaged, IngestSettings(size=(16, 16), overwrite=True)).num_written == 60
    with pytest.raises(UsageError, match="is a file"):
        make(photos, tmp_path / "full" / "thesis.doc")
    with pytest.raises(UsageError, match="can't be written"):
        make(photos, "/proc/nothing/d")
    with pytest.raises(UsageError, match="inside its source"):
        make(photos, f"{photos}/d")


def test_a_dataset_is_not_a_source(photos, tmp_path):
    make(photos, tmp_path / "d")
    with pytest.raises(SourceError, match="is a Manyeyes dataset already"):
        make(tmp_path / "d", tmp_path / "e")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoding": "raw"}, "Say which with --size"),
        ({"channels": 4}, "--channels 4"),
        ({"resize_short": 256}, "--resize-short goes with"),
        ({"val": 0.6, "test": 0.6}, "sum of at most"),
        ({"max_pixels": 0}, "--max-pixels 0"),
        ({"size": None, "max_pixels": 200_000_000}, "--max-pixels 200000000 would keep originals"),
        ({"size": (160, 120), "resize_short": 140}, "resize_short=140 leaves less.*at least 160"),
        ({"seed": -1}, "--seed -1"),
        ({"class_names": ("a", "a")}, "'a' twice"),
    ],
)
def test_impossible_settings_are_refused(photos, tmp_path, values, message):
    with pytest.raises(UsageError, match=message):
        make(photos, tmp_path / "d", IngestSettings(**values))


def test_sizes_and_class_names_are_read(tmp_path):
    assert parse_size("160") == (160, 160) and parse_size("128X96") == (128, 96)
    for text in ("", "a", "0", "-5", "1x2x3", "12.5", "x"):
        with pytest.raises(UsageError, match="is not a size"):
            parse_size(text)
    (tmp_path / "names").write_text("cat\n\n big dog \n")
    assert read_class_names(str(tmp_path / "names")) == ("cat", "big dog")
    with pytest.raises(UsageError, match="can't be read"):
        read_class_names(str(tmp_path / "none"))


def test_a_refused_source_leaves_the_destination_as_it_was(photos, tmp_path):
    (tmp_path / "s" / "a").mkdir(parents=True)
    (tmp_path / "s" / "a" / "x.jpg").write_bytes(encode(photo(0)))
    with pytest.raises(SourceError):
        make(tmp_path / "s", tmp_path / "d")
    assert not (tmp_path / "d").exists()
    make(photos, tmp_path / "d")
    before = files(tmp_path / "d")
    with pytest.raises(SourceError):
        make(tmp_path / "s", tmp_path / "d", IngestSettings(size=(16, 16), overwrite=True))
    assert files(tmp_path / "d") == before
