"""From numbers of examples to paths, groups and pixels, and from paths to numbers."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from manyeyes.data.dataset import Dataset
from manyeyes.data.duplicates import ChosenRows, choose_rows, pixels_of
from manyeyes.data.manifest import ShardInfo
from manyeyes.engines.base import Engine


@dataclass(frozen=True)
class Named:
    """The source path of an example, and its group."""

    path: str
    group: str | None


def read_names(dataset: Dataset, engine: Engine, examples: Collection[int]) -> dict[int, Named]:
    """Read what examples are called; they are numbered through the shards of the manifest."""
    numbers = np.array(sorted(examples), np.int64)
    parts = engine.map(functools.partial(_names, dataset), choose_rows(dataset.manifest.shards, numbers))
    return dict(zip(numbers.tolist(), (Named(*names) for part in parts for names in part), strict=True))


def _names(dataset: Dataset, chosen: ChosenRows) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    with dataset.open_shard(chosen.shard) as reader:
        for index, rows in chosen.by_row_group():
            table = reader.read_table(index, ("image.path", "group"))
            paths = table.column("image").combine_chunks().field("path").to_pylist()
            groups = table.column("group").to_pylist() if "group" in table.column_names else [None] * len(paths)
            found += [(paths[row], groups[row]) for row in rows.tolist()]
    return found


def find_paths(dataset: Dataset, engine: Engine, paths: Collection[str]) -> dict[str, list[int]]:
    """Find the numbers of the examples with these paths: several where a source lists a file more than once."""
    if not paths:
        return {}
    shards = dataset.manifest.shards
    parts = engine.map(functools.partial(_find, dataset, frozenset(paths)), shards)
    starts = np.cumsum([0, *(shard.num_rows for shard in shards)])[:-1].tolist()
    found: dict[str, list[int]] = defaultdict(list)
    for start, part in zip(starts, parts, strict=True):
        for path, row in part:
            found[path].append(start + row)
    return found


def _find(dataset: Dataset, paths: frozenset[str], shard: ShardInfo) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    start = 0
    with dataset.open_shard(shard) as reader:
        for index, num_rows in enumerate(shard.row_group_rows):
            column = reader.read_table(index, ("image.path",)).column("image").combine_chunks().field("path")
            found += [(path, start + row) for row, path in enumerate(column.to_pylist()) if path in paths]
            start += num_rows
    return found


def read_pixels(dataset: Dataset, examples: Collection[int]) -> dict[int, np.ndarray]:
    """Read a few images in this process, for people to look at: uint8 (height, width, channels)."""
    numbers = np.array(sorted(examples), np.int64)
    images: list[np.ndarray] = []
    for chosen in choose_rows(dataset.manifest.shards, numbers):
        with dataset.open_shard(chosen.shard) as reader:
            for index, rows in chosen.by_row_group():
                group = reader.read(index, ("image", "label"))
                images += [pixels_of(dataset, group.images[row], group.paths[row])[0] for row in rows.tolist()]
    return dict(zip(numbers.tolist(), images, strict=True))
