"""Reads a dataset directory: its manifest, and its shards by row group."""

from __future__ import annotations

import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes import storage
from manyeyes.data.manifest import SHARDS, Manifest, ShardInfo
from manyeyes.errors import ConfigError, DatasetError
from manyeyes.imaging.preprocessing import Preprocessing

# Below this a dataset is checked against its SHA-256 sums when it is opened for training; above, page by page.
FULL_CHECK_BYTES = 1 << 30
_MEND = "Restore the file, or ingest again with --overwrite."


@dataclass(frozen=True)
class RowGroup:
    """Rows of one row group of a shard.

    Attributes:
        images: raw encoding: uint8 array (n, height, width, channels), a read-only view of the file's pages;
            jpeg encoding: a list of n encoded images as bytes.
        labels: int32 (n,).
        paths: n source paths.
        groups: n group names or None.
    """

    images: np.ndarray | list[bytes]
    labels: np.ndarray
    paths: list[str]
    groups: list[str | None]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> RowGroup:
        """Only these rows, int (n,)."""
        if len(rows) == len(self):
            return self
        images = self.images[rows] if isinstance(self.images, np.ndarray) else [self.images[row] for row in rows]
        return RowGroup(
            images, self.labels[rows], [self.paths[row] for row in rows], [self.groups[row] for row in rows]
        )


@dataclass(frozen=True)
class Split:
    """The examples of one split: shards in order; example_index counts their rows from 0."""

    name: str
    shards: tuple[ShardInfo, ...]

    @cached_property
    def num_examples(self) -> int:
        """The number of rows in all shards."""
        return sum(shard.num_rows for shard in self.shards)

    @cached_property
    def row_groups(self) -> tuple[tuple[int, int], ...]:
        """(index of the shard in `shards`, row group in that shard) for every row group, in order."""
        return tuple((s, g) for s, shard in enumerate(self.shards) for g in range(len(shard.row_group_rows)))

    @cached_property
    def row_group_rows(self) -> np.ndarray:
        """The number of rows of every row group, int64, in the order of `row_groups`."""
        return np.array([rows for shard in self.shards for rows in shard.row_group_rows], dtype=np.int64)

    @cached_property
    def row_group_starts(self) -> np.ndarray:
        """The example_index of the first row of every row group, int64."""
        return np.cumsum(self.row_group_rows) - self.row_group_rows


class Dataset:
    """A dataset directory opened for reading.

    Args:
        uri: where the directory is.
        verify: "size" checks that every shard is there with its size; "full" also reads all bytes and compares their
            SHA-256; "auto" is full below 1 GiB. The pages that are read later are always checked by their own CRC.

    Raises:
        DatasetError: no manifest, a missing or damaged shard, or another decoder made it.
    """

    def __init__(self, uri: str, verify: str = "size") -> None:
        self.uri = str(uri)
        self.manifest = Manifest.load(self.uri)
        try:
            self.preprocessing = Preprocessing.from_dict(self.manifest.preprocessing)
        except ConfigError as error:
            raise DatasetError(f"{self.uri} can't be used: {error}") from None
        if self.preprocessing.fingerprint != self.manifest.preprocessing_fingerprint:
            raise DatasetError(
                f"{self.uri}: the preprocessing in the manifest has fingerprint {self.preprocessing.fingerprint}, "
                f"but the dataset was written with {self.manifest.preprocessing_fingerprint}. "
                "The manifest was changed; ingest again with --overwrite."
            )
        self.verify(verify)

    @property
    def class_names(self) -> tuple[str, ...]:
        """label i is class_names[i]."""
        return self.manifest.class_names

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(height, width, channels) of every stored image, or None where they differ."""
        return self.manifest.image_shape

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits that have examples, in the order in which they are first found."""
        return tuple(dict.fromkeys(shard.split for shard in self.manifest.shards))

    def split(self, name: str) -> Split:
        """Return the split `name`.

        Raises:
            DatasetError: the dataset has no such split.
        """
        shards = tuple(shard for shard in self.manifest.shards if shard.split == name)
        if not shards:
            raise DatasetError(f"{self.uri} has no split {name!r}. It has: {', '.join(self.split_names) or 'none'}.")
        return Split(name, shards)

    def shard_uri(self, shard: ShardInfo) -> str:
        """The URI of a shard's file."""
        return storage.join(self.manifest.view_of or self.uri, SHARDS, shard.name)

    def verify(self, how: str = "full") -> None:
        """Compare the shards with the manifest; see the class for `how`."""
        if how == "auto":
            how = "full" if sum(shard.size_bytes for shard in self.manifest.shards) < FULL_CHECK_BYTES else "size"
        for shard in self.manifest.shards:
            uri = self.shard_uri(shard)
            try:
                size = storage.size_bytes(uri)
            except FileNotFoundError:
                mend = _MEND
                if self.manifest.view_of is not None:
                    mend = f"{self.uri} is a view of that dataset, which was moved or deleted. Make it again."
                raise DatasetError(f"{uri} is missing, but the manifest lists it. {mend}") from None
            if size != shard.size_bytes:
                raise DatasetError(f"{uri} has {size} bytes, the manifest says {shard.size_bytes}. {_MEND}")
            if how == "full" and (found := storage.sha256_of_file(uri)) != shard.sha256:
                raise DatasetError(
                    f"{uri} fails its checksum: SHA-256 {found[:12]}…, the manifest says {shard.sha256[:12]}…. {_MEND}"
                )

    def open_shard(self, shard: ShardInfo) -> ShardReader | ViewReader:
        """Open one shard for random access by row group.

        Raises:
            DatasetError: it is missing or damaged.
            OSError: a remote file system does not give it here and now.
        """
        reader = self._open_file(shard)
        return reader if shard.rows is None else ViewReader(reader, shard)

    def _open_file(self, shard: ShardInfo) -> ShardReader:
        uri = self.shard_uri(shard)
        shape = self.image_shape if self.manifest.encoding == "raw" else None
        if storage.is_local(uri):
            return ShardReader(uri, shape)
        key = (os.getpid(), uri, shard.sha256)
        with _idle_lock:
            idle = _idle.pop(key, None)
        return idle or ShardReader(uri, shape, key)

    def rows(self, shard: ShardInfo) -> Iterator[RowGroup]:
        """Read one shard from its first row group to its last."""
        with self.open_shard(shard) as reader:
            for index in range(len(shard.row_group_rows)):
                yield reader.read(index)


class ShardReader:
    """Random access to the row groups of one shard; not to be shared between threads.

    Args:
        uri: of the shard.
        raw_shape: (height, width, channels) where it holds pixels.
        idle_key: by this it is kept open after use, for the next one to read a row group of the same shard.
    """

    def __init__(
        self, uri: str, raw_shape: tuple[int, int, int] | None, idle_key: tuple[int, str, str] | None = None
    ) -> None:
        self.uri = uri
        self._raw_shape = raw_shape
        self._idle_key = idle_key
        try:
            if storage.is_local(uri):
                path = uri.removeprefix("file://")
                self._file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
            else:
                # With pre_buffer the columns of a row group come in one request.
                opened = storage.open_ranges(uri)
                self._file = pq.ParquetFile(opened, page_checksum_verification=True, pre_buffer=True)
        except (pa.ArrowException, OSError) as error:
            if storage.is_transient(error, self.uri):
                raise
            raise DatasetError(f"{uri} can't be read: {error}. {_MEND}") from None

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._idle_key is None or kind is not None:
            self.close()
            return
        with _idle_lock:
            others = [_idle.pop(self._idle_key, None)]
            _idle[self._idle_key] = self
            while len(_idle) > _MAX_IDLE or (len(_idle) > 1 and _held_bytes() > _MAX_IDLE_BYTES):
                others.append(_idle.popitem(last=False)[1])
        for other in others:
            if other is not None:
                other.close()

    @functools.cached_property
    def row_group_bytes(self) -> int:
        """The size of the largest row group, in bytes."""
        metadata = self._file.metadata
        return max((metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)), default=0)

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        self._file.close(force=True)

    def read(self, index: int, columns: Sequence[str] = ("image", "label", "group")) -> RowGroup:
        """Read row group `index`.

        Raises:
            DatasetError: a page fails its checksum.
            OSError: a remote file system does not give it here and now.
        """
        table = self.read_table(index, columns)
        image = table.column("image").combine_chunks()
        if isinstance(image, pa.ChunkedArray):
            image = image.chunk(0)
        encoded, paths = image.field("bytes"), image.field("path").to_pylist()
        groups = table.column("group").to_pylist() if "group" in table.column_names else [None] * table.num_rows
        # By hand, as PyArrow's own way to NumPy loads pandas first: half a second of CPU in each worker.
        label = table.column("label").cast(pa.int32()).combine_chunks()
        labels = np.frombuffer(label.buffers()[1], np.int32, count=len(label), offset=4 * label.offset)
        images: np.ndarray | list[bytes]
        if self._raw_shape is None:
            images = encoded.to_pylist()
        else:
            # All values have one length, so the data buffer of the column is the batch itself.
            _, offset_buffer, data_buffer = encoded.buffers()
            offsets = np.frombuffer(offset_buffer, np.int32, count=len(encoded) + 1, offset=4 * encoded.offset)
            pixels = np.frombuffer(data_buffer, dtype=np.uint8)[offsets[0] : offsets[-1]]
            images = pixels.reshape(len(encoded), *self._raw_shape)
        return RowGroup(images, labels, paths, groups)

    def read_table(self, index: int, columns: Sequence[str]) -> pa.Table:
        """Read some columns of row group `index` as they are: "label", "group", "phash", "image.path" …

        Raises:
            DatasetError: a page fails its checksum.
            OSError: a remote file system does not give it here and now.
        """
        try:
            return self._file.read_row_group(index, columns=list(columns), use_threads=False)
        except (pa.ArrowException, OSError) as error:
            if storage.is_transient(error, self.uri):
                raise
            raise DatasetError(f"{self.uri} fails its checksum in row group {index}: {error}. {_MEND}") from None


class ViewReader:
    """The rows of a shard that belong to a view, by row group of the view."""

    def __init__(self, reader: ShardReader, shard: ShardInfo) -> None:
        self._reader = reader
        starts = np.cumsum([0, *shard.file_row_group_rows])
        rows = shard.file_rows()
        group_of = np.searchsorted(starts, rows, side="right") - 1
        # Row groups of which no row belongs to the view are none of its own.
        self._groups = [(int(group), rows[group_of == group] - starts[group]) for group in np.unique(group_of)]

    def __enter__(self) -> ViewReader:
        self._reader.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._reader.__exit__(kind, *rest)

    @property
    def row_group_bytes(self) -> int:
        """See ShardReader: whole row groups are read."""
        return self._reader.row_group_bytes

    def close(self) -> None:
        """Close the file; arrays that were read stay valid."""
        self._reader.close()

    def read(self, index: int, columns: Sequence[str] = ("image", "label", "group")) -> RowGroup:
        """See ShardReader."""
        group, rows = self._groups[index]
        return self._reader.read(group, columns).take(rows)

    def read_table(self, index: int, columns: Sequence[str]) -> pa.Table:
        """See ShardReader."""
        group, rows = self._groups[index]
        return self._reader.read_table(group, columns).take(pa.array(rows))


# Shards on remote file systems that stay open, the longest unused first: opening one takes requests of its own, and row
# groups of one shard are read one after the other.
_MAX_IDLE = 16
# Each holds the bytes of the row group that was read last.
_MAX_IDLE_BYTES = 64 << 20
_idle: OrderedDict[tuple[int, str, str], ShardReader] = OrderedDict()
_idle_lock = threading.Lock()


def _held_bytes() -> int:
    return sum(reader.row_group_bytes for reader in _idle.values())
