"""A view: a dataset directory with a manifest and no shards, which takes rows of another's shards into its own splits.

Folds of a cross-validation and the mended splits of an audit are views: nothing is copied, and whatever reads a dataset
reads them.
"""

from __future__ import annotations

import base64
import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import manyeyes
from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.data.manifest import Counts, Manifest, ShardInfo


@dataclass(frozen=True)
class ViewRows:
    """What becomes of the rows of one shard.

    Attributes:
        shard: as the dataset's manifest has it.
        labels: int (n,), of all its rows in order.
        splits: str (n,): the split of each row in the view; "" leaves it out.
        reasons: str (n,) or None: why a row is left out.
    """

    shard: ShardInfo
    labels: np.ndarray
    splits: np.ndarray
    reasons: np.ndarray | None = None


@dataclass
class _Tally:
    num_classes: int
    written: dict[str, np.ndarray] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def add(self, rows: ViewRows) -> None:
        for split in _names(rows.splits):
            counts = np.bincount(rows.labels[rows.splits == split], minlength=self.num_classes)
            self.written[split] = self.written.get(split, 0) + counts
        left_out = rows.splits == ""
        reasons = np.full(len(left_out), "left_out") if rows.reasons is None else rows.reasons
        for reason, count in zip(*np.unique(reasons[left_out], return_counts=True), strict=True):
            self.skipped[str(reason)] = self.skipped.get(str(reason), 0) + int(count)


def write_view(
    dataset: Dataset, out: str, rows: Sequence[ViewRows], settings: Mapping[str, Any] | None = None
) -> Manifest:
    """Write the manifest of a view of `dataset` to the directory `out`.

    Of each split a file is one shard: where rows come from several shards of one file (a view's parts of it), they are
    joined, in the order of the file, so that a split and a file's name tell a row.

    Args:
        rows: of every shard that the view takes rows from; shards that are not named are no part of it.
        settings: what the choice depends on, to be kept in the manifest.

    Returns:
        The manifest; seen = written + skipped, over the rows of the named shards.

    Raises:
        ValueError: arrays that don't fit their shard, or a row that would be in a split twice.
    """
    tally = _Tally(len(dataset.class_names))
    taken: dict[tuple[str, str], list[tuple[ShardInfo, np.ndarray]]] = defaultdict(list)
    for each in rows:
        if not len(each.labels) == len(each.splits) == each.shard.num_rows:
            raise ValueError(
                f"{each.shard.name} has {each.shard.num_rows} rows, got {len(each.labels)} labels and "
                f"{len(each.splits)} splits."
            )
        tally.add(each)
        for split in _names(each.splits):
            taken[split, each.shard.name].append((each.shard, each.shard.file_rows()[each.splits == split]))
    of = dataset.manifest
    manifest = Manifest(
        class_names=of.class_names,
        encoding=of.encoding,
        preprocessing=of.preprocessing,
        preprocessing_fingerprint=of.preprocessing_fingerprint,
        image_shape=of.image_shape,
        num_seen=sum(len(each.labels) for each in rows),
        counts=Counts(
            skipped=tally.skipped, written={split: counts.tolist() for split, counts in sorted(tally.written.items())}
        ),
        shards=tuple(_joined(split, taken[split, name]) for split, name in sorted(taken)),
        source={"kind": "view", "uri": storage.absolute(dataset.uri), "fingerprint": of.fingerprint},
        settings=dict(settings or {}),
        view_of=of.view_of or storage.absolute(dataset.uri),
        manyeyes_version=manyeyes.__version__,
    )
    manifest.save(out)
    return manifest


def _names(splits: np.ndarray) -> list[str]:
    return [str(name) for name in np.unique(splits) if name]


def _joined(split: str, parts: Sequence[tuple[ShardInfo, np.ndarray]]) -> ShardInfo:
    """One shard of all that a split takes of a file: (the file's shard or a part of it, rows of the file)."""
    shard = parts[0][0]
    in_file = shard.row_group_rows if shard.rows is None else shard.file_row_group_rows
    rows = np.concatenate([rows for _, rows in parts])
    bits = np.zeros(sum(in_file), np.uint8)
    bits[rows] = 1
    if bits.sum() < len(rows):
        raise ValueError(f"There are rows of {shard.name} twice in {split}.")
    stops = np.cumsum(in_file)
    counts = np.bincount(np.searchsorted(stops, rows, side="right"), minlength=len(in_file))
    return dataclasses.replace(
        shard,
        split=split,
        row_group_rows=tuple(counts[counts > 0].tolist()),
        rows=base64.b64encode(np.packbits(bits).tobytes()).decode(),
        file_row_group_rows=in_file,
    )
