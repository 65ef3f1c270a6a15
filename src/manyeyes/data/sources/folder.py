"""A folder tree: class = folder; a first level of train/val/test is the split."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from manyeyes import storage
from manyeyes.data.sources.base import Skipped, SourceEntry, has_image_name, read_image_file, split_of_name
from manyeyes.errors import Reason


@dataclass(frozen=True, slots=True)
class _Item:
    """A directory entry: kind is "file", "directory", "loop" (a link to a folder above it) or "other"."""

    name: str
    kind: str
    size_bytes: int


@dataclass(frozen=True)
class FolderSource:
    """Images under one folder per class; folders below a class belong to it."""

    uri: str
    kind: str = "folder"
    class_names: tuple[str, ...] | None = None
    image_shape: tuple[int, int, int] | None = None

    def entries(self) -> Iterator[SourceEntry | Skipped]:
        """See Source.entries; in the order of storage.iterate_directory, which is that of the bytes of the paths."""
        has_splits = has_split_level(self.uri)
        block = 0
        for found in self._walk(self.uri, "", frozenset()):
            if isinstance(found, Skipped):
                yield found
                continue
            path, size_bytes, problem = found
            parts = path.split("/")[:-1]
            split = split_of_name(parts[0]) if has_splits and parts else None
            classes = parts[1:] if has_splits else parts
            label = classes[0] if classes else None
            detail = ""
            if label is None and problem is None:
                problem, detail = Reason.MISSING_LABEL, "the image lies in no class folder"
            yield SourceEntry(
                uri=storage.join(self.uri, path),
                path=_readable(path),
                label=None if label is None else _readable(label),
                split=split,
                size_bytes=size_bytes,
                block=block,
                problem=problem,
                detail=detail,
            )
            block += 1

    def read(self, entry: SourceEntry) -> bytes:
        """See Source.read."""
        return read_image_file(entry.uri)

    def _walk(self, uri: str, prefix: str, above: frozenset[str]) -> Iterator[tuple[str, int, Reason | None] | Skipped]:
        """`above`: the real paths of the folders on the way here, so that links between folders end."""
        if storage.is_local(uri):
            above |= {os.path.realpath(uri.removeprefix("file://"))}
        try:
            for item in _list(uri, above):
                path = f"{prefix}/{item.name}" if prefix else item.name
                if not item.name:
                    # A key of S3 with two slashes in a row: no path leads there.
                    yield Skipped(path, "folder_without_a_name")
                elif item.name.startswith("."):
                    yield Skipped(path, "hidden_folder" if item.kind == "directory" else "hidden_file")
                elif item.kind == "directory":
                    yield from self._walk(storage.join(uri, item.name), path, above)
                elif item.kind == "loop":
                    yield Skipped(path, "link_to_a_folder_above")
                elif not has_image_name(item.name):
                    yield Skipped(path, "not_an_image_name")
                elif item.kind == "other":
                    yield Skipped(path, "not_a_file")
                else:
                    yield path, item.size_bytes, None
        except PermissionError:
            yield prefix, -1, Reason.UNREADABLE


def has_split_level(uri: str) -> bool:
    """Whether all folders of the first level are named after splits."""
    names = (item.name for item in _list(uri, frozenset()) if item.kind == "directory")
    found = [split_of_name(name) for name in names if name and not name.startswith(".")]
    return bool(found) and all(found)


def _list(uri: str, above: frozenset[str]) -> Iterator[_Item]:
    if storage.is_local(uri):
        yield from _list_local(uri.removeprefix("file://"), above)
        return
    for item in storage.iterate_directory(uri):
        yield _Item(item.name, "directory" if item.is_directory else "file", item.size_bytes)


def _list_local(folder: str, above: frozenset[str]) -> Iterator[_Item]:
    names = storage.local_names(folder)
    real_folder = os.path.realpath(folder)
    # What else is to be known of one is asked when it is its turn.
    for name in names:
        yield _local_item(folder, os.fsdecode(name), real_folder, above)


def _local_item(folder: str, name: str, real_folder: str, above: frozenset[str]) -> _Item:
    path = f"{folder.rstrip('/')}/{name}"
    if name.endswith("/"):
        name, path = name[:-1], path[:-1]
        target = os.path.realpath(path) if os.path.islink(path) else ""  # noqa: PTH114
        is_above = (real_folder + os.sep).startswith(target.rstrip(os.sep) + os.sep)
        is_loop = bool(target) and (is_above or target in above)
        return _Item(name, "loop" if is_loop else "directory", 0)
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        # A link to nothing, or a file that has gone: an input that can't be read, not one to pass over.
        return _Item(name, "file", 0)
    return _Item(name, "file" if stat.S_ISREG(status.st_mode) else "other", status.st_size)


def _readable(path: str) -> str:
    # A name that is not UTF-8 arrives with surrogates, which Parquet can't hold; only the URI keeps them.
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
