"""What every source of images is: a deterministic stream of entries, and a way to read one entry in a worker."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from manyeyes import storage
from manyeyes.errors import ImageError, Reason, SourceError

# What the decoder reads, then what is surely an image but can't be read: that goes to quarantine, not aside.
READABLE_SUFFIXES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "tif", "tiff", "gif")
UNREADABLE_SUFFIXES = (
    "heic",
    "heif",
    "avif",
    "jxl",
    "svg",
    "psd",
    "ico",
    "jp2",
    "ppm",
    "pgm",
    "exr",
    "hdr",
    "dng",
)
_IMAGE_SUFFIXES = frozenset(READABLE_SUFFIXES + UNREADABLE_SUFFIXES)

_SPLIT_OF_ALIAS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, slots=True)
class SourceEntry:
    """One input that should become an example.

    Attributes:
        uri: the file or the container that holds the image.
        path: the name of the image in its source, kept in shards and quarantine.
        locator: () the whole file; (offset, size) in a tar; (row group, row) in Parquet; (index,) in an IDX file.
        label: the class as the source names it, or None.
        group: what must not straddle splits (a patient, a video), or None.
        split: "train", "val" or "test" where the source says so, else None.
        size_bytes: of the encoded image, estimated if need be; -1 where asking would cost a call per file.
        block: entries of one block are read together at little cost; the shuffle keeps them together.
        problem: why the entry can't be used, where the listing already knows.
        detail: what was found, for people.
    """

    uri: str
    path: str
    locator: tuple[int, ...] = ()
    label: str | None = None
    group: str | None = None
    split: str | None = None
    size_bytes: int = -1
    block: int = 0
    problem: Reason | None = None
    detail: str = ""

    def to_json(self) -> list[Any]:
        """The fields in order, as JSON values."""
        return [
            self.uri,
            self.path,
            self.locator,
            self.label,
            self.group,
            self.split,
            self.size_bytes,
            self.block,
            self.problem,
            self.detail,
        ]

    @classmethod
    def from_json(cls, values: list[Any]) -> SourceEntry:
        """The inverse of `to_json`."""
        uri, path, locator, label, group, split, size, block, problem, detail = values
        reason = None if problem is None else Reason(problem)
        return cls(uri, path, tuple(locator), label, group, split, size, block, reason, detail)


@dataclass(frozen=True, slots=True)
class Skipped:
    """An input that is not an example by design, with the reason: hidden_file, not_an_image_name …"""

    path: str
    reason: str


class Source(Protocol):
    """A place with labelled images. Picklable: workers get a copy and read from it.

    Attributes:
        kind: "folder", "table", "idx", "webdataset" or "parquet".
        uri: as the user gave it.
    """

    @property
    def kind(self) -> str:
        """The name of the kind, as --source-kind takes it."""
        ...

    @property
    def uri(self) -> str:
        """Where the source is."""
        ...

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The names of integer labels where the source knows them, else None."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of every image where the source knows it beforehand, else None."""
        ...

    def entries(self) -> Iterator[SourceEntry | Skipped]:
        """Yield every input, in an order that depends on nothing but the content of the source.

        Raises:
            SourceError: the source as a whole can't be understood.
        """
        ...

    def read(self, entry: SourceEntry) -> bytes | np.ndarray:
        """Return the encoded image, or its pixels as uint8 (H, W, C) where the source holds pixels.

        Raises:
            ImageError: this entry can't be read.
        """
        ...


def has_image_name(name: str) -> bool:
    """Whether the extension is that of an image, in any case."""
    return name.rpartition(".")[2].lower() in _IMAGE_SUFFIXES and "." in name


def split_of_name(name: str) -> str | None:
    """The split that a folder's name means (`valid`, `Testing` …), or None."""
    return _SPLIT_OF_ALIAS.get(name.lower())


def split_of_file(name: str) -> str | None:
    """The split that a file's first word means (train-00000.tar, test-images-…), or None."""
    return split_of_name(re.split(r"[-_.]", name, maxsplit=1)[0])


def check_split(value: str | None, where: str) -> str | None:
    """Return the split that a table's cell means; empty is None.

    Raises:
        SourceError: the cell says something else.
    """
    if value is None or not str(value).strip():
        return None
    split = split_of_name(str(value).strip())
    if split is None:
        raise SourceError(f"{where}: split {value!r} is unknown. Use train, val or test, or leave it empty.")
    return split


def label_text(value: Any) -> str | None:
    """A label as text: 3 and 3.0 are "3", blank is None."""
    if value is None:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    return text or None


def file_version(uri: str) -> tuple[int, ...]:
    """A part of the key of what is kept of a container: another where a local file was written anew, else ()."""
    if not storage.is_local(uri):
        return ()
    try:
        status = os.stat(uri.removeprefix("file://"))  # noqa: PTH116
    except OSError:
        return ()  # reading it will say so
    return status.st_mtime_ns, status.st_size


def read_image_file(uri: str, start: int | None = None, end: int | None = None) -> bytes:
    """Read a file, or bytes [start, end) of it.

    Raises:
        ImageError: it can't be read here and now and never will (missing, forbidden, a folder).
        OSError: something that another attempt may mend (a network, a busy server).
    """
    try:
        if storage.is_local(uri):
            with open(uri.removeprefix("file://"), "rb", buffering=0) as file:
                if start:
                    file.seek(start)
                return file.read(-1 if end is None else end - (start or 0))
        return storage.read_bytes(uri, start, end)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise ImageError(Reason.UNREADABLE, f"{type(error).__name__}: {uri}") from None
    except OSError as error:
        if storage.is_local(uri):
            raise ImageError(Reason.UNREADABLE, f"{error}") from None
        raise
