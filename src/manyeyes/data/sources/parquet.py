"""Parquet: an image column (bytes, or a Hugging Face struct of bytes and path) and a label column."""

from __future__ import annotations

import functools
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes import storage
from manyeyes.data.sources.base import Skipped, SourceEntry, check_split, file_version, label_text, split_of_file
from manyeyes.errors import ImageError, Reason, SourceError


@dataclass(frozen=True)
class ParquetSource:
    """A Parquet file or a directory of them; columns `group` and `split` are used where they are."""

    uri: str
    image_column: str = "image"
    label_column: str = "label"
    kind: str = "parquet"
    image_shape: tuple[int, int, int] | None = None

    @functools.cached_property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of a Hugging Face ClassLabel, if the schema has one."""
        with _open(self._files[0]) as file:
            metadata = file.schema_arrow.metadata or {}
        try:
            feature = json.loads(metadata[b"huggingface"])["info"]["features"][self.label_column]
            return tuple(str(name) for name in feature["names"])
        except (KeyError, TypeError, ValueError):
            return None

    def entries(self) -> Iterator[SourceEntry | Skipped]:
        """See Source.entries; files by name, rows in order, one block a row group."""
        block = 0
        for uri in self._files:
            with _open(uri) as file:
                self._check_columns(uri, file.schema_arrow)
                first_row = 0
                for row_group in range(file.num_row_groups):
                    yield from self._row_group_entries(uri, file, row_group, first_row, block)
                    first_row += file.metadata.row_group(row_group).num_rows
                    block += 1

    def read(self, entry: SourceEntry) -> bytes:
        """See Source.read; the row group stays in the worker's memory for the next entry."""
        row_group, row = entry.locator
        column = _load_row_group(entry.uri, file_version(entry.uri), self.image_column, row_group)
        content = column[row].as_py()
        if content is None:
            raise ImageError(Reason.EMPTY, "the image cell has no bytes")
        return content

    @functools.cached_property
    def _files(self) -> list[str]:
        if not storage.is_directory(self.uri):
            return [self.uri]
        folders = [self.uri, storage.join(self.uri, "data")]
        files = [storage.join(folder, name) for folder in folders for name in storage.list_files(folder, ".parquet")]
        if not files:
            raise SourceError(f"{self.uri} has no .parquet file.")
        return files

    def _check_columns(self, uri: str, schema: pa.Schema) -> None:
        for column, option in ((self.image_column, "--image-column"), (self.label_column, "--label-column")):
            if column not in schema.names:
                raise SourceError(
                    f"{uri} has no column {column!r}. It has: {', '.join(schema.names)}. Say which with {option}."
                )
        kind = schema.field(self.image_column).type
        if pa.types.is_struct(kind):
            has_bytes = any(kind.field(i).name == "bytes" for i in range(kind.num_fields))
            if has_bytes:
                return
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return
        raise SourceError(
            f"{uri}: column {self.image_column!r} is {kind}, expected binary or a struct with a field bytes."
        )

    def _row_group_entries(
        self, uri: str, file: pq.ParquetFile, row_group: int, first_row: int, block: int
    ) -> Iterator[SourceEntry]:
        schema = file.schema_arrow
        columns = [self.label_column, *(name for name in ("group", "split") if name in schema.names)]
        kind = schema.field(self.image_column).type
        has_paths = pa.types.is_struct(kind) and any(kind.field(i).name == "path" for i in range(kind.num_fields))
        if has_paths:
            columns.append(f"{self.image_column}.path")
        table = file.read_row_group(row_group, columns=columns, use_threads=False)
        num_rows = table.num_rows
        labels = table.column(self.label_column).to_pylist()
        groups = table.column("group").to_pylist() if "group" in columns else [None] * num_rows
        splits = table.column("split").to_pylist() if "split" in columns else [None] * num_rows
        images = table.column(self.image_column).to_pylist() if has_paths else [None] * num_rows
        base = posixpath.basename(uri)
        split_of_uri = split_of_file(base)
        size = _image_bytes(file, row_group, self.image_column) // max(1, num_rows)
        for row in range(num_rows):
            path = (images[row] or {}).get("path") or f"{base}/{first_row + row:06d}"
            label = self._label(labels[row])
            yield SourceEntry(
                uri=uri,
                path=path,
                locator=(row_group, row),
                label=label,
                group=label_text(groups[row]),
                split=check_split(splits[row], f"{uri}, row {first_row + row}") or split_of_uri,
                size_bytes=size,
                block=block,
                problem=Reason.MISSING_LABEL if label is None else None,
                detail="" if label is not None else f"row {first_row + row} has no label",
            )

    def _label(self, value: Any) -> str | None:
        if isinstance(value, int) and self.class_names is not None:
            if value == -1:  # Hugging Face's mark for "no label", as in test sets
                return None
            return self.class_names[value] if 0 <= value < len(self.class_names) else str(value)
        return label_text(value)


def _open(uri: str) -> pq.ParquetFile:
    try:
        if storage.is_local(uri):
            return pq.ParquetFile(uri.removeprefix("file://"))
        return pq.ParquetFile(storage.open_ranges(uri), pre_buffer=True)
    except (pa.ArrowException, OSError) as error:
        if storage.is_transient(error, uri):
            raise
        raise SourceError(f"{uri} is not a readable Parquet file: {error}") from None


@functools.lru_cache(maxsize=2)
def _load_row_group(uri: str, version: tuple[int, ...], image_column: str, row_group: int) -> pa.Array:
    with _open(uri) as file:
        try:
            column = (
                file.read_row_group(row_group, columns=[image_column], use_threads=False).column(0).combine_chunks()
            )
        except (pa.ArrowException, OSError) as error:
            if storage.is_transient(error, uri):
                raise
            raise ImageError(Reason.CORRUPT, f"row group {row_group} of {uri}: {error}") from None
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0)
    return column.field("bytes") if pa.types.is_struct(column.type) else column


def _image_bytes(file: pq.ParquetFile, row_group: int, image_column: str) -> int:
    metadata = file.metadata.row_group(row_group)
    names = (image_column, f"{image_column}.bytes")
    columns = (metadata.column(i) for i in range(metadata.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema in names)
