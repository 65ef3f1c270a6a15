"""Random numbers as a pure function of (seed, epoch, example_index), so that no worker's history can change them.

Counter-based: a number is a hash of its coordinates (the SplitMix64 finaliser over each in turn), not the next one of a
generator. Which other examples are in the same call, and in which order, makes no difference.
"""

from __future__ import annotations

import numpy as np

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def uniforms(seed: int, epoch: int, example_indices: np.ndarray, num: int, stream: int = 0) -> np.ndarray:
    """Draw `num` uniform numbers for each example.

    Args:
        seed, epoch, stream: any integers; another stream is another, independent table of numbers.
        example_indices: integer array (n,).
        num: numbers an example.

    Returns:
        float64 array (n, num) in [0, 1). Row i depends on (seed, epoch, stream, example_indices[i]) only, and column j
        not on `num`.
    """
    key = 0
    for coordinate in (seed, epoch, stream):
        key = _mix((key + (coordinate & _MASK) * _GAMMA + _GAMMA) & _MASK)
    indices = np.asarray(example_indices, dtype=np.int64).view(np.uint64)
    rows = indices * np.uint64(_GAMMA)
    rows += np.uint64(key)
    _mix_in_place(rows)
    counters = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(_GAMMA)
    bits = rows[:, None] + counters
    _mix_in_place(bits)
    bits >>= np.uint64(11)
    return bits * 2.0**-53


def _mix(value: int) -> int:
    value = ((value ^ (value >> 30)) * _FIRST) & _MASK
    value = ((value ^ (value >> 27)) * _SECOND) & _MASK
    return value ^ (value >> 31)


def _mix_in_place(values: np.ndarray) -> None:
    values ^= values >> np.uint64(30)
    values *= np.uint64(_FIRST)
    values ^= values >> np.uint64(27)
    values *= np.uint64(_SECOND)
    values ^= values >> np.uint64(31)
