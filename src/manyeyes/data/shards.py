"""Writes one shard: the map function of an ingest, a pure function of its task, so that it can be retried."""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes import config, storage
from manyeyes.data.manifest import QUARANTINE, SHARDS, Encoding, ShardInfo
from manyeyes.data.quarantine import MAX_KEPT_BYTES, QuarantineRow, encode_quarantine
from manyeyes.data.sources.base import Source, SourceEntry
from manyeyes.data.splits import group_number
from manyeyes.errors import ImageError, Reason
from manyeyes.imaging.decode import DecodeLimits, decode, inspect
from manyeyes.imaging.phash import perceptual_hash
from manyeyes.imaging.preprocessing import Preprocessing

# What an unfinished ingest knows about itself; removed when the manifest is published.
INGEST = ".ingest"
# Part of every task's fingerprint: raise it when the same task would write other bytes.
WRITER_VERSION = 2
MAX_ROW_GROUP_BYTES = 1 << 30
_JPEG_OPTIONS = [
    cv2.IMWRITE_JPEG_QUALITY,
    92,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
    cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
]


@dataclass(frozen=True)
class ShardWriter:
    """How all shards of a dataset are written.

    Attributes:
        dataset: URI of the dataset directory.
        encoding: "raw" or "jpeg".
        preprocessing: from source bytes to stored pixels.
        limits: what is refused before it is decoded.
        class_names: label i is class_names[i].
        row_group_rows: rows in a row group.
        seed: of the order of rows; None keeps that of the source.
    """

    dataset: str
    encoding: Encoding
    preprocessing: Preprocessing
    limits: DecodeLimits
    class_names: tuple[str, ...]
    row_group_rows: int
    seed: int | None

    @property
    def keeps_originals(self) -> bool:
        """Whether the original bytes are stored as they are."""
        return self.encoding == "jpeg" and not self.preprocessing.steps


@dataclass(frozen=True)
class ShardTask:
    """One shard to write.

    Attributes:
        name: without extension, e.g. train-00000.
        split: of all its entries; "" for entries that are known to have a problem.
        entries: what to read.
        labels: the label of each entry; -1 with a problem.
    """

    name: str
    split: str
    entries: tuple[SourceEntry, ...]
    labels: tuple[int, ...]
    source: Source
    writer: ShardWriter

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all that the result depends on."""
        writer = config.to_dict(self.writer) | {"dataset": ""}
        content = [WRITER_VERSION, self.name, writer, [entry.to_json() for entry in self.entries], self.labels]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class ShardRecord:
    """What became of a task: stands in `.ingest/<name>.json` until the manifest is published.

    Attributes:
        fingerprint: of the task.
        num_entries: of the task; written + quarantined.
        shard, quarantine: the files, where there are rows for them.
        written: number of rows by label (as a decimal string, for JSON).
        quarantined: number of rows by reason.
        rows: what the search for near-duplicates needs of each row of the shard: base64 of RECORD_ROW.
    """

    fingerprint: str
    split: str
    num_entries: int
    shard: ShardInfo | None
    quarantine: ShardInfo | None
    written: dict[str, int]
    quarantined: dict[str, int]
    rows: str = ""


# Of the group its number (see splits.group_number).
RECORD_ROW = np.dtype([("phash", "<i8"), ("group", "<i8"), ("label", "<i4")])


@dataclass(frozen=True, slots=True)
class _Example:
    path: str
    label: int
    group: str | None
    image: np.ndarray | bytes
    phash: int
    width: int
    height: int


def write_shard(task: ShardTask) -> ShardRecord:
    """Write the files of a task, unless an earlier attempt has; return what they hold.

    Raises:
        OSError: the source or the dataset could not be reached; another attempt may.
    """
    writer = task.writer
    record_uri = storage.join(writer.dataset, INGEST, f"{task.name}.json")
    fingerprint = task.fingerprint
    finished = finished_record(record_uri, fingerprint, writer.dataset)
    if finished is not None:
        return finished
    examples: list[_Example] = []
    refused: list[QuarantineRow] = []
    for entry, label in zip(task.entries, task.labels, strict=True):
        result = _make_example(task.source, entry, label, writer)
        if isinstance(result, QuarantineRow):
            refused.append(result)
        else:
            examples.append(result)
    if writer.seed is not None:
        order = np.random.default_rng([writer.seed, *task.name.encode()]).permutation(len(examples))
        examples = [examples[index] for index in order]
    shard = quarantine = None
    name = f"{task.name}.parquet"
    if examples:
        schema = shard_schema(writer.encoding, writer.class_names)
        tables = (_table(chunk, task.split, schema) for chunk in _chunks(examples, writer.row_group_rows))
        shard = publish_shard(writer, name, task.split, tables)
    if refused:
        buffer, sizes = encode_quarantine(refused)
        quarantine = _publish(storage.join(writer.dataset, QUARANTINE, name), buffer, name, "", sizes)
    rows = np.array([(each.phash, group_number(each.group), each.label) for each in examples], RECORD_ROW)
    record = ShardRecord(
        fingerprint=fingerprint,
        split=task.split,
        num_entries=len(task.entries),
        shard=shard,
        quarantine=quarantine,
        written={str(label): count for label, count in sorted(Counter(example.label for example in examples).items())},
        quarantined=dict(sorted(Counter(row.reason.value for row in refused).items())),
        rows=base64.b64encode(rows.tobytes()).decode(),
    )
    storage.write_json(record_uri, config.to_dict(record))
    return record


def row_group_rows(encoding: Encoding, image_shape: tuple[int, int, int] | None) -> int:
    """The number of rows in a row group: 128 encoded images; raw pixels of about 2 MiB, or 64 images up to 32 MiB."""
    if encoding == "jpeg" or image_shape is None:
        return 128
    image_bytes = int(np.prod(image_shape))
    return int(np.clip((2 << 20) // image_bytes, max(1, min(64, (32 << 20) // image_bytes)), 1024))


def shard_schema(encoding: Encoding, class_names: Sequence[str]) -> pa.Schema:
    """The schema of a shard, with the metadata by which Hugging Face `datasets` knows images and class names."""
    fields = [
        pa.field("image", pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])),
        pa.field("label", pa.int32()),
        pa.field("group", pa.string()),
        pa.field("split", pa.string()),
        pa.field("phash", pa.int64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
    ]
    features: dict[str, Any] = {
        field.name: {"dtype": str(field.type), "_type": "Value"}
        for field in fields
        if field.name not in ("image", "label")
    }
    features["label"] = {"names": list(class_names), "_type": "ClassLabel"}
    if encoding == "jpeg":
        features["image"] = {"_type": "Image"}
    else:
        features["image"] = {
            name: {"dtype": kind, "_type": "Value"} for name, kind in (("bytes", "binary"), ("path", "string"))
        }
    ordered = {field.name: features[field.name] for field in fields}
    metadata = {"huggingface": json.dumps({"info": {"features": ordered}}, ensure_ascii=False)}
    return pa.schema(fields, metadata=metadata)


def finished_record(record_uri: str, fingerprint: str, dataset: str) -> ShardRecord | None:
    """Return what an earlier attempt at a task has noted, if it was the same task and its files are there."""
    try:
        record = config.from_dict(ShardRecord, storage.read_json(record_uri))
        if record.fingerprint != fingerprint:
            return None
        for folder, info in ((SHARDS, record.shard), (QUARANTINE, record.quarantine)):
            if info is not None and storage.size_bytes(storage.join(dataset, folder, info.name)) != info.size_bytes:
                return None
    except FileNotFoundError:
        return None
    return record


def _make_example(source: Source, entry: SourceEntry, label: int, writer: ShardWriter) -> _Example | QuarantineRow:
    content: bytes | np.ndarray | None = None
    try:
        if 0 <= writer.limits.max_bytes < entry.size_bytes:
            raise ImageError(Reason.TOO_MANY_BYTES, f"{entry.size_bytes} bytes, the limit is {writer.limits.max_bytes}")
        if entry.problem not in (None, Reason.MISSING_LABEL, Reason.UNKNOWN_LABEL):
            raise ImageError(entry.problem, entry.detail)
        content = source.read(entry)
        if entry.problem is not None:
            raise ImageError(entry.problem, entry.detail)
        image, height, width = _pixels(content, writer)
    except ImageError as error:
        kept = content if isinstance(content, bytes) and len(content) <= MAX_KEPT_BYTES else None
        return QuarantineRow(entry.path, error.reason, error.detail, entry.label, kept)
    stored: np.ndarray | bytes = image
    if writer.keeps_originals and isinstance(content, bytes):
        stored = content
    elif writer.encoding == "jpeg":
        stored = _encode_jpeg(image)
    return _Example(entry.path, label, entry.group, stored, perceptual_hash(image), width, height)


def _pixels(content: bytes | np.ndarray, writer: ShardWriter) -> tuple[np.ndarray, int, int]:
    """The pixels to store, or to hash where the original is stored; and the height and width of the source image."""
    preprocessing = writer.preprocessing
    if isinstance(content, bytes):
        channels, background, limits = preprocessing.channels, preprocessing.background, writer.limits
        if writer.keeps_originals:
            return inspect(content, channels=channels, background=background, limits=limits)
        pixels = decode(content, channels=channels, background=background, limits=limits)
    elif content.shape[2] == preprocessing.channels:
        pixels = content
    else:
        code = cv2.COLOR_GRAY2RGB if preprocessing.channels == 3 else cv2.COLOR_RGB2GRAY
        pixels = cv2.cvtColor(content, code).reshape(*content.shape[:2], preprocessing.channels)
    return preprocessing.apply(pixels), *pixels.shape[:2]


def _encode_jpeg(image: np.ndarray) -> bytes:
    is_color = image.shape[2] == 3
    ok, encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if is_color else image, _JPEG_OPTIONS)
    if not ok:
        raise ImageError(Reason.CORRUPT, f"can't be encoded as JPEG at {image.shape[1]} x {image.shape[0]} pixels")
    return encoded.tobytes()


def publish_shard(writer: ShardWriter, name: str, split: str, tables: Iterable[pa.Table]) -> ShardInfo:
    """Write a shard of which each table, of shard_schema, is a row group."""
    sink = pa.BufferOutputStream()
    sizes = []
    parquet = pq.ParquetWriter(
        sink,
        shard_schema(writer.encoding, writer.class_names),
        version="2.6",
        # Pixels and JPEG don't shrink, and plain pages are read without a copy; words and numbers do.
        compression={"image.bytes": "none"}
        | dict.fromkeys(("image.path", "label", "group", "split", "phash", "width", "height"), "zstd"),
        use_dictionary=["label", "group", "split"],
        write_statistics=["label", "group", "split", "width", "height"],
        write_page_checksum=True,
        store_schema=True,
    )
    with parquet:
        for table in tables:
            parquet.write_table(table, row_group_size=table.num_rows)
            sizes.append(table.num_rows)
    return _publish(storage.join(writer.dataset, SHARDS, name), sink.getvalue(), name, split, tuple(sizes))


def _chunks(examples: list[_Example], num_rows: int) -> Iterator[list[_Example]]:
    """Cut into row groups; one of very large originals is cut short, as its offsets are 32-bit numbers."""
    chunk: list[_Example] = []
    num_bytes = 0
    for example in examples:
        size = len(example.image) if isinstance(example.image, bytes) else example.image.nbytes
        if chunk and (len(chunk) == num_rows or num_bytes + size > MAX_ROW_GROUP_BYTES):
            yield chunk
            chunk, num_bytes = [], 0
        chunk.append(example)
        num_bytes += size
    if chunk:
        yield chunk


def _table(examples: Sequence[_Example], split: str, schema: pa.Schema) -> pa.Table:
    paths = pa.array([example.path for example in examples], pa.string())
    columns: dict[str, pa.Array] = {
        "image": pa.StructArray.from_arrays([_binary(example.image for example in examples), paths], ["bytes", "path"]),
        "label": pa.array([example.label for example in examples], pa.int32()),
        "group": pa.array([example.group for example in examples], pa.string()),
        "split": pa.array([split] * len(examples), pa.string()),
        "phash": pa.array([example.phash for example in examples], pa.int64()),
        "width": pa.array([example.width for example in examples], pa.int32()),
        "height": pa.array([example.height for example in examples], pa.int32()),
    }
    return pa.Table.from_arrays([columns[field.name] for field in schema], schema=schema)


def _binary(images: Iterable[np.ndarray | bytes]) -> pa.Array:
    values = [np.frombuffer(image, np.uint8) if isinstance(image, bytes) else image.reshape(-1) for image in images]
    offsets = np.zeros(len(values) + 1, np.int32)
    np.cumsum([len(value) for value in values], out=offsets[1:])
    return pa.Array.from_buffers(
        pa.binary(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(np.concatenate(values))]
    )


def _publish(uri: str, buffer: pa.Buffer, name: str, split: str, sizes: tuple[int, ...]) -> ShardInfo:
    content = memoryview(buffer)
    with storage.publish(uri) as file:
        file.write(content)
    return ShardInfo(name, split, sizes, len(content), hashlib.sha256(content).hexdigest())
