"""An exact shuffle of a stream in bounded memory: scatter to buckets by a seeded hash, then permute every bucket.

Sources come sorted by class; training shuffles row groups and a window only. So the order is broken up once, at ingest.
"""

from __future__ import annotations

import contextlib
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

# With this many buckets, ten million entries need about 150,000 of them in memory at once.
_NUM_BUCKETS = 64
# Fewer entries than this never touch the disk.
_MAX_IN_MEMORY = 20_000


class Scatter:
    """Collects records (JSON values) and gives them back in a shuffled order: a function of `seed` and their blocks.

    Records of one block stay together, in their order. Use as a context manager: the spool files go at its end.

    Args:
        seed: of the shuffle; None keeps the order of the stream.
        max_in_memory: records held before they are spooled to disk.
    """

    def __init__(self, seed: int | None, max_in_memory: int = _MAX_IN_MEMORY) -> None:
        self._seed = seed
        self._max_in_memory = max_in_memory
        self._buckets: list[list[tuple[int, Any]]] = [[] for _ in range(1 if seed is None else _NUM_BUCKETS)]
        self._num_in_memory = 0
        self._files: list[TextIO] = []
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Scatter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, block: int, record: Any) -> None:
        """Take one record of a block; records of one block come one after the other."""
        bucket = 0 if self._seed is None else _hash(self._seed, block) % _NUM_BUCKETS
        self._buckets[bucket].append((block, record))
        self._num_in_memory += 1
        if self._num_in_memory > self._max_in_memory:
            self._spill()

    def __iter__(self) -> Iterator[Any]:
        """Yield all records in the shuffled order; may be called again for the same order."""
        for index in range(len(self._buckets)):
            if self._seed is None:
                for _, record in self._records(index):
                    yield record
                continue
            blocks: dict[int, list[Any]] = {}
            for block, record in self._records(index):
                blocks.setdefault(block, []).append(record)
            order = list(blocks)
            random.Random(f"{self._seed}/{index}").shuffle(order)
            for block in order:
                yield from blocks[block]

    def _records(self, index: int) -> Iterator[tuple[int, Any]]:
        if self._files:
            self._files[index].flush()
            with Path(self._files[index].name).open(encoding="ascii") as spooled:
                for line in spooled:
                    block, record = json.loads(line)
                    yield block, record
        yield from self._buckets[index]

    def _spill(self) -> None:
        if not self._files:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="manyeyes-scatter-"))
            self._files = [
                self._stack.enter_context((Path(folder) / f"{index:03d}.jsonl").open("w", encoding="ascii"))
                for index in range(len(self._buckets))
            ]
        for file, bucket in zip(self._files, self._buckets, strict=True):
            file.writelines(json.dumps([block, record], separators=(",", ":")) + "\n" for block, record in bucket)
            bucket.clear()
        self._num_in_memory = 0


def _hash(seed: int, block: int) -> int:
    # splitmix64: every bit of the result depends on every bit of the input.
    value = (seed * 0x9E3779B97F4A7C15 + (block + 1) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
