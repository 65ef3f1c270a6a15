"""The order in which a split's examples are seen: a pure function of (seed, epoch), cut into batches and worker parts.

Row groups are the unit of reading, so an epoch shuffles in two stages: the row groups are permuted, the permuted list
is cut into windows, and the examples of a window are permuted among themselves. Only the row groups of one window have
to be at hand at a time, and any part of an epoch is found without replaying what comes before it.

A permutation is the stable sort by `imaging.draws.uniforms`, which hash (seed, epoch, index): no generator state and no
algorithm of numpy.random is involved, so neither a call elsewhere nor another version of numpy can change an order.
"""

from __future__ import annotations

import functools

import numpy as np

from manyeyes.errors import UsageError
from manyeyes.imaging.draws import uniforms

# Row groups in a window. Ingest scatters examples over row groups, so a window need not be large to be a fair mixture.
WINDOW_ROW_GROUPS = 16

_ROW_GROUP_STREAM = 0x0F0E
_EXAMPLE_STREAM = 0x0F0F


class Order:
    """Every epoch's order of the examples of one split. Safe to share between threads.

    Args:
        row_group_rows: the number of examples of each row group, int (num_row_groups,); example_index counts through
            them from 0.
        seed: another seed gives other orders.
        shuffle: False keeps the order of example_index in every epoch.
        window: row groups whose examples are shuffled together.

    Raises:
        UsageError: a window below 1.
    """

    def __init__(
        self, row_group_rows: np.ndarray, seed: int, shuffle: bool = True, window: int = WINDOW_ROW_GROUPS
    ) -> None:
        if window < 1:
            raise UsageError(f"window={window} is below 1. Give the number of row groups that are shuffled together.")
        self.seed = seed
        self.shuffle = shuffle
        self.window = window
        self._rows = np.asarray(row_group_rows, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._rows)]).astype(np.int64)
        self._layout = functools.lru_cache(maxsize=2)(self._compute_layout)
        self._window_examples = functools.lru_cache(maxsize=4)(self._compute_window_examples)

    @property
    def num_examples(self) -> int:
        """Examples in an epoch."""
        return int(self._starts[-1])

    def slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The example indices at the positions [start, stop) of an epoch.

        Computes the windows that are touched and nothing before them.

        Returns:
            int64 (stop - start,).

        Raises:
            UsageError: the positions are not inside the epoch.
        """
        if not 0 <= start <= stop <= self.num_examples:
            raise UsageError(f"Positions [{start}, {stop}) are not inside an epoch of {self.num_examples} examples.")
        _, window_starts = self._layout(epoch)
        parts = [
            self._window_examples(epoch, window)[max(0, start - window_starts[window]) : stop - window_starts[window]]
            for window in self.windows(epoch, start, stop)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def windows(self, epoch: int, start: int, stop: int) -> range:
        """The windows that the positions [start, stop) of an epoch touch."""
        if start >= stop:
            return range(0)
        _, window_starts = self._layout(epoch)
        first, last = np.searchsorted(window_starts, [start, stop - 1], side="right") - 1
        return range(int(first), int(last) + 1)

    @property
    def num_windows(self) -> int:
        """Windows in an epoch."""
        return -(-len(self._rows) // self.window)

    def row_groups(self, epoch: int, window: int) -> np.ndarray:
        """The numbers of the row groups that hold the examples of a window, int64."""
        row_groups, _ = self._layout(epoch)
        return row_groups[window * self.window : (window + 1) * self.window]

    def windows_of_row_groups(self, epoch: int) -> np.ndarray:
        """For every row group the window that it is in, int64 (num_row_groups,)."""
        row_groups, _ = self._layout(epoch)
        windows = np.empty_like(row_groups)
        windows[row_groups] = np.arange(len(row_groups)) // self.window
        return windows

    def _compute_layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The permuted row groups of an epoch, and the position at which each window starts, with the end last."""
        row_groups = np.arange(len(self._rows), dtype=np.int64)
        if self.shuffle:
            row_groups = _permuted(row_groups, self.seed, epoch, _ROW_GROUP_STREAM)
        ends = np.concatenate([[0], np.cumsum(self._rows[row_groups])])
        return row_groups, np.append(ends[:-1][:: self.window], ends[-1])

    def _compute_window_examples(self, epoch: int, window: int) -> np.ndarray:
        row_groups = self.row_groups(epoch, window)
        examples = np.concatenate([np.arange(self._starts[group], self._starts[group + 1]) for group in row_groups])
        return _permuted(examples, self.seed, epoch, _EXAMPLE_STREAM) if self.shuffle else examples


def part_slice(batch_start: int, batch_stop: int, part: int, num_parts: int) -> tuple[int, int]:
    """The positions [start, stop) of a part of a global batch.

    The parts follow one another and make up the batch exactly. They are equal where the batch can be divided by
    num_parts; else (a last, partial batch) they are whole pairs of neighbours as far as possible, so that `mix` finds
    both halves of a pair in one part, and the last parts may get less or nothing.
    """
    num_examples = batch_stop - batch_start
    if num_examples % num_parts == 0:
        size = num_examples // num_parts
        return batch_start + part * size, batch_start + (part + 1) * size
    num_pairs = -(-num_examples // 2)
    first, last = (2 * -(-num_pairs * r // num_parts) for r in (part, part + 1))
    return batch_start + min(first, num_examples), batch_start + min(last, num_examples)


def parts_of_rank(rank: int, world_size: int, num_parts: int) -> range:
    """The parts of every global batch that worker `rank` computes; those of all ranks follow one another.

    Raises:
        UsageError: there are fewer parts than workers.
    """
    if num_parts < world_size:
        raise UsageError(
            f"A batch of {num_parts} part(s) gives {world_size} workers too little to do. Use at most {num_parts} "
            "workers, or more virtual workers."
        )
    return range(num_parts * rank // world_size, num_parts * (rank + 1) // world_size)


def check_batch_size(global_batch_size: int, num_parts: int) -> None:
    """Refuse a batch that can't be shared out equally.

    Raises:
        UsageError: global_batch_size is below 1 or not divisible by num_parts.
    """
    if global_batch_size < 1:
        raise UsageError(f"global_batch_size={global_batch_size} is below 1. Use at least {num_parts}.")
    if global_batch_size % num_parts:
        below = global_batch_size // num_parts * num_parts
        choices = f"{below} or {below + num_parts}" if below else str(num_parts)
        raise UsageError(
            f"global_batch_size={global_batch_size} is not divisible by the {num_parts} parts that it is shared out "
            f"in. Use {choices}."
        )


def _permuted(values: np.ndarray, seed: int, epoch: int, stream: int) -> np.ndarray:
    return values[np.argsort(uniforms(seed, epoch, values, 1, stream)[:, 0], kind="stable")]
