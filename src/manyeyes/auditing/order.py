"""The order in which splits are named."""

from __future__ import annotations

from collections.abc import Iterable

from manyeyes.data.manifest import SPLITS


def in_order(splits: Iterable[str]) -> tuple[str, ...]:
    """Names of splits as people expect them: train, val, test, then others."""
    return tuple(sorted(splits, key=lambda split: (SPLITS.index(split) if split in SPLITS else len(SPLITS), split)))
