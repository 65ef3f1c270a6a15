"""The folds of a cross-validation: who is held out when, as views of the dataset."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from dataclasses import dataclass

import numpy as np

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.data.duplicates import find_duplicates
from manyeyes.data.manifest import ShardInfo
from manyeyes.data.splits import assign_units, kfold, merge_units
from manyeyes.data.view import ViewRows, write_view
from manyeyes.engines.base import Engine
from manyeyes.errors import UsageError

# In the view of a fold: what is trained on, what chooses the best epoch, and what is held out.
TRAIN, VAL, HELD_OUT = "train", "val", "test"


@dataclass(frozen=True)
class FoldSettings:
    """How a dataset is divided.

    Attributes:
        folds: K; each example is held out once a repeat.
        repeats: how often all of it is done, each time with another division.
        seed: of the divisions.
        splits: of the dataset that take part; empty: train and val, as far as they are there. The test split is left
            for the end.
        group_duplicates: whether near-duplicates stay together (see data.duplicates), as groups always do.
        val: share of the examples that are not held out which chooses the best epoch and is not trained on; 0: the last
            epoch counts.
    """

    folds: int = 5
    repeats: int = 1
    seed: int = 0
    splits: tuple[str, ...] = ()
    group_duplicates: bool = True
    val: float = 0.1

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise UsageError(f"repeats={self.repeats} is below 1.")
        if not 0 <= self.val <= 0.5:
            raise UsageError(f"val={self.val} is not in [0, 0.5].")
        if len(set(self.splits)) < len(self.splits) or not all(self.splits):
            raise UsageError(
                f"splits={','.join(self.splits)!r} can't be divided. Name each split once, e.g. train,val."
            )

    def for_dataset(self, dataset: Dataset) -> FoldSettings:
        """The same with its splits named.

        Raises:
            UsageError: the dataset lacks one.
        """
        splits = self.splits or tuple(name for name in ("train", "val") if name in dataset.split_names)
        missing = [name for name in splits if name not in dataset.split_names]
        if missing or not splits:
            lacking = missing[0] if missing else "train"
            raise UsageError(
                f"{dataset.uri} has no split {lacking!r}; it has {', '.join(dataset.split_names)}. "
                "Name those that take part by --splits."
            )
        return dataclasses.replace(self, splits=splits)


@dataclass(frozen=True)
class Folds:
    """The division of a dataset.

    Attributes:
        shards: that take part, in order; rows count through all of them.
        labels: int32 (n,), of their rows.
        units: int64 (n,): examples of one number must stay together.
        assignments: int32 (repeats, n): the fold in which each example is held out.
    """

    settings: FoldSettings
    shards: tuple[ShardInfo, ...]
    labels: np.ndarray
    units: np.ndarray
    assignments: np.ndarray

    @property
    def fingerprint(self) -> str:
        """16 hex digits of who is held out when: figures with the same one may be paired."""
        return hashlib.sha256(np.ascontiguousarray(self.assignments, "<i4").tobytes()).hexdigest()[:16]

    def splits_of(self, repeat: int, fold: int) -> np.ndarray:
        """What each example is in the view of a fold: str (n,)."""
        held_out = self.assignments[repeat] == fold
        splits = np.where(held_out, HELD_OUT, TRAIN)
        if self.settings.val > 0:
            rest = np.flatnonzero(~held_out)
            shares = {TRAIN: 1 - self.settings.val, VAL: self.settings.val}
            # Another draw than that of the folds.
            seed = self.settings.seed + 7919 * (repeat * self.settings.folds + fold + 1)
            splits[rest] = np.array(list(shares))[assign_units(self.labels[rest], self.units[rest], shares, seed)]
        return splits

    def write_view(self, dataset: Dataset, out: str, repeat: int, fold: int) -> None:
        """Write the view of a fold, unless it is there."""
        if storage.exists(storage.join(out, "manifest.json")):
            return
        splits = self.splits_of(repeat, fold)
        stops = np.cumsum([shard.num_rows for shard in self.shards])[:-1]
        parts = zip(self.shards, np.split(self.labels, stops), np.split(splits, stops), strict=True)
        write_view(
            dataset,
            out,
            [ViewRows(shard, labels, of_shard) for shard, labels, of_shard in parts],
            {"crossval": {"repeat": repeat, "fold": fold, "folds": self.settings.folds, "seed": self.settings.seed}},
        )


def divide(dataset: Dataset, settings: FoldSettings, engine: Engine) -> Folds:
    """Divide a dataset into folds: stratified by label, groups and clusters of near-duplicates whole.

    Args:
        engine: reads labels, groups and hashes from the shards.

    Raises:
        UsageError: more folds than examples or groups.
        DatasetError: no such split, or a damaged shard.
    """
    settings = settings.for_dataset(dataset)
    shards = tuple(shard for split in settings.splits for shard in dataset.split(split).shards)
    found = engine.map(functools.partial(_read_labels, dataset), shards)
    labels = np.concatenate([labels for labels, _ in found])
    groups = [group for _, of_shard in found for group in of_shard]
    clusters = find_duplicates(dataset, engine, shards=shards).clusters if settings.group_duplicates else None
    units = merge_units(groups, clusters, len(labels))
    assignments = [kfold(labels, None, settings.folds, settings.seed + i, units) for i in range(settings.repeats)]
    return Folds(settings, shards, labels, units, np.stack(assignments))


def _read_labels(dataset: Dataset, shard: ShardInfo) -> tuple[np.ndarray, list[str | None]]:
    with dataset.open_shard(shard) as reader:
        tables = [reader.read_table(index, ("label", "group")) for index in range(len(shard.row_group_rows))]
    labels = np.array([label for table in tables for label in table.column("label").to_pylist()], np.int32)
    # A dataset that another program wrote may have no groups.
    if not tables or "group" not in tables[0].column_names:
        return labels, [None] * len(labels)
    return labels, [group for table in tables for group in table.column("group").to_pylist()]
