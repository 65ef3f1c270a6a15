"""What batch prediction reads: files, tables and datasets, cut into partitions that don't depend on the workers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.data.manifest import MANIFEST_NAME, ShardInfo
from manyeyes.data.sources import open_source
from manyeyes.data.sources.base import Skipped, Source, SourceEntry, has_image_name, read_image_file
from manyeyes.data.sources.folder import FolderSource
from manyeyes.data.sources.table import TABLE_SUFFIXES, TableSource
from manyeyes.data.sources.webdataset import is_pattern
from manyeyes.errors import ImageError, Reason, SourceError
from manyeyes.imaging.preprocessing import Preprocessing

# Images of one task: enough to hide its start, few enough to balance the workers.
PARTITION_IMAGES = 256
_GLOB_CHARACTERS = "*?["


@dataclass(frozen=True)
class Partition:
    """The images of one task: entries of a source, or one row group of a shard."""

    index: int
    entries: tuple[SourceEntry, ...] = ()
    shard: ShardInfo | None = None
    row_group: int = 0


class Input(Protocol):
    """Images in a fixed order. Picklable: workers get a copy and read from it."""

    def partitions(self, skipped: dict[str, int]) -> Iterator[Partition]:
        """Yield the partitions in order; inputs that are passed over are counted in `skipped` by reason."""
        ...

    def read(self, partition: Partition) -> Iterator[tuple[str, bytes | np.ndarray | ImageError]]:
        """Yield the path of every image of a partition with its bytes, its pixels, or why it can't be read."""
        ...

    def preprocessing(self, chain: Preprocessing) -> Preprocessing:
        """What of `chain`, which begins at source bytes, is left to do to the images that `read` yields."""
        ...


@dataclass(frozen=True)
class SourceInput:
    """Images as any source of ingest holds them; labels are not looked at."""

    source: Source

    def partitions(self, skipped: dict[str, int]) -> Iterator[Partition]:
        """See Input.partitions."""
        entries = self._entries(skipped)
        for index in itertools.count():
            chunk = tuple(itertools.islice(entries, PARTITION_IMAGES))
            if not chunk:
                return
            yield Partition(index, entries=chunk)

    def read(self, partition: Partition) -> Iterator[tuple[str, bytes | np.ndarray | ImageError]]:
        """See Input.read."""
        for entry in partition.entries:
            image: bytes | np.ndarray | ImageError
            if entry.problem not in (None, Reason.MISSING_LABEL, Reason.UNKNOWN_LABEL):
                image = ImageError(entry.problem, entry.detail)
            else:
                try:
                    image = self.source.read(entry)
                except ImageError as error:
                    image = error
            yield entry.path, image

    def preprocessing(self, chain: Preprocessing) -> Preprocessing:
        """See Input.preprocessing: all of it."""
        return chain

    def _entries(self, skipped: dict[str, int]) -> Iterator[SourceEntry]:
        for entry in self.source.entries():
            if isinstance(entry, Skipped):
                skipped[entry.reason] = skipped.get(entry.reason, 0) + 1
            else:
                yield entry


@dataclass(frozen=True)
class DatasetInput:
    """The examples of a dataset, of one split or all; opened once, by the driver."""

    dataset: Dataset
    split: str | None = None

    def partitions(self, skipped: dict[str, int]) -> Iterator[Partition]:
        """See Input.partitions: a row group each."""
        shards = self.dataset.split(self.split).shards if self.split else self.dataset.manifest.shards
        places = [(shard, row_group) for shard in shards for row_group in range(len(shard.row_group_rows))]
        for index, (shard, row_group) in enumerate(places):
            yield Partition(index, shard=shard, row_group=row_group)

    def read(self, partition: Partition) -> Iterator[tuple[str, bytes | np.ndarray | ImageError]]:
        """See Input.read."""
        assert partition.shard is not None
        with self.dataset.open_shard(partition.shard) as reader:
            rows = reader.read(partition.row_group)
        yield from zip(rows.paths, rows.images, strict=True)

    def preprocessing(self, chain: Preprocessing) -> Preprocessing:
        """See Input.preprocessing: the steps that ingest has not done yet."""
        return remaining_preprocessing(chain, self.dataset.preprocessing)


def open_input(source: str, split: str | None = None) -> Input:
    """Find out what `source` is: a dataset, an image, a pattern, a folder of images, a table or another container.

    Raises:
        SourceError: nothing is there, or it is nothing of these.
    """
    if storage.exists(storage.join(source, MANIFEST_NAME)):
        return DatasetInput(Dataset(source), split)
    if split is not None:
        raise SourceError(f"{source} is not a dataset, so it has no split {split!r}. Leave the split out.")
    if storage.exists(source):
        if storage.is_directory(source):
            return SourceInput(FolderSource(source))
        return SourceInput(_open_file(source))
    if source.endswith(".tar") and is_pattern(source):
        return SourceInput(open_source(source))
    if any(character in source for character in _GLOB_CHARACTERS):
        files = _glob(source)
        if not files:
            raise SourceError(f"No file matches {source}. Check the pattern, and put it in quotes.")
        return SourceInput(_FileSource(source, files))
    raise SourceError(
        f"There is nothing at {source}. Give an image, a folder, a pattern in quotes, a table or a dataset."
    )


def remaining_preprocessing(chain: Preprocessing, stored: Preprocessing) -> Preprocessing:
    """What is left of `chain` for images that were already preprocessed by `stored`.

    Where `chain` begins with `stored`, that is its other steps, so that the result is the same as from source bytes.
    A dataset that was made in another way holds images like any others: they get the whole chain.
    """
    same_pixels = (stored.background, stored.interpolation, stored.decoder) == (
        chain.background,
        chain.interpolation,
        chain.decoder,
    )
    if not same_pixels or chain.steps[: len(stored.steps)] != stored.steps:
        return chain
    return Preprocessing(
        chain.channels, chain.background, chain.interpolation, chain.steps[len(stored.steps) :], chain.decoder
    )


@dataclass(frozen=True)
class _FileSource:
    """Files that were named one by one or by a pattern."""

    uri: str
    files: tuple[str, ...]
    kind: str = "files"
    class_names: tuple[str, ...] | None = None
    image_shape: tuple[int, int, int] | None = None

    def entries(self) -> Iterator[SourceEntry | Skipped]:
        for file in self.files:
            yield SourceEntry(uri=file, path=file)

    def read(self, entry: SourceEntry) -> bytes:
        return read_image_file(entry.uri)


def _open_file(uri: str) -> Source:
    if has_image_name(uri):
        return _FileSource(uri, (uri,))
    return TableSource(uri, needs_labels=False) if uri.lower().endswith(TABLE_SUFFIXES) else open_source(uri)


def _glob(pattern: str) -> tuple[str, ...]:
    fs, path = storage.filesystem(pattern)
    found = fs.glob(path, detail=True)
    files = sorted(name for name, entry in found.items() if entry["type"] == "file" and storage.ASIDE_MARK not in name)
    return tuple(files) if storage.is_local(pattern) else tuple(fs.unstrip_protocol(name) for name in files)
