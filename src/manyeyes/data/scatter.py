"""An exact shuffle of a stream in bounded memory: records are put in the order of a seeded hash of their blocks.

Sources come sorted by class; training shuffles row groups and a window only. So the order is broken up once, at ingest.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from manyeyes.errors import StorageError

# Fewer records than this never touch the disk.
_MAX_IN_MEMORY = 4096
# A spooled line takes about an eighth of the memory of its record.
_LINES_PER_RECORD = 8
_FILES_BITS = 6
_HASH_BITS = 64
# A spooled line: the hash in hex, a blank, the record as JSON.
_KEY_LENGTH = _HASH_BITS // 4


class Scatter:
    """Collects records (JSON values) and gives them back in a shuffled order: a function of `seed` and their blocks.

    Records of one block stay together, in their order. Memory does not grow with their number: beyond `max_in_memory`
    they are dealt to files by the first bits of the hash, and a file that is too long for memory is dealt again by the
    next ones. Use as a context manager: the spool files go at its end.

    Args:
        seed: of the shuffle; None keeps the order of the stream.
        max_in_memory: records held before they are spooled to disk.
    """

    def __init__(self, seed: int | None, max_in_memory: int = _MAX_IN_MEMORY) -> None:
        self._seed = seed
        self._max_in_memory = max_in_memory
        self._in_memory: list[tuple[int, Any]] = []
        self._spool: _Spool | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Scatter:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def add(self, block: int, record: Any) -> None:
        """Take one record of a block; records of one block come one after the other."""
        key = 0 if self._seed is None else _hash(self._seed, block)
        if self._spool is not None:
            self._spool.add(_line(key, record))
            return
        self._in_memory.append((key, record))
        if len(self._in_memory) > self._max_in_memory:
            self._spool = self._stack.enter_context(_Spool(_HASH_BITS, _LINES_PER_RECORD * self._max_in_memory))
            for key, record in self._in_memory:
                self._spool.add(_line(key, record))
            self._in_memory.clear()

    def __iter__(self) -> Iterator[Any]:
        """Yield all records in the shuffled order; may be called again for the same order."""
        if self._spool is None:
            # Sorting is stable, so that the records of a block keep their order.
            return (record for _, record in sorted(self._in_memory, key=lambda pair: pair[0]))
        return (json.loads(line[_KEY_LENGTH:]) for line in self._spool)


class _Spool:
    """Lines in files by the first of the `num_bits` low bits of their key; iterated in the order of the key."""

    def __init__(self, num_bits: int, max_lines: int) -> None:
        self._shift = num_bits - _FILES_BITS
        self._max_lines = max_lines
        self._stack = contextlib.ExitStack()
        self._files: list[TextIO] = []
        self._num_lines = [0] * (1 << _FILES_BITS)
        self._first_keys: list[str | None] = [None] * (1 << _FILES_BITS)
        self._has_one_key = [True] * (1 << _FILES_BITS)

    def __enter__(self) -> _Spool:
        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="manyeyes-scatter-")))
        for index in range(1 << _FILES_BITS):
            self._files.append(self._stack.enter_context((folder / f"{index:02d}").open("w", encoding="ascii")))
        return self

    def __exit__(self, *_: object) -> None:
        # On a full disk closing says again what writing has said.
        with contextlib.suppress(OSError):
            self._stack.close()

    def add(self, line: str) -> None:
        key = line[:_KEY_LENGTH]
        index = int(key, 16) >> self._shift & ((1 << _FILES_BITS) - 1)
        try:
            self._files[index].write(line)
        except OSError as error:
            raise _not_written(error, self._files[index]) from None
        self._num_lines[index] += 1
        if self._first_keys[index] is None:
            self._first_keys[index] = key
        elif self._first_keys[index] != key:
            self._has_one_key[index] = False

    def __iter__(self) -> Iterator[str]:
        for index, file in enumerate(self._files):
            try:
                file.flush()
            except OSError as error:
                raise _not_written(error, file) from None
            with Path(file.name).open(encoding="ascii") as lines:
                if self._has_one_key[index]:
                    yield from lines
                elif self._num_lines[index] <= self._max_lines or self._shift < _FILES_BITS:
                    yield from _sorted_by_key(lines)
                else:
                    with _Spool(self._shift, self._max_lines) as finer:
                        for line in lines:
                            finer.add(line)
                        yield from finer


def _not_written(error: OSError, file: TextIO) -> StorageError:
    # It lies where TMPDIR says, which the user has not named.
    return StorageError(error.errno, error.strerror, file.name)


def _line(key: int, record: Any) -> str:
    return f"{key:0{_KEY_LENGTH}x} {json.dumps(record, separators=(',', ':'))}\n"


def _sorted_by_key(lines: Iterable[str]) -> list[str]:
    return sorted(lines, key=lambda line: line[:_KEY_LENGTH])


def _hash(seed: int, block: int) -> int:
    # splitmix64: every bit of the result depends on every bit of the input.
    value = (seed * 0x9E3779B97F4A7C15 + (block + 1) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
