"""A folder tree: class = folder; a first level of train/val/test is the split."""

from __future__ import annotations

import os
import posixpath
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
        """See Source.entries; sorted by name at every level."""
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
            items = _list(uri, above)
        except PermissionError:
            yield prefix, -1, Reason.UNREADABLE
            return
        for item in items:
            path = f"{prefix}/{item.name}" if prefix else item.name
            if item.name.startswith("."):
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


def has_split_level(uri: str) -> bool:
    """Whether all folders of the first level are named after splits."""
    names = [
        item.name for item in _list(uri, frozenset()) if item.kind == "directory" and not item.name.startswith(".")
    ]
    return bool(names) and all(split_of_name(name) for name in names)


def _list(uri: str, above: frozenset[str]) -> list[_Item]:
    if storage.is_local(uri):
        return _list_local(uri.removeprefix("file://"), above)
    fs, path = storage.filesystem(uri)
    items = [
        _Item(posixpath.basename(found["name"].rstrip("/")), found["type"], found.get("size") or 0)
        for found in fs.ls(path, detail=True)
        if found["name"].rstrip("/") != path.rstrip("/")
    ]
    return sorted(items, key=lambda item: item.name)


def _list_local(folder: str, above: frozenset[str]) -> list[_Item]:
    items = []
    real_folder = os.path.realpath(folder)
    with os.scandir(folder) as found:
        for entry in found:
            if entry.is_dir():
                target = os.path.realpath(entry.path) if entry.is_symlink() else ""
                is_above = (real_folder + os.sep).startswith(target.rstrip(os.sep) + os.sep)
                is_loop = bool(target) and (is_above or target in above)
                items.append(_Item(entry.name, "loop" if is_loop else "directory", 0))
            elif entry.is_file():
                items.append(_Item(entry.name, "file", entry.stat().st_size))
            else:
                # A broken link is an input that can't be read, not one to pass over.
                items.append(_Item(entry.name, "file" if entry.is_symlink() else "other", 0))
    return sorted(items, key=lambda item: item.name)


def _readable(path: str) -> str:
    # A name that is not UTF-8 arrives with surrogates, which Parquet can't hold; only the URI keeps them.
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
