"""What a model said of every example, kept as Parquet: one file a task, read back as a stream."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes import storage
from manyeyes.errors import DataError
from manyeyes.recognition.predictor import softmax

DIRECTORY_NAME = "predictions"
# About so many bytes of logits are held by a writer, and make a row group.
_ROW_GROUP_BYTES = 8 << 20


def schema(num_classes: int) -> pa.Schema:
    """The columns of a file of predictions.

    `probability` is that of the predicted class, after division of the logits by the temperature; `logits` are as the
    model gives them, before it.
    """
    return pa.schema(
        [
            ("path", pa.string()),
            ("label", pa.int32()),
            ("predicted", pa.int32()),
            ("probability", pa.float32()),
            ("logits", pa.list_(pa.float32(), num_classes)),
        ]
    )


@dataclass(frozen=True)
class Predictions:
    """Consecutive examples, with what the model said of them.

    Attributes:
        paths: n source paths.
        labels: int32 (n,), the true labels.
        predicted: int32 (n,), the label of the largest logit; of equals the lowest.
        probability: float32 (n,), of the predicted class.
        logits: float32 (n, num_classes), before division by a temperature.
    """

    paths: list[str]
    labels: np.ndarray
    predicted: np.ndarray
    probability: np.ndarray
    logits: np.ndarray

    @classmethod
    def from_logits(
        cls, paths: Sequence[str], labels: np.ndarray, logits: np.ndarray, temperature: float = 1.0
    ) -> Predictions:
        """Derive what is predicted from float logits (n, num_classes)."""
        logits = np.asarray(logits, np.float32)
        predicted = logits.argmax(axis=1)
        probability = softmax(logits, temperature)[np.arange(len(logits)), predicted]
        return cls(
            list(paths),
            np.asarray(labels, np.int32),
            predicted.astype(np.int32),
            probability.astype(np.float32),
            logits,
        )

    def __len__(self) -> int:
        return len(self.labels)


class PredictionWriter:
    """Writes one file; made by `open_writer`."""

    def __init__(self, writer: pq.ParquetWriter, num_classes: int) -> None:
        self._writer = writer
        self._schema = schema(num_classes)
        self._rows_per_group = max(1, _ROW_GROUP_BYTES // (4 * num_classes))
        self._waiting: list[pa.RecordBatch] = []
        self._num_waiting = 0

    def write(self, found: Predictions) -> None:
        """Append examples, of which there may be none.

        Raises:
            ValueError: the logits are not of the writer's number of classes.
        """
        num_classes = self._schema.field("logits").type.list_size
        if found.logits.shape != (len(found), num_classes):
            raise ValueError(f"logits are of {found.logits.shape}, expected ({len(found)}, {num_classes}).")
        if len(found) == 0:
            return
        # A file name that is not UTF-8 arrives with surrogates, which no table can hold.
        paths = [path.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for path in found.paths]
        flat = pa.array(np.ascontiguousarray(found.logits).reshape(-1), pa.float32())
        columns = [
            pa.array(paths, pa.string()),
            pa.array(found.labels, pa.int32()),
            pa.array(found.predicted, pa.int32()),
            pa.array(found.probability, pa.float32()),
            pa.FixedSizeListArray.from_arrays(flat, num_classes),
        ]
        self._waiting.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        self._num_waiting += len(found)
        if self._num_waiting >= self._rows_per_group:
            self.flush()

    def flush(self) -> None:
        """End the row group."""
        if self._waiting:
            self._writer.write_table(pa.Table.from_batches(self._waiting), row_group_size=self._num_waiting)
            self._waiting, self._num_waiting = [], 0


def part_uri(directory: str, index: int) -> str:
    """The file of task `index` of an evaluation; tasks are in the order of the split's examples."""
    return storage.join(directory, f"part-{index:05d}.parquet")


@contextlib.contextmanager
def open_writer(uri: str, num_classes: int) -> Iterator[PredictionWriter]:
    """Write the file at `uri`, which appears whole on a clean exit or not at all; an older one is replaced.

    Raises:
        StorageError: it can't be written.
    """
    with (
        storage.publish(uri) as file,
        pq.ParquetWriter(file, schema(num_classes), compression="zstd", write_page_checksum=True) as parquet,
    ):
        writer = PredictionWriter(parquet, num_classes)
        yield writer
        writer.flush()


def read_predictions(directory: str) -> Iterator[Predictions]:
    """Yield the predictions of an evaluation in the order of the split's examples, a row group at a time.

    Args:
        directory: the `predictions` directory beside evaluation.json.

    Raises:
        DataError: there are none, or a file is damaged.
    """
    names = storage.list_files(directory, ".parquet")
    if not names:
        raise DataError(f"There are no predictions at {directory}. Make them with: manyeyes evaluate … --predictions")
    # By number: with more than 99,999 parts their names are of different lengths.
    for name in sorted(names, key=lambda name: (len(name), name)):
        yield from read_file(storage.join(directory, name))


def read_file(uri: str) -> Iterator[Predictions]:
    """Yield the predictions of one file, a row group at a time.

    Raises:
        DataError: it is damaged, or no file of predictions.
    """
    try:
        with storage.open_read(uri) as opened, pq.ParquetFile(opened, page_checksum_verification=True) as file:
            num_classes = getattr(file.schema_arrow.field("logits").type, "list_size", 0)
            if file.schema_arrow != schema(num_classes):
                raise DataError(f"{uri} is not a file of predictions: it has the columns {file.schema_arrow.names}.")
            for index in range(file.num_row_groups):
                yield _from_table(file.read_row_group(index, use_threads=False).combine_chunks(), num_classes)
    except (pa.ArrowException, KeyError, OSError) as error:
        if isinstance(error, OSError) and storage.is_transient(error, uri):
            raise
        raise DataError(f"{uri} can't be read: {error}. Evaluate again.") from None


def _from_table(table: pa.Table, num_classes: int) -> Predictions:
    (batch,) = table.to_batches()
    logits = batch.column("logits")
    flat = _values(logits.values, np.float32)[num_classes * logits.offset :][: num_classes * len(logits)]
    return Predictions(
        batch.column("path").to_pylist(),
        _values(batch.column("label"), np.int32),
        _values(batch.column("predicted"), np.int32),
        _values(batch.column("probability"), np.float32),
        flat.reshape(len(logits), num_classes),
    )


def _values(array: pa.Array, dtype: type[np.generic]) -> np.ndarray:
    # By hand, as PyArrow's own way to NumPy loads pandas first: half a second of CPU.
    size = np.dtype(dtype).itemsize
    return np.frombuffer(array.buffers()[1], dtype, count=len(array), offset=size * array.offset)
