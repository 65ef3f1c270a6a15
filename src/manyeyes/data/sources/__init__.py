"""Sources: where labelled images come from. `open_source` finds out which kind lies at a URI."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Callable

from manyeyes import storage
from manyeyes.data.manifest import MANIFEST_NAME, SHARDS
from manyeyes.data.sources.base import Skipped, Source, SourceEntry, has_image_name
from manyeyes.data.sources.folder import FolderSource
from manyeyes.data.sources.idx import IdxSource, is_idx_name
from manyeyes.data.sources.parquet import ParquetSource
from manyeyes.data.sources.table import TABLE_SUFFIXES, TableSource
from manyeyes.data.sources.webdataset import WebDatasetSource, is_pattern
from manyeyes.errors import SourceError, UsageError

__all__ = ["SOURCE_KINDS", "Skipped", "Source", "SourceEntry", "detect_kind", "open_source"]

SOURCE_KINDS = ("folder", "table", "idx", "webdataset", "parquet")


def open_source(uri: str, kind: str = "auto", image_column: str = "image", label_column: str = "label") -> Source:
    """Open the source at `uri`.

    Args:
        uri: a directory, a file, or a pattern of tar files such as shards-{000..011}.tar.
        kind: one of SOURCE_KINDS, or "auto" to find out.
        image_column, label_column: of a Parquet source.

    Raises:
        SourceError: nothing is there, or its kind is not clear.
        UsageError: there is no such kind.
    """
    if kind == "auto":
        kind = detect_kind(uri)
    makers: dict[str, Callable[[], Source]] = {
        "folder": lambda: FolderSource(uri),
        "table": lambda: TableSource(uri),
        "idx": lambda: IdxSource(uri),
        "webdataset": lambda: WebDatasetSource(uri),
        "parquet": lambda: ParquetSource(uri, image_column, label_column),
    }
    if kind not in makers:
        raise UsageError(f"--source-kind {kind!r} is unknown. Choose one of: auto, {', '.join(SOURCE_KINDS)}.")
    if not is_pattern(uri) and not storage.exists(uri):
        raise SourceError(
            f"There is nothing at {uri}. Give a folder, a table (.csv, .jsonl), a .tar or a .parquet file."
        )
    if kind == "folder" and not storage.is_directory(uri):
        raise SourceError(f"{uri} is a file, but --source-kind folder needs a folder with one folder per class.")
    return makers[kind]()


def detect_kind(uri: str) -> str:
    """Return the kind of the source at `uri`, from names only.

    Raises:
        SourceError: nothing is there, or several kinds, or none; the message lists what was found.
    """
    if is_pattern(uri):
        return "webdataset"
    if not storage.exists(uri):
        raise SourceError(
            f"There is nothing at {uri}. Give a folder, a table (.csv, .jsonl), a .tar or a .parquet file."
        )
    if not storage.is_directory(uri):
        kind = _kind_of_file(posixpath.basename(uri))
        if kind in (None, "image"):
            raise SourceError(
                f"{uri} is not a source: expected a folder, or a file that ends in .csv, .tsv, .jsonl, .parquet, .tar "
                "or -images-idx3-ubyte[.gz]."
            )
        return str(kind)
    return _detect_in_directory(uri)


def _detect_in_directory(uri: str) -> str:
    # Counted as they are listed: a folder of millions of images is not held.
    found: Counter[str] = Counter()
    directories = []
    for item in storage.iterate_directory(uri):
        if item.is_directory:
            if not item.name.startswith("."):
                directories.append(item.name)
            continue
        if item.name == MANIFEST_NAME and storage.is_directory(storage.join(uri, SHARDS)):
            raise SourceError(f"{uri} is a Manyeyes dataset already. Train on it with: manyeyes train {uri}")
        kind = _kind_of_file(item.name)
        if kind and kind != "image" and storage.ASIDE_MARK not in item.name:
            found[kind] += 1
    # A Hugging Face repository keeps its files in data/.
    if not found and directories == ["data"] and storage.list_files(storage.join(uri, "data"), ".parquet"):
        return "parquet"
    if directories or not found:
        found["folder"] = max(1, len(directories))
    if len(found) == 1:
        return next(iter(found))
    listing = ", ".join(f"{count} x {kind}" for kind, count in sorted(found.items()))
    raise SourceError(
        f"{uri} could be read in several ways: {listing}. "
        "Say which with --source-kind, or give the path of the file itself."
    )


def _kind_of_file(name: str) -> str | None:
    lower = name.lower()
    if name.startswith("."):
        return None
    if lower.endswith(TABLE_SUFFIXES):
        return "table"
    if is_idx_name(name):
        return "idx"
    if lower.endswith(".parquet"):
        return "parquet"
    if lower.endswith(".tar"):
        return "webdataset"
    return "image" if has_image_name(name) else None
