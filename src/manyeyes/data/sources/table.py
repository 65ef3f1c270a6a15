"""A table of images: CSV, TSV or JSON Lines with columns path, label and optionally group and split."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manyeyes import storage
from manyeyes.data.sources.base import Skipped, SourceEntry, check_split, label_text, read_image_file
from manyeyes.errors import Reason, SourceError

TABLE_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class TableSource:
    """One row an image; paths are relative to the table, absolute, or URIs."""

    uri: str
    kind: str = "table"
    class_names: tuple[str, ...] | None = None
    image_shape: tuple[int, int, int] | None = None
    # Prediction reads tables without labels.
    needs_labels: bool = True

    def entries(self) -> Iterator[SourceEntry | Skipped]:
        """See Source.entries; in the order of the table."""
        folder, _ = storage.split(self.uri)
        rows = self._json_rows() if self.uri.lower().endswith((".jsonl", ".ndjson")) else self._csv_rows()
        for block, (line, row) in enumerate(rows):
            where = f"{self.uri}, line {line}"
            path = str(row.get("path") or "").strip()
            label = label_text(row.get("label"))
            uri = path if path.startswith("/") or "://" in path else storage.join(folder, path)
            problem, detail = None, ""
            if not path:
                path, uri = f"{posixpath.basename(self.uri)}:{line}", ""
                problem, detail = Reason.UNREADABLE, f"line {line} has no path"
            elif label is None:
                problem, detail = Reason.MISSING_LABEL, f"line {line} has no label"
            yield SourceEntry(
                uri=uri,
                path=path,
                label=label,
                group=label_text(row.get("group")),
                split=check_split(row.get("split"), where),
                size_bytes=_local_size(uri),
                block=block,
                problem=problem,
                detail=detail,
            )

    def read(self, entry: SourceEntry) -> bytes:
        """See Source.read."""
        return read_image_file(entry.uri)

    def _csv_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        delimiter = "\t" if self.uri.lower().endswith(".tsv") else ","
        with storage.open_read(self.uri) as file, io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            reader = csv.DictReader(text, delimiter=delimiter, skipinitialspace=True)
            try:
                self._check_columns([name.strip() for name in reader.fieldnames or []])
                reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
                for row in reader:
                    if None in row:
                        raise SourceError(
                            f"{self.uri}, line {reader.line_num}: more cells than columns. "
                            f"Put cells with a {delimiter!r} in quotes."
                        )
                    yield reader.line_num, row
            except (csv.Error, UnicodeDecodeError) as error:
                raise SourceError(f"{self.uri}, near line {reader.line_num}: not a UTF-8 CSV table: {error}") from None

    def _json_rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with storage.open_read(self.uri) as file:
            for line, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except ValueError as error:
                    raise SourceError(f"{self.uri}, line {line}: not JSON: {error}") from None
                if not isinstance(row, dict) or "path" not in row:
                    raise SourceError(f'{self.uri}, line {line}: expected an object with "path" and "label".')
                yield line, row

    def _check_columns(self, columns: list[str]) -> None:
        needed = ("path", "label") if self.needs_labels else ("path",)
        missing = [name for name in needed if name not in columns]
        if missing:
            found = ", ".join(columns) or "nothing"
            raise SourceError(
                f"{self.uri}: the first line must name the columns {' and '.join(needed)} "
                f"(and may name group and split). Missing: {', '.join(missing)}. Found: {found}."
            )


def _local_size(uri: str) -> int:
    if not uri or not storage.is_local(uri):
        return -1
    try:
        return Path(uri.removeprefix("file://")).stat().st_size
    except OSError:
        return -1
