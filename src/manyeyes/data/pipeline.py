"""The input pipeline: from a dataset's split to the uint8 batches of one worker, made ahead of the step.

Its whole state is (epoch, step): the order, the draws of the augmentation and those of the mix are pure functions, so a
start in the middle of an epoch costs no replay and gives the batches that an uninterrupted epoch gives there.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from manyeyes.data.dataset import Dataset
from manyeyes.data.mix import Mix, mix_batch
from manyeyes.data.order import WINDOW_ROW_GROUPS, Order, check_batch_size, part_slice, parts_of_rank
from manyeyes.data.reading import ResidentRows, Rows, WindowRows, stored_bytes
from manyeyes.engines.base import threads_per_worker
from manyeyes.errors import DatasetError, ImageError, UsageError
from manyeyes.imaging.augment import Augmentation, augment_batch, training_view
from manyeyes.imaging.preprocessing import Preprocessing, Step

# Splits whose stored images need less memory than this are read once and kept.
CACHE_BYTES = 256 * 1024 * 1024

# A task of a thread: enough pixels to be worth the hand-over, few enough to share a batch between threads.
_TASK_BYTES = 1 << 20
_TASK_ENCODED_IMAGES = 8
# The batch that was yielded last, and the one before it.
_NUM_BATCHES_HELD = 2


@dataclass(frozen=True)
class Batch:
    """One worker's part of a global batch; it may be empty in the last step of an epoch.

    Attributes:
        images: uint8 (n, height, width, channels), a reused buffer: valid until the batch after the next is asked for.
        labels: int32 (n,).
        example_indices: int64 (n,), the rows of the split.
        epoch, step: of this batch, from 0.
        global_size: examples in the global batch over all workers; what a sum of losses is divided by.
        labels_b: int32 (n,), the label of the mix partner, or None without mix.
        lam: float32 (n,), the weight of `labels`; 1 - lam is that of `labels_b`; None without mix.
        part_sizes: examples of each of this worker's parts of the global batch, in order; empty: it is one part.
    """

    images: np.ndarray
    labels: np.ndarray
    example_indices: np.ndarray
    epoch: int
    step: int
    global_size: int
    labels_b: np.ndarray | None = None
    lam: np.ndarray | None = None
    part_sizes: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def parts(self) -> list[Batch]:
        """This worker's parts of the global batch, sharing the arrays of the batch."""
        stops = np.cumsum(self.part_sizes or [len(self)]).tolist()
        return [rows_of(self, low, high) for low, high in zip([0, *stops], stops, strict=False)]


class InputPipeline:
    """Yields a worker's part of every global batch, decoded, augmented and mixed.

    Batch k of an epoch holds the positions [k * global_batch_size, (k + 1) * global_batch_size) of that epoch's order;
    the last batch holds what is left. So every example is seen exactly once per epoch, by exactly one worker.

    Args:
        dataset: where the images are.
        split: "train", "val" or "test".
        global_batch_size: examples per step over all workers.
        seed: of the order, the augmentation and the mix.
        shuffle: False keeps the order of the rows.
        augmentation: how images are varied; None leaves them as they are.
        preprocessing: further steps from a stored image to the model's input; None takes images as they are stored.
        mix: mixup and CutMix; None mixes nothing.
        rank, world_size: which worker this is, of how many.
        num_parts: the parts that a global batch is cut into, shared out among the workers; None: one a worker.
        num_threads: that decode and augment; default: what the engine gives this process, else one per core.
        prefetch: batches that are made ahead of the one in use.
        cache_bytes: a split whose stored images need no more than this stays in memory; of another, two windows do.
        window: row groups that are shuffled together (see Order).

    Raises:
        UsageError: a batch size that can't be shared out, or images of several sizes and no preprocessing to one size.
        DatasetError: no such split.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        global_batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        augmentation: Augmentation | None = None,
        preprocessing: Preprocessing | None = None,
        mix: Mix | None = None,
        rank: int = 0,
        world_size: int = 1,
        num_parts: int | None = None,
        num_threads: int | None = None,
        prefetch: int = 4,
        cache_bytes: int = CACHE_BYTES,
        window: int = WINDOW_ROW_GROUPS,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank={rank} is not in [0, world_size={world_size}).")
        self.num_parts = num_parts or world_size
        self.parts = parts_of_rank(rank, world_size, self.num_parts)
        check_batch_size(global_batch_size, self.num_parts)
        if prefetch < 1:
            raise UsageError(f"prefetch={prefetch} is below 1. Use at least 1.")
        self.dataset = dataset
        self.split = dataset.split(split)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.augmentation = None if augmentation is None or augmentation.is_identity else augmentation
        self.mix = mix if mix is not None and mix.is_on else None
        self.rank = rank
        self.world_size = world_size
        self.num_threads = threads_per_worker() if num_threads is None else max(1, num_threads)
        self.prefetch = prefetch
        self.order = Order(self.split.row_group_rows, seed, shuffle, window)
        self.image_shape, self._preprocessing = _input_of(dataset, preprocessing)
        self._is_resident = stored_bytes(dataset, self.split) <= cache_bytes
        self._resident: ResidentRows | None = None

    @property
    def num_examples(self) -> int:
        """Examples per epoch, over all workers."""
        return self.order.num_examples

    @property
    def steps_per_epoch(self) -> int:
        """Global batches per epoch, the last, partial one included."""
        return -(-self.num_examples // self.global_batch_size)

    def of_rank(self, rank: int) -> InputPipeline:
        """The same for another worker of as many; the rows that are kept in memory are shared."""
        if self._is_resident:
            self._open_rows(0)
        other = copy.copy(self)
        other.rank, other.parts = rank, parts_of_rank(rank, self.world_size, self.num_parts)
        return other

    def batches(self, epoch: int, start_step: int = 0, stop_step: int | None = None) -> Generator[Batch, None, None]:
        """Yield this worker's batches of an epoch, from `start_step` on, up to `stop_step` or the end.

        Threads work ahead until the generator ends, is closed or is dropped; then all have stopped. Where an exception
        may keep it alive, use `contextlib.closing`.

        Raises:
            UsageError: start_step is not in the epoch.
            DatasetError: an image or a row group is damaged; the message names it.
        """
        if not 0 <= start_step <= self.steps_per_epoch:
            raise UsageError(f"start_step={start_step} is not in an epoch of {self.steps_per_epoch} steps.")
        stop_step = self.steps_per_epoch if stop_step is None else min(stop_step, self.steps_per_epoch)
        return self._generate(epoch, start_step, stop_step)

    def _generate(self, epoch: int, start_step: int, stop_step: int) -> Generator[Batch, None, None]:
        rows = self._open_rows(epoch)
        stopped = threading.Event()
        pool = ThreadPoolExecutor(self.num_threads, "manyeyes-input")
        num_rows = min(self.num_examples, self.global_batch_size // self.num_parts * len(self.parts) + 4)
        buffers = [np.empty((num_rows, *self.image_shape), np.uint8) for _ in range(self.prefetch + _NUM_BATCHES_HELD)]
        started: deque[tuple[Batch, list[Future[None]]]] = deque()
        next_step = start_step
        try:
            for step in range(start_step, stop_step):
                rows.advance(step * self.global_batch_size)
                while next_step < min(step + 1 + self.prefetch, stop_step):
                    buffer = buffers[next_step % len(buffers)]
                    started.append(self._start(epoch, next_step, rows, buffer, pool, stopped))
                    next_step += 1
                batch, tasks = started.popleft()
                for task in tasks:
                    task.result()
                yield batch
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            # Tasks may be waiting for a row group: end the reads before waiting for the tasks.
            rows.close()
            pool.shutdown(wait=True)

    def _open_rows(self, epoch: int) -> Rows:
        if not self._is_resident:
            return WindowRows(self.dataset, self.split, self.order, epoch)
        if self._resident is None:
            self._resident = ResidentRows(self.dataset, self.split)
        return self._resident

    def _start(
        self,
        epoch: int,
        step: int,
        rows: Rows,
        buffer: np.ndarray,
        pool: ThreadPoolExecutor,
        stopped: threading.Event,
    ) -> tuple[Batch, list[Future[None]]]:
        """Hand out the work on one batch; its arrays are filled when the tasks are done."""
        batch_start = step * self.global_batch_size
        batch_stop = min(batch_start + self.global_batch_size, self.num_examples)
        slices = [part_slice(batch_start, batch_stop, part, self.num_parts) for part in self.parts]
        start, stop = slices[0][0], slices[-1][1]
        first, last = start, stop
        if self.mix and start < stop:
            # The other half of a pair may belong to the neighbour: it is made too, mixed in, and left out.
            first = start - (start - batch_start) % 2
            last = min(stop + (stop - batch_start) % 2, batch_stop)
        num_made = last - first
        made = Batch(
            images=buffer[:num_made],
            labels=np.empty(num_made, np.int32),
            example_indices=np.empty(num_made, np.int64),
            epoch=epoch,
            step=step,
            global_size=batch_stop - batch_start,
            labels_b=np.empty(num_made, np.int32) if self.mix else None,
            lam=np.empty(num_made, np.float32) if self.mix else None,
        )
        tasks = [
            pool.submit(
                self._make, rows_of(made, low, min(low + self._task_rows, num_made)), first + low, rows, stopped
            )
            for low in range(0, num_made, self._task_rows)
        ]
        taken = rows_of(made, start - first, stop - first)
        return replace(taken, part_sizes=tuple(high - low for low, high in slices)), tasks

    @property
    def _task_rows(self) -> int:
        """Rows of a task: an even number, so that no pair of the mix is torn."""
        if self.dataset.manifest.encoding == "jpeg":
            return _TASK_ENCODED_IMAGES
        return max(2, _TASK_BYTES // math.prod(self.image_shape) // 2 * 2)

    def _make(self, part: Batch, position: int, rows: Rows, stopped: threading.Event) -> None:
        """Fill the arrays of a part of a batch whose first example is at `position` of the order."""
        if stopped.is_set():
            return
        part.example_indices[:] = self.order.slice(part.epoch, position, position + len(part))
        part.labels[:] = rows.labels(part.example_indices)
        if self._preprocessing is not None:
            for image, example_index in zip(part.images, part.example_indices.tolist(), strict=True):
                if stopped.is_set():
                    return
                image[:] = self._view(rows, part.epoch, example_index)
        elif self.augmentation is not None:
            stored = np.empty_like(part.images)
            rows.gather(part.example_indices, stored)
            augment_batch(stored, self.augmentation, self.seed, part.epoch, part.example_indices, out=part.images)
        else:
            rows.gather(part.example_indices, part.images)
        if self.mix is not None and part.labels_b is not None and part.lam is not None:
            part.labels_b[:], part.lam[:] = mix_batch(
                part.images, part.labels, part.example_indices, self.mix, self.seed, part.epoch
            )

    def _view(self, rows: Rows, epoch: int, example_index: int) -> np.ndarray:
        """One image as the model sees it."""
        assert self._preprocessing is not None
        stored = rows.image(example_index)
        try:
            if self.augmentation is not None:
                return training_view(stored, self._preprocessing, self.augmentation, self.seed, epoch, example_index)
            if isinstance(stored, bytes):
                return self._preprocessing(stored)
            return self._preprocessing.apply(stored)
        except ImageError as error:
            raise DatasetError(
                f"{self.dataset.uri}: {rows.path(example_index)} (example {example_index} of split {self.split.name!r})"
                f" can't be used: {error}. Ingest again with --overwrite: that puts such images in quarantine."
            ) from error


def rows_of(batch: Batch, low: int, high: int) -> Batch:
    """The rows [low, high) of a batch as a batch of one part, sharing its arrays."""
    return replace(
        batch,
        images=batch.images[low:high],
        labels=batch.labels[low:high],
        example_indices=batch.example_indices[low:high],
        labels_b=None if batch.labels_b is None else batch.labels_b[low:high],
        lam=None if batch.lam is None else batch.lam[low:high],
        part_sizes=(),
    )


def _input_of(
    dataset: Dataset, preprocessing: Preprocessing | None
) -> tuple[tuple[int, int, int], Preprocessing | None]:
    """The shape of the model's input, and what makes it of a stored image; None where raw pixels are used as stored."""
    stored = dataset.preprocessing
    channels = stored.channels if dataset.image_shape is None else dataset.image_shape[2]
    is_raw = dataset.manifest.encoding == "raw"
    if is_raw and preprocessing is not None and preprocessing.channels != channels:
        raise UsageError(
            f"{dataset.uri} stores pixels with {channels} channels, but the preprocessing gives "
            f"{preprocessing.channels}. Use channels={channels}, or ingest again with the other."
        )
    if preprocessing is not None and preprocessing.steps:
        shape = preprocessing.output_shape
    elif dataset.image_shape is None:
        shape = None
    elif is_raw:
        return dataset.image_shape, None
    else:
        height, width, _ = dataset.image_shape
        preprocessing = replace(preprocessing or stored, steps=(Step("resize", height, width),))
        shape = preprocessing.output_shape
    if shape is None:
        raise UsageError(
            f"The images of {dataset.uri} come in several sizes, but a batch needs one. Give a preprocessing with a "
            "fixed size, e.g. Preprocessing.for_size(160, 160), or data.image_size=[160,160] in a recipe."
        )
    return shape, preprocessing
