"""IDX files, as MNIST and its family come: pairs of images and labels, plain or gzipped."""

from __future__ import annotations

import functools
import gzip
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from manyeyes import storage
from manyeyes.data.sources.base import Skipped, SourceEntry, file_version, read_image_file, split_of_name
from manyeyes.errors import ImageError, Reason, SourceError

_IMAGES_NAME = re.compile(r"^(?P<prefix>.*?)[-_.]?images[-.]idx[34]-ubyte(?P<gz>\.gz)?$")
_DTYPE_OF_CODE = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4"}


@dataclass(frozen=True)
class _Pair:
    images: str
    labels: str
    split: str | None
    stem: str


@dataclass(frozen=True)
class _Header:
    dtype: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class IdxSource:
    """A directory with pairs of *-images-idx3-ubyte and *-labels-idx1-ubyte files, or one images file."""

    uri: str
    kind: str = "idx"
    class_names: tuple[str, ...] | None = None

    @functools.cached_property
    def image_shape(self) -> tuple[int, int, int] | None:
        """See Source.image_shape."""
        shapes = {_image_shape(pair.images, _read_header(pair.images)) for pair in self._pairs[0]}
        return shapes.pop() if len(shapes) == 1 else None

    def entries(self) -> Iterator[SourceEntry | Skipped]:
        """See Source.entries; in the order of the files."""
        pairs, others = self._pairs
        for name in others:
            yield Skipped(name, "hidden_file" if name.startswith(".") else "not_an_idx_pair")
        block = 0
        for pair in pairs:
            header = _read_header(pair.images)
            height, width, channels = _image_shape(pair.images, header)
            labels = _load(pair.labels)
            if labels.ndim != 1:
                raise SourceError(f"{pair.labels} has {labels.ndim} dimensions, expected 1: one label an image.")
            if len(labels) != header.shape[0]:
                raise SourceError(
                    f"{pair.images} says {header.shape[0]} images, but {pair.labels} has {len(labels)} labels. "
                    "They are not a pair, or one is cut short."
                )
            if not pair.images.endswith(".gz"):
                _check_length(pair.images, header, storage.size_bytes(pair.images))
            for index, label in enumerate(labels.tolist()):
                yield SourceEntry(
                    uri=pair.images,
                    path=f"{pair.stem}/{index:06d}",
                    locator=(index,),
                    label=str(label),
                    split=pair.split,
                    size_bytes=height * width * channels,
                    block=block,
                )
                block += 1

    def read(self, entry: SourceEntry) -> np.ndarray:
        """See Source.read; pixels, not encoded bytes."""
        (index,) = entry.locator
        if entry.uri.endswith(".gz"):
            images = _load_cached(entry.uri, file_version(entry.uri))
            image = images[index]
            return image.reshape(*image.shape[:2], -1)
        header = _header_cached(entry.uri, file_version(entry.uri))
        shape = _image_shape(entry.uri, header)
        start = header.offset + index * int(np.prod(shape))
        content = read_image_file(entry.uri, start, start + int(np.prod(shape)))
        if len(content) != int(np.prod(shape)):
            raise ImageError(Reason.TRUNCATED, f"{entry.uri} ends before image {index}")
        return np.frombuffer(content, np.uint8).reshape(shape)

    @functools.cached_property
    def _pairs(self) -> tuple[list[_Pair], list[str]]:
        if storage.is_directory(self.uri):
            folder, names = self.uri, storage.list_files(self.uri)
            wanted = names
        else:
            folder, own_name = storage.split(self.uri)
            names = storage.list_files(folder)
            wanted = [own_name]
        pairs, used = [], set()
        for name in wanted:
            match = _IMAGES_NAME.match(name)
            # Where a file lies both plain and gzipped, the plain one is taken.
            if not match or (match["gz"] and name.removesuffix(".gz") in wanted):
                continue
            labels_stem = re.sub(r"images(?=[-.]idx[34])", "labels", name.removesuffix(".gz"))
            labels_stem = re.sub(r"idx[34](?=-ubyte$)", "idx1", labels_stem)
            labels = next((found for found in (labels_stem, labels_stem + ".gz") if found in names), None)
            if labels is None:
                raise SourceError(f"{storage.join(folder, name)} has no labels: {labels_stem}[.gz] is not beside it.")
            used |= {name, labels}
            prefix = match["prefix"]
            last_word = re.split(r"[-_.]", prefix)[-1]
            split = "test" if last_word == "t10k" else split_of_name(last_word)
            pairs.append(
                _Pair(storage.join(folder, name), storage.join(folder, labels), split, prefix or "images"),
            )
        if not pairs:
            raise SourceError(
                f"{self.uri} has no file named …-images-idx3-ubyte[.gz]. Found: {', '.join(names[:10]) or 'nothing'}."
            )
        return pairs, [name for name in wanted if name not in used]


def is_idx_name(name: str) -> bool:
    """Whether a file is the images half of an IDX pair by its name."""
    return _IMAGES_NAME.match(name) is not None


def _parse_header(uri: str, content: bytes) -> _Header:
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPE_OF_CODE or not 1 <= content[3] <= 4:
        raise SourceError(
            f"{uri} is not an IDX file: it begins with {content[:4].hex() or 'nothing'}, expected 0000080n."
        )
    num_dimensions = content[3]
    if len(content) < 4 + 4 * num_dimensions:
        raise SourceError(f"{uri} is cut short: its header is not whole.")
    shape = tuple(np.frombuffer(content, ">i4", num_dimensions, 4).tolist())
    return _Header(_DTYPE_OF_CODE[content[2]], shape, 4 + 4 * num_dimensions)


def _read_header(uri: str) -> _Header:
    try:
        with storage.open_read(uri) as file:
            content = gzip.GzipFile(fileobj=file).read(20) if uri.endswith(".gz") else file.read(20)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{uri} can't be read: {error}") from None
    return _parse_header(uri, content)


@functools.lru_cache(maxsize=16)
def _header_cached(uri: str, version: tuple[int, ...]) -> _Header:
    return _read_header(uri)


def _check_length(uri: str, header: _Header, num_bytes: int) -> None:
    expected = header.offset + int(np.prod(header.shape)) * np.dtype(header.dtype).itemsize
    if num_bytes != expected:
        raise SourceError(
            f"{uri} has {num_bytes} bytes, its header {header.shape} asks for {expected}. The file is damaged."
        )


def _load(uri: str) -> np.ndarray:
    try:
        content = storage.read_bytes(uri)
        if uri.endswith(".gz"):
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(f"{uri} can't be read: {error}. The file is damaged or cut short.") from None
    header = _parse_header(uri, content)
    _check_length(uri, header, len(content))
    return np.frombuffer(content, header.dtype, offset=header.offset).reshape(header.shape)


# A gzipped file has no random access: a worker unpacks it once, and keeps two, as tasks of two splits take turns.
@functools.lru_cache(maxsize=2)
def _load_cached(uri: str, version: tuple[int, ...]) -> np.ndarray:
    return _load(uri)


def _image_shape(uri: str, header: _Header) -> tuple[int, int, int]:
    if header.dtype != ">u1":
        raise SourceError(f"{uri} holds {header.dtype} values, expected unsigned bytes.")
    if len(header.shape) == 3:
        return header.shape[1], header.shape[2], 1
    if len(header.shape) == 4 and header.shape[3] in (1, 3):
        return header.shape[1], header.shape[2], header.shape[3]
    raise SourceError(f"{uri} has shape {header.shape}, expected (n, height, width) or (n, height, width, 1 or 3).")
