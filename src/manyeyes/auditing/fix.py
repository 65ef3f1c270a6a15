"""The mended dataset: a view of the audited one, without copies and with nothing that straddles its splits."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from manyeyes import storage
from manyeyes.auditing.findings import Fixed, in_order
from manyeyes.auditing.lookup import Named, read_names
from manyeyes.auditing.measuring import Measured
from manyeyes.data.dataset import Dataset
from manyeyes.data.duplicates import Duplicates
from manyeyes.data.splits import assign_groups, join_relations
from manyeyes.data.view import ViewRows, write_view
from manyeyes.engines.base import Engine
from manyeyes.errors import ManyeyesError

CHANGES_NAME = "changes.jsonl"
COPY, CONFLICT, STRADDLES = "exact_copy", "conflicting_labels", "straddles_splits"
# Of copies in several splits the one in the smaller, held-out split is kept: it is missed more.
_KEPT_FIRST = ("test", "val", "train")


def write_fixed(dataset: Dataset, engine: Engine, measured: Measured, duplicates: Duplicates, out: str) -> Fixed:
    """Write the view, and the list of what it changes.

    Of exact copies one stays, and none where their labels differ: one of them is wrong, and which is not known. Then
    what is joined by clusters and groups and lies in several splits goes to one, where the counts of labels stay
    nearest to what they were; all else stays where it is.

    Returns:
        Counts that balance.
    """
    labels, before = measured.labels, measured.splits
    copies = np.flatnonzero(duplicates.copies >= 0)
    names = read_names(dataset, engine, copies.tolist())
    reasons, kept_of = _leave_out(copies, duplicates.copies, labels, before, names)
    splits = np.where(reasons == "", before, "")
    stays = np.flatnonzero(splits != "")
    units = stays[join_relations(duplicates.clusters[stays], measured.groups[stays])]
    torn = stays[_is_torn(units, splits[stays])]
    names |= read_names(dataset, engine, torn.tolist())
    unit_of = dict(zip(stays.tolist(), units.tolist(), strict=True)) if len(torn) else {}
    splits[torn] = _mended(torn, [unit_of[row] for row in torn.tolist()], labels, splits, names)
    changes = storage.join(out, CHANGES_NAME)
    lines = []
    for row in np.flatnonzero(splits != before).tolist():
        line = {"path": names[row].path, "from": str(before[row]), "to": str(splits[row]) or None}
        lines.append(line | {"reason": str(reasons[row]) or STRADDLES})
        if row in kept_of:
            lines[-1]["kept"] = names[kept_of[row]].path
    lines.sort(key=lambda line: (line["path"], line["from"]))
    storage.write_bytes(changes, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    shards = dataset.manifest.shards
    stops = np.cumsum([shard.num_rows for shard in shards])[:-1]
    parts = (np.split(values, stops) for values in (labels, splits, reasons))
    rows_of_shards = [ViewRows(*of_shard) for of_shard in zip(shards, *parts, strict=True)]
    manifest = write_view(dataset, out, rows_of_shards, {"audit": {"distance": duplicates.distance}})
    if not manifest.balances or manifest.num_seen != len(labels):
        raise ManyeyesError(f"Internal error: {out} does not balance. Please report this.")
    return Fixed(
        dataset=out,
        num_examples=manifest.counts.num_written,
        left_out=manifest.counts.skipped,
        num_moved=int(((splits != before) & (splits != "")).sum()),
        written={split: sum(manifest.counts.written[split]) for split in in_order(manifest.counts.written)},
        changes=changes,
    )


def _leave_out(
    copies: np.ndarray, ids: np.ndarray, labels: np.ndarray, splits: np.ndarray, names: Mapping[int, Named]
) -> tuple[np.ndarray, dict[int, int]]:
    """Why each example is left out ("": it is not), and for the copies the one that is kept."""
    reasons = np.full(len(labels), "", f"<U{max(len(COPY), len(CONFLICT))}")
    kept_of: dict[int, int] = {}
    sets: dict[int, list[int]] = defaultdict(list)
    for row in copies.tolist():
        sets[int(ids[row])].append(row)
    for rows in sets.values():
        if len({int(labels[row]) for row in rows}) > 1:
            reasons[rows] = CONFLICT
            continue
        first, *others = sorted(rows, key=lambda row: (_rank(str(splits[row])), names[row].path, row))
        reasons[others] = COPY
        kept_of |= dict.fromkeys(others, first)
    return reasons, kept_of


def _rank(split: str) -> int:
    return _KEPT_FIRST.index(split) if split in _KEPT_FIRST else len(_KEPT_FIRST)


def _is_torn(units: np.ndarray, splits: np.ndarray) -> np.ndarray:
    """Whether the unit of each example lies in several splits."""
    _, numbers = np.unique(splits, return_inverse=True)
    pairs = np.unique(np.stack([units, numbers], axis=1), axis=0)
    found, counts = np.unique(pairs[:, 0], return_counts=True)
    return np.isin(units, found[counts > 1])


def _mended(
    torn: np.ndarray, units: Sequence[int], labels: np.ndarray, splits: np.ndarray, names: Mapping[int, Named]
) -> list[str]:
    """The split of each torn example; units are known by their first path, so that the cut into shards has no say."""
    if not len(torn):
        return []
    path_of: dict[int, str] = {}
    counts: dict[int, Counter[str]] = defaultdict(Counter)
    for row, unit in zip(torn.tolist(), units, strict=True):
        path_of[unit] = min(path_of.get(unit, names[row].path), names[row].path)
        counts[unit][str(labels[row])] += 1
    stays = splits != ""
    shares = {split: float((splits == split).sum() / stays.sum()) for split in np.unique(splits[stays]).tolist()}
    stays[torn] = False
    dealt = {}
    for split in shares:
        of_label = np.bincount(labels[stays & (splits == split)])
        dealt[split] = {str(label): int(of_label[label]) for label in np.flatnonzero(of_label).tolist()}
    groups = {path_of[unit]: dict(sorted(counts[unit].items())) for unit in counts}
    split_of = assign_groups(groups, shares, 0, dealt)
    return [split_of[path_of[unit]] for unit in units]
