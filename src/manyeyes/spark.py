"""For Spark users: a DataFrame as the source of an ingest, and prediction as a function from DataFrame to DataFrame."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes import storage
from manyeyes.data.ingest import IngestResult, IngestSettings, Progress, ingest
from manyeyes.data.manifest import MANIFEST_NAME
from manyeyes.data.sources.base import read_image_file
from manyeyes.data.sources.parquet import ParquetSource
from manyeyes.data.sources.table import TableSource
from manyeyes.engines.base import Engine
from manyeyes.engines.registry import create_engine
from manyeyes.engines.spark_tasks import settle
from manyeyes.errors import ImageError, MissingExtraError, Reason, UsageError
from manyeyes.recognition.batch import SCHEMA, predict_rows, predictor_of
from manyeyes.recognition.bundle import BackendName, Bundle

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# What predict_dataframe adds to each row: recognition.batch.SCHEMA without the path, as Spark writes it.
PREDICTION_COLUMNS = (
    "label int, class_name string, probability double, "
    "top_k array<struct<label: int, class_name: string, probability: double>>, "
    "abstain boolean, reason string, detail string"
)
# Staged images lie in parts of about so many rows, whatever the cluster, so that the same rows make the same dataset.
_PART_ROWS = 1000
_MAX_PARTS = 10_000
_ROW_GROUP_ROWS = 512
_ROW_GROUP_BYTES = 32 << 20
_ROW_GROUPS_PER_FILE = 8
_TABLE_NAME = "table.jsonl"
_STAGED_NAME = "staged.json"


def ingest_dataframe(
    frame: DataFrame,
    dataset: str,
    *,
    image_column: str | None = None,
    path_column: str | None = None,
    label_column: str = "label",
    group_column: str | None = None,
    split_column: str | None = None,
    settings: IngestSettings | None = None,
    engine: Engine | None = None,
    on_progress: Progress | None = None,
) -> IngestResult:
    """Write the images of a DataFrame as a dataset.

    Images are bytes in a column (as Spark's binaryFile reads them), or files that a column of paths names: then no
    image passes through Spark, and the workers read the files. Either is first laid beside the dataset, at
    `<dataset>.staged`, in an order that depends on nothing but the rows; that is removed at the end. Interrupted and
    called again, it goes on where it stopped, if the frame has as many rows with the same paths and labels.

    Args:
        frame: one row an image.
        dataset: URI of the dataset directory to make.
        image_column: of encoded bytes; default: "content" or "image", if there is one and no `path_column` is given.
        path_column: beside an image column the name of each image; else the file: a path or URI that the workers can
            read. Default: "path", if there is one.
        label_column: of text or numbers.
        group_column: of what must not straddle splits.
        split_column: of train, val or test.
        settings: see IngestSettings; its columns and source kind are not looked at.
        engine: default: Spark, in the frame's session.

    Returns:
        Counts that balance, and what the dataset has.

    Raises:
        UsageError: a column is missing or of another type.
        SourceError, DatasetError: see data.ingest.ingest.
    """
    settings = settings or IngestSettings()
    dataset = storage.absolute(dataset)
    image_column, path_column = _find_columns(frame, image_column, path_column)
    wanted = {"label": label_column, "group": group_column, "split": split_column}
    columns = {name: column for name, column in wanted.items() if column is not None}
    _check_columns(frame, columns.values())
    staged = f"{dataset}.staged"
    source = ParquetSource(staged) if image_column else TableSource(storage.join(staged, _TABLE_NAME))
    if settings.overwrite or not storage.exists(storage.join(dataset, MANIFEST_NAME)):
        identity: dict[str, Any] = {
            "columns": columns,
            "image": image_column,
            "path": path_column,
            "schema": frame.schema.jsonValue(),
        }
        identity |= _count_rows(frame, [name for name in (path_column, *columns.values()) if name is not None])
        if settings.overwrite or not _is_staged(staged, identity):
            storage.remove(staged, recursive=True)
            if image_column is not None:
                _stage_images(frame, identity["num_rows"], staged, image_column, path_column, columns)
            else:
                assert path_column is not None
                _stage_paths(frame, storage.join(staged, _TABLE_NAME), path_column, columns)
            storage.write_json(storage.join(staged, _STAGED_NAME), identity)
    engine = engine or create_engine("spark")
    result = ingest(source, dataset, settings=settings, engine=engine, on_progress=on_progress)
    storage.remove(staged, recursive=True)
    return result


def predict_dataframe(
    frame: DataFrame,
    bundle: str,
    *,
    image_column: str = "content",
    top_k: int = 5,
    batch_size: int = 32,
    backend: BackendName | None = None,
    prefix: str = "",
    keep_images: bool = False,
) -> DataFrame:
    """Recognise the image of every row by the bundle at `bundle`.

    Nothing runs until Spark needs the result. Each Python worker of Spark loads the bundle once. An image that can't be
    used gets a `reason` and a `detail` instead of a prediction.

    Args:
        image_column: encoded bytes, as Spark's binaryFile reads them, or paths and URIs that the executors can read.
        top_k: the number of classes in each prediction.
        batch_size: images that go through the model at once.
        backend: see Predictor.load.
        prefix: of the names of the added columns, e.g. "predicted_" where the frame has a label already.
        keep_images: whether the result keeps a column of bytes; to carry it through Python costs time.

    Returns:
        The columns of the frame and those of PREDICTION_COLUMNS.

    Raises:
        UsageError: a column is missing or of another type, or there twice; a setting is wrong.
        BundleError: see Bundle.load; what a Python worker finds fails the job.
    """
    from pyspark.sql.types import BinaryType, StructType

    if top_k < 1 or batch_size < 1:
        raise UsageError(f"top_k={top_k} and batch_size={batch_size} must be at least 1.")
    _check_columns(frame, [image_column])
    _check_arrow("predict_dataframe")
    kind = frame.schema[image_column].dataType
    if kind.typeName() not in ("binary", "string"):
        raise UsageError(
            f"Column {image_column!r} is {kind.simpleString()}; expected binary (images) or string (paths)."
        )
    kept = tuple(
        name for name in frame.columns if name != image_column or keep_images or not isinstance(kind, BinaryType)
    )
    added = StructType.fromDDL(PREDICTION_COLUMNS)
    assert isinstance(added, StructType)
    for field in added.fields:
        field.name = f"{prefix}{field.name}"
        if field.name in kept:
            raise UsageError(f'The frame has a column {field.name!r} already. Give a prefix, e.g. prefix="predicted_".')
    schema = StructType([*(frame.schema[name] for name in kept), *added.fields])
    fingerprint = Bundle.load(bundle).info.fingerprint
    job = _Job(storage.absolute(bundle), fingerprint, backend, image_column, kept, prefix, top_k, batch_size)
    return frame.mapInArrow(functools.partial(_predict_batches, job), schema)


@dataclass(frozen=True)
class _Job:
    bundle_uri: str
    fingerprint: str
    backend: BackendName | None
    image_column: str
    kept: tuple[str, ...]
    prefix: str
    top_k: int
    batch_size: int


def _predict_batches(job: _Job, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Runs on an executor: one batch of predictions for one batch of rows."""
    from pyspark import TaskContext

    context = TaskContext.get()
    num_threads = context.cpus() if context is not None else 1
    predictor = predictor_of(job.bundle_uri, job.fingerprint, job.backend, num_threads)
    for batch in batches:
        rows = predict_rows(predictor, _images_of(batch.column(job.image_column)), job.top_k, job.batch_size)
        predictions = pa.Table.from_pylist(rows, schema=_ARROW_SCHEMA).combine_chunks()
        columns = [batch.column(name) for name in job.kept]
        columns += [predictions.column(name).combine_chunks() for name in _ARROW_SCHEMA.names]
        names = [*job.kept, *(f"{job.prefix}{name}" for name in _ARROW_SCHEMA.names)]
        yield pa.RecordBatch.from_arrays(columns, names=names)
    settle()


# The path is a column of the frame, if it has one.
_ARROW_SCHEMA = pa.schema(field for field in SCHEMA if field.name != "path")


def _images_of(column: pa.Array) -> Iterator[bytes | ImageError]:
    for cell in column:
        value = cell.as_py()
        try:
            if value is None:
                raise ImageError(Reason.EMPTY, "the image cell has no bytes")
            yield read_image_file(_uri_of(value)) if isinstance(value, str) else value
        except ImageError as error:
            yield error


def _find_columns(frame: DataFrame, image_column: str | None, path_column: str | None) -> tuple[str | None, str | None]:
    if image_column is None and path_column is None:
        image_column = next((name for name in ("content", "image") if name in frame.columns), None)
    if path_column is None and "path" in frame.columns:
        path_column = "path"
    if image_column is None and path_column is None:
        raise UsageError(
            f"The frame has no column content, image or path; it has {', '.join(frame.columns)}. "
            "Say which with image_column (bytes) or path_column."
        )
    for name, kind in ((image_column, "binary"), (path_column, "string")):
        if name is not None:
            _check_columns(frame, [name])
            found = frame.schema[name].dataType.simpleString()
            if found != kind:
                raise UsageError(f"Column {name!r} is {found}; expected {kind}.")
    return image_column, path_column


def _check_columns(frame: DataFrame, names: Iterable[str]) -> None:
    for name in names:
        if name not in frame.columns:
            raise UsageError(f"The frame has no column {name!r}. It has: {', '.join(frame.columns)}.")


def _check_arrow(what: str) -> None:
    if importlib.util.find_spec("pandas") is None:
        raise MissingExtraError(what, "spark")


def _count_rows(frame: DataFrame, columns: list[str]) -> dict[str, Any]:
    """Count the rows, and sum up what is in some columns, whatever the order; Spark reads no image for it."""
    from pyspark.sql import functions

    hashed = functions.xxhash64(*(functions.col(f"`{name}`") for name in columns)).cast("decimal(20,0)")
    (row,) = frame.agg(functions.count("*").alias("rows"), functions.sum(hashed).alias("sum")).collect()
    return {"num_rows": row["rows"], "rows": str(row["sum"])}


def _is_staged(staged: str, identity: dict[str, Any]) -> bool:
    uri = storage.join(staged, _STAGED_NAME)
    return storage.exists(uri) and storage.read_json(uri) == identity


def _stage_paths(frame: DataFrame, uri: str, path_column: str, columns: dict[str, str]) -> None:
    """Write the rows as a table, sorted, one by one: they may be more than the driver's memory holds."""
    from pyspark.sql import functions

    names = {"path": path_column, **columns}
    rows = frame.select(*(functions.col(f"`{column}`").alias(name) for name, column in names.items()))
    with storage.publish(uri) as file:
        for row in rows.orderBy(*names).toLocalIterator(prefetchPartitions=True):
            values = {name: value for name, value in row.asDict().items() if value is not None}
            if "path" in values:
                values["path"] = _uri_of(values["path"])
            file.write(json.dumps(values, ensure_ascii=False, default=str).encode() + b"\n")


def _stage_images(
    frame: DataFrame, num_rows: int, staged: str, image_column: str, path_column: str | None, columns: dict[str, str]
) -> None:
    """Write the rows as Parquet files, from the executors. Rows go to parts by a hash, and are sorted there."""
    from pyspark.sql import functions

    _check_arrow("ingest_dataframe")
    image = functions.col(f"`{image_column}`")
    path = functions.col(f"`{path_column}`") if path_column else functions.sha2(image, 256)
    rows = frame.select(
        functions.coalesce(path, functions.lit("")).alias("path"),
        image.alias("bytes"),
        *(functions.col(f"`{column}`").alias(name) for name, column in columns.items()),
    )
    # Rows of one path must have an order too.
    keys = [functions.col(name) for name in ("path", *columns)]
    if path_column:
        keys.append(functions.sha2("bytes", 256))
    num_parts = min(_MAX_PARTS, num_rows // _PART_ROWS + 1)
    ordered = rows.repartition(num_parts, "path").sortWithinPartitions(*keys)
    written = ordered.mapInArrow(functools.partial(_write_part, staged), "num_rows long")
    written.agg({"num_rows": "sum"}).collect()


def _write_part(staged: str, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Runs on an executor: write the rows of one partition. An attempt that is tried again writes the same files."""
    from pyspark import TaskContext

    context = TaskContext.get()
    assert context is not None
    num_rows = 0
    groups: list[pa.Table] = []
    num_files = 0

    def write() -> None:
        nonlocal num_files
        buffer = io.BytesIO()
        with pq.ParquetWriter(buffer, groups[0].schema, compression="none") as writer:
            for group in groups:
                writer.write_table(group, row_group_size=max(1, group.num_rows))
        storage.write_bytes(
            storage.join(staged, f"rows-{context.partitionId():05d}-{num_files:05d}.parquet"), buffer.getvalue()
        )
        num_files += 1
        groups.clear()

    for group in _row_groups(batches):
        groups.append(group)
        num_rows += group.num_rows
        if len(groups) == _ROW_GROUPS_PER_FILE:
            write()
    if groups:
        write()
    yield pa.RecordBatch.from_pydict({"num_rows": pa.array([num_rows], pa.int64())})


def _row_groups(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.Table]:
    """Cut rows into row groups of bounded bytes, wherever the batches of Spark begin and end."""
    pending: list[pa.RecordBatch] = []
    num_rows = num_bytes = 0
    for batch in batches:
        start = 0
        for row, image in enumerate(batch.column("bytes")):
            num_rows += 1
            num_bytes += image.as_buffer().size if image.is_valid else 0
            if num_rows == _ROW_GROUP_ROWS or num_bytes >= _ROW_GROUP_BYTES:
                yield _as_source([*pending, batch.slice(start, row + 1 - start)])
                pending, start, num_rows, num_bytes = [], row + 1, 0, 0
        if start < batch.num_rows:
            pending.append(batch.slice(start))
    if pending:
        yield _as_source(pending)


def _as_source(batches: list[pa.RecordBatch]) -> pa.Table:
    """The columns as ParquetSource reads them: the image a struct of bytes and path."""
    table = pa.Table.from_batches(batches).combine_chunks()
    image = pa.StructArray.from_arrays(
        [table.column("bytes").combine_chunks(), table.column("path").combine_chunks()], ["bytes", "path"]
    )
    rest = {name: table.column(name) for name in table.column_names if name not in ("bytes", "path")}
    return pa.table({"image": image, **rest})


def _uri_of(path: str) -> str:
    """A path as workers read it: Spark writes file:/folder/name."""
    if path.startswith("file:/"):
        return "/" + path.removeprefix("file:").lstrip("/")
    return path if "://" in path else storage.absolute(path)
