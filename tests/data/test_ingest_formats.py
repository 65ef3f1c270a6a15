"""Ingest of every kind of source and image, and what it stores of them."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ingesting import encode, examples, make, photo
from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings


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
