"""Quarantine: what should have been an example and can't be, with the reason; kept beside the shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes.errors import Reason

# Larger originals are not kept: the path says where to find them.
MAX_KEPT_BYTES = 64 * 1024
_ROW_GROUP_ROWS = 256

SCHEMA = pa.schema(
    [
        pa.field("path", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("label", pa.string()),
        pa.field("bytes", pa.binary()),
    ]
)


@dataclass(frozen=True, slots=True)
class QuarantineRow:
    """One input that can't be used.

    Attributes:
        path: as in the source.
        reason: the code.
        detail: what was found, for people.
        label: as the source names it, or None.
        content: the original bytes where they are at most MAX_KEPT_BYTES long, else None.
    """

    path: str
    reason: Reason
    detail: str
    label: str | None
    content: bytes | None


def encode_quarantine(rows: Sequence[QuarantineRow]) -> tuple[pa.Buffer, tuple[int, ...]]:
    """Return the rows as the bytes of a Parquet file, and the number of rows of each of its row groups."""
    sink = pa.BufferOutputStream()
    sizes = []
    with pq.ParquetWriter(sink, SCHEMA, version="2.6", compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, len(rows), _ROW_GROUP_ROWS):
            chunk = rows[start : start + _ROW_GROUP_ROWS]
            columns = [
                [row.path for row in chunk],
                [row.reason.value for row in chunk],
                [row.detail for row in chunk],
                [row.label for row in chunk],
                [row.content for row in chunk],
            ]
            arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), row_group_size=len(chunk))
            sizes.append(len(chunk))
    return sink.getvalue(), tuple(sizes)
