"""Row groups at hand for the input pipeline: all of a small split, or those of the current windows, read ahead."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from manyeyes.data.dataset import Dataset, RowGroup, Split
from manyeyes.data.order import Order

# Reading waits for the disk or the network more than it computes.
_NUM_READERS = 2


class Rows(Protocol):
    """Random access to the rows of a split by example_index, from any thread."""

    def gather(self, example_indices: np.ndarray, images: np.ndarray) -> None:
        """Copy raw images into `images`, uint8 (n, height, width, channels)."""

    def image(self, example_index: int) -> np.ndarray | bytes:
        """The stored image: pixels (raw encoding) or encoded bytes (jpeg encoding)."""

    def labels(self, example_indices: np.ndarray) -> np.ndarray:
        """The labels, int32 (n,)."""

    def path(self, example_index: int) -> str:
        """The source path of an example, for messages."""

    def advance(self, position: int) -> None:
        """Nothing before this position of the epoch will be asked for any more."""

    def close(self) -> None:
        """Stop reading."""


def stored_bytes(dataset: Dataset, split: Split) -> int:
    """The memory that all images of a split need as they are stored."""
    if dataset.manifest.encoding == "raw" and dataset.image_shape is not None:
        return split.num_examples * math.prod(dataset.image_shape)
    return sum(shard.size_bytes for shard in split.shards)


def read_row_group(dataset: Dataset, split: Split, number: int) -> RowGroup:
    """Read row group `number` of the split. Raises DatasetError where it is damaged."""
    shard, index = split.row_groups[number]
    with dataset.open_shard(split.shards[shard]) as reader:
        return reader.read(index, columns=("image", "label"))


class ResidentRows:
    """All rows of a split in memory; read once, used in every epoch."""

    def __init__(self, dataset: Dataset, split: Split) -> None:
        groups: list[RowGroup] = []
        for shard in split.shards:
            with dataset.open_shard(shard) as reader:
                groups += [reader.read(i, columns=("image", "label")) for i in range(len(shard.row_group_rows))]
        self._images: np.ndarray | list[bytes]
        if dataset.manifest.encoding == "raw":
            self._images = np.concatenate([group.images for group in groups])
        else:
            self._images = [image for group in groups for image in group.images]
        self._labels = np.concatenate([group.labels for group in groups])
        self._paths = [path for group in groups for path in group.paths]

    def gather(self, example_indices: np.ndarray, images: np.ndarray) -> None:
        """Copy raw images into `images`."""
        # mode="clip" lets numpy write to `out` directly; the default makes a copy first.
        np.take(self._images, example_indices, axis=0, out=images, mode="clip")

    def image(self, example_index: int) -> np.ndarray | bytes:
        """The stored image."""
        return self._images[example_index]

    def labels(self, example_indices: np.ndarray) -> np.ndarray:
        """The labels, int32 (n,)."""
        return self._labels[example_indices]

    def path(self, example_index: int) -> str:
        """The source path of an example."""
        return self._paths[example_index]

    def advance(self, position: int) -> None:
        """All rows stay."""

    def close(self) -> None:
        """There is nothing to stop: the rows outlive an epoch."""


class WindowRows:
    """The row groups of the windows in use and of the next one; each is read once per epoch."""

    def __init__(self, dataset: Dataset, split: Split, order: Order, epoch: int) -> None:
        self._dataset = dataset
        self._split = split
        self._order = order
        self._epoch = epoch
        self._windows = order.windows_of_row_groups(epoch)
        self._requested: set[int] = set()
        self._groups: dict[int, Future[RowGroup]] = {}
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_NUM_READERS, "manyeyes-read")

    def gather(self, example_indices: np.ndarray, images: np.ndarray) -> None:
        """Copy raw images into `images`."""
        for row, (group, index) in enumerate(self._locate(example_indices)):
            images[row] = group.images[index]

    def image(self, example_index: int) -> np.ndarray | bytes:
        """The stored image."""
        ((group, index),) = self._locate([example_index])
        return group.images[index]

    def labels(self, example_indices: np.ndarray) -> np.ndarray:
        """The labels, int32 (n,)."""
        return np.array([group.labels[index] for group, index in self._locate(example_indices)], np.int32)

    def path(self, example_index: int) -> str:
        """The source path of an example."""
        ((group, index),) = self._locate([example_index])
        return group.paths[index]

    def advance(self, position: int) -> None:
        """Let go of the windows that end before this position."""
        first = self._order.windows(self._epoch, position, position + 1).start
        with self._lock:
            for number in [number for number in self._groups if self._windows[number] < first]:
                self._groups.pop(number).cancel()

    def close(self) -> None:
        """Stop reading; a read that is under way is waited for."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _locate(self, example_indices: Iterable[int] | np.ndarray) -> Iterable[tuple[RowGroup, int]]:
        indices = np.asarray(example_indices)
        starts = self._split.row_group_starts
        numbers = np.searchsorted(starts, indices, side="right") - 1
        groups = {int(number): self._get(int(number)) for number in np.unique(numbers)}
        rows = indices - starts[numbers]
        return [(groups[number], row) for number, row in zip(numbers.tolist(), rows.tolist(), strict=True)]

    def _get(self, number: int) -> RowGroup:
        window = int(self._windows[number])
        with self._lock:
            # This window before the next.
            self._request(window)
            if window + 1 < self._order.num_windows:
                self._request(window + 1)
            future = self._groups[number]
        return future.result()

    def _request(self, window: int) -> None:
        if window in self._requested:
            return
        self._requested.add(window)
        for number in self._order.row_groups(self._epoch, window).tolist():
            self._groups[number] = self._pool.submit(read_row_group, self._dataset, self._split, number)
