"""Predicts whole folders, tables and datasets by an engine's map: one row an input, in the order of the input."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes import storage
from manyeyes.engines.base import Engine
from manyeyes.engines.registry import create_engine
from manyeyes.errors import BundleError, ImageError, SourceError, UsageError
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.recognition.bundle import BackendName, Bundle
from manyeyes.recognition.inputs import Input, Partition, open_input
from manyeyes.recognition.predictor import Prediction, Predictor

_CANDIDATE = pa.struct([("label", pa.int32()), ("class_name", pa.string()), ("probability", pa.float64())])
# A row has either a prediction or the reason why there is none.
SCHEMA = pa.schema(
    [
        ("path", pa.string()),
        ("label", pa.int32()),
        ("class_name", pa.string()),
        ("probability", pa.float64()),
        ("top_k", pa.list_(_CANDIDATE)),
        # Null where the bundle has no threshold.
        ("abstain", pa.bool_()),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)
_SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True)
class PredictResult:
    """What became of every input. num_seen = num_predicted + num_failed.

    Attributes:
        failed: inputs without a prediction, by reason code.
        skipped: files that are not images by their name, by reason; they have no row.
        predicted: inputs by the class that they were taken for, the most frequent first.
    """

    bundle: str
    source: str
    out: str
    num_seen: int
    num_predicted: int
    num_failed: int
    failed: dict[str, int]
    skipped: dict[str, int]
    predicted: dict[str, int]
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class _Counts:
    predicted: dict[str, int] = field(default_factory=dict)
    failed: dict[str, int] = field(default_factory=dict)

    @property
    def num_seen(self) -> int:
        return sum(self.predicted.values()) + sum(self.failed.values())


@dataclass(frozen=True)
class _Job:
    bundle_uri: str
    bundle_fingerprint: str
    backend: BackendName | None
    images: Input
    parts_uri: str
    top_k: int
    batch_size: int


def predict(
    bundle: str,
    source: str,
    out: str,
    *,
    engine: Engine | None = None,
    top_k: int = 5,
    batch_size: int = 32,
    split: str | None = None,
    backend: BackendName | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> PredictResult:
    """Recognise every image of `source` by the bundle at `bundle` and publish the predictions at `out`.

    The rows are those of `SCHEMA`, one per input, in the order of the input, and the same for any number of workers.

    Args:
        source: an image, a pattern (`photos/**/*.jpg`), a folder, any table that ingest reads, or a dataset directory.
        out: ends in .parquet or .jsonl; appears whole or not at all.
        engine: default: local, a worker per core.
        split: of a dataset; default: all.
        on_progress: called with the number of inputs done so far.

    Returns:
        Counts that balance: num_seen = num_predicted + num_failed.

    Raises:
        UsageError: a setting is wrong, or `out` can't be written.
        SourceError: there is nothing to predict.
        BundleError: see Predictor.load.
    """
    if not out.endswith(_SUFFIXES):
        raise UsageError(f"{out} must end in {' or '.join(_SUFFIXES)}: the suffix says the format.")
    if top_k < 1 or batch_size < 1:
        raise UsageError(f"top_k={top_k} and batch_size={batch_size} must be at least 1.")
    if out == source:
        raise UsageError(f"{out} is the source itself and would be replaced. Give another file for the predictions.")
    started = time.perf_counter()
    # Tasks run in other working directories, on a cluster's nodes.
    bundle, source, out = storage.absolute(bundle), storage.absolute(source), storage.absolute(out)
    info = Bundle.load(bundle).info
    images = open_input(source, split)
    parent, name = storage.split(out)
    storage.check_writable(parent)
    parts_uri = storage.join(parent, f"{storage.ASIDE_MARK}{uuid.uuid4().hex[:12]}-{name}")
    job = _Job(bundle, info.fingerprint, backend, images, parts_uri, top_k, batch_size)
    skipped: dict[str, int] = {}
    num_done = 0

    def report(index: int, counts: _Counts) -> None:
        nonlocal num_done
        num_done += counts.num_seen
        if on_progress is not None:
            on_progress(num_done)

    try:
        results = (engine or create_engine()).map(
            functools.partial(_predict_partition, job), images.partitions(skipped), on_result=report
        )
        if not results:
            raise SourceError(f"{source} holds no image. Known by their names: .jpg, .png, .webp, .bmp, .tif, .gif.")
        _merge([_part_uri(parts_uri, index) for index in range(len(results))], out)
    finally:
        # What a failed job has said says more than that its parts can't be removed.
        with contextlib.suppress(OSError):
            storage.remove(parts_uri, recursive=True)
    predicted, failed = _sum([counts.predicted for counts in results]), _sum([counts.failed for counts in results])
    seconds = time.perf_counter() - started
    num_predicted, num_failed = sum(predicted.values()), sum(failed.values())
    return PredictResult(
        bundle=bundle,
        source=source,
        out=out,
        num_seen=num_done,
        num_predicted=num_predicted,
        num_failed=num_failed,
        failed=failed,
        skipped=dict(sorted(skipped.items())),
        predicted=predicted,
        seconds=seconds,
        images_per_second=num_done / seconds,
    )


@functools.lru_cache(maxsize=2)
def predictor_of(bundle_uri: str, fingerprint: str, backend: BackendName | None, num_threads: int) -> Predictor:
    """Load the predictor of a job, once per process.

    Raises:
        BundleError: the bundle at `bundle_uri` is not the one with this fingerprint any more; or see Predictor.load.
    """
    predictor = Predictor.load(bundle_uri, backend, num_threads=num_threads, measure=False)
    if predictor.bundle.info.fingerprint != fingerprint:
        raise BundleError(f"{bundle_uri} was replaced while it was in use. Make the predictions again.")
    return predictor


def predict_rows(
    predictor: Predictor,
    images: Iterable[bytes | np.ndarray | ImageError],
    top_k: int,
    batch_size: int,
    preprocessing: Preprocessing | None = None,
) -> list[dict[str, Any]]:
    """Recognise images in batches.

    Args:
        images: encoded bytes, uint8 pixels (height, width, channels), or why there is no image.
        preprocessing: what is left to do to the images; default: the predictor's.

    Returns:
        The columns of SCHEMA without `path` that each image has, in order: those of a prediction, or of a reason.
    """
    rows: list[dict[str, Any]] = []
    waiting: list[tuple[dict[str, Any], np.ndarray]] = []

    def flush() -> None:
        if waiting:
            predictions = predictor.predict_pixels(np.stack([pixels for _, pixels in waiting]), top_k)
            for (row, _), prediction in zip(waiting, predictions, strict=True):
                row.update(_columns(prediction))
            waiting.clear()

    for image in images:
        row: dict[str, Any] = {}
        rows.append(row)
        try:
            if isinstance(image, ImageError):
                raise image
            waiting.append((row, predictor.preprocess(image, preprocessing=preprocessing)))
        except ImageError as error:
            row.update(reason=error.reason.value, detail=error.detail)
        if len(waiting) == batch_size:
            flush()
    flush()
    return rows


def _predict_partition(job: _Job, partition: Partition) -> _Counts:
    # One thread a worker, whatever the number of workers: sums are then made in one order, so results are the same.
    predictor = predictor_of(job.bundle_uri, job.bundle_fingerprint, job.backend, 1)
    paths: list[str] = []

    def images() -> Iterator[bytes | np.ndarray | ImageError]:
        for path, image in job.images.read(partition):
            # A file name that is not UTF-8 arrives with surrogates, which no table can hold.
            paths.append(path.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
            yield image

    preprocessing = job.images.preprocessing(predictor.preprocessing)
    rows = predict_rows(predictor, images(), job.top_k, job.batch_size, preprocessing)
    for row, path in zip(rows, paths, strict=True):
        row["path"] = path
    counts = _Counts(
        predicted=dict(Counter(row["class_name"] for row in rows if "class_name" in row)),
        failed=dict(Counter(row["reason"] for row in rows if "reason" in row)),
    )
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), buffer, compression="zstd")
    storage.write_bytes(_part_uri(job.parts_uri, partition.index), buffer.getvalue())
    return counts


def _columns(prediction: Prediction) -> dict[str, Any]:
    candidates = [
        {"label": candidate.label, "class_name": candidate.class_name, "probability": candidate.probability}
        for candidate in prediction.top_k
    ]
    return {**candidates[0], "top_k": candidates, "abstain": prediction.abstain}


def _part_uri(parts_uri: str, index: int) -> str:
    return storage.join(parts_uri, f"part-{index:06d}.parquet")


def _merge(part_uris: list[str], out: str) -> None:
    with storage.publish(out) as file:
        writer = pq.ParquetWriter(file, SCHEMA, compression="zstd") if out.endswith(".parquet") else None
        for uri in part_uris:
            table = pq.read_table(io.BytesIO(storage.read_bytes(uri)), schema=SCHEMA)
            if writer is not None:
                writer.write_table(table)
            else:
                for row in table.to_pylist():
                    present = {name: value for name, value in row.items() if value is not None}
                    file.write(json.dumps(present, ensure_ascii=False).encode() + b"\n")
        if writer is not None:
            writer.close()


def _sum(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for part in counts:
        for key, number in part.items():
            total[key] = total.get(key, 0) + number
    return dict(sorted(total.items(), key=lambda item: (-item[1], item[0])))
