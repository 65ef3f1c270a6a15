"""Reads what examples are called, and not their images."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from manyeyes.data.dataset import Dataset
from manyeyes.data.manifest import ShardInfo
from manyeyes.engines.base import Engine


def read_labels(dataset: Dataset, engine: Engine, shards: Sequence[ShardInfo]) -> tuple[np.ndarray, list[str | None]]:
    """Read the labels and groups of all examples of some shards, in order, by the engine's map.

    Returns:
        int32 (n,), and n names of groups or None.

    Raises:
        DatasetError: a shard is damaged.
    """
    found = engine.map(functools.partial(_read_shard, dataset), shards)
    labels = np.concatenate([np.empty(0, np.int32), *(labels for labels, _ in found)])
    return labels, [group for _, of_shard in found for group in of_shard]


def _read_shard(dataset: Dataset, shard: ShardInfo) -> tuple[np.ndarray, list[str | None]]:
    with dataset.open_shard(shard) as reader:
        tables = [reader.read_table(index, ("label", "group")) for index in range(len(shard.row_group_rows))]
    labels = np.array([label for table in tables for label in table.column("label").to_pylist()], np.int32)
    # A dataset that another program wrote may have no groups.
    if not tables or "group" not in tables[0].column_names:
        return labels, [None] * len(labels)
    return labels, [group for table in tables for group in table.column("group").to_pylist()]
