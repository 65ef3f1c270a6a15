"""The mended dataset: a view of the audited one, without copies and with nothing that straddles its splits."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from manyeyes import storage
from manyeyes.auditing.findings import Fixed
from manyeyes.auditing.lookup import Named, read_names
from manyeyes.auditing.measuring import Measured
from manyeyes.auditing.order import in_order
from manyeyes.data.dataset import Dataset
from manyeyes.data.duplicates import Duplicates
from manyeyes.data.splits import is_torn, join_relations, join_torn
from manyeyes.data.view import ViewRows, write_view
from manyeyes.engines.base import Engine
from manyeyes.errors import DataError, ManyeyesError

CHANGES_NAME = "changes.jsonl"
STAYS, COPY, CONFLICT = range(3)
REASONS = ("", "exact_copy", "conflicting_labels")
STRADDLES = "straddles_splits"
_LEFT_OUT = -1


def write_fixed(dataset: Dataset, engine: Engine, measured: Measured, duplicates: Duplicates, out: str) -> Fixed:
    """Write the view, and the list of what it changes.

    Of exact copies one stays, and none where their labels differ: one of them is wrong, and which is not known. Then
    what is joined by clusters and groups and lies in several splits goes to one, where the counts of labels stay
    nearest to what they were; all else stays where it is.

    Returns:
        Counts that balance.

    Raises:
        DataError: nothing would be left.
    """
    labels, before, split_names = measured.labels, measured.splits, measured.split_names
    copies = np.flatnonzero(duplicates.copies >= 0)
    names = read_names(dataset, engine, copies.tolist())
    reasons, kept_of = _leave_out(copies, duplicates.copies, measured, names)
    splits = np.where(reasons == STAYS, before, _LEFT_OUT)
    stays = np.flatnonzero(splits != _LEFT_OUT)
    if not len(stays):
        raise DataError(
            f"Nothing of {dataset.uri} would be left: each of its {len(labels):,} examples is a copy of one with "
            "another label. Correct the labels where it was ingested from; without --fix the audit lists them."
        )
    units = join_relations(duplicates.clusters[stays], measured.groups[stays])
    are_torn = is_torn(units, splits[stays])
    torn = stays[are_torn]
    names |= read_names(dataset, engine, torn.tolist())
    paths = [names[row].path for row in torn.tolist()]
    splits[torn] = join_torn(torn, units[are_torn], labels, splits, split_names, paths)
    lines = []
    for row in np.flatnonzero(splits != before).tolist():
        to = None if splits[row] == _LEFT_OUT else split_names[splits[row]]
        reason = REASONS[reasons[row]] or STRADDLES
        lines.append({"path": names[row].path, "from": split_names[before[row]], "to": to, "reason": reason})
        if row in kept_of:
            lines[-1]["kept"] = names[kept_of[row]].path
    lines.sort(key=lambda line: (line["path"], line["from"]))
    changes = storage.join(out, CHANGES_NAME)
    storage.write_bytes(changes, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    manifest = write_view(
        dataset, out, list(_view_rows(dataset, measured, splits, reasons)), {"audit": {"distance": duplicates.distance}}
    )
    if not manifest.balances or manifest.num_seen != len(labels):
        raise ManyeyesError(f"Internal error: {out} does not balance. Please report this.")
    written = manifest.counts.written
    return Fixed(
        dataset=out,
        num_examples=manifest.counts.num_written,
        left_out=manifest.counts.skipped,
        num_moved=int(((splits != before) & (splits != _LEFT_OUT)).sum()),
        written={split: sum(written[split]) for split in in_order(written)},
        emptied=_emptied(dataset, written),
        changes=changes,
    )


def _emptied(dataset: Dataset, written: Mapping[str, Sequence[int]]) -> dict[str, tuple[str, ...]]:
    before, none = dataset.manifest.counts.written, [0] * len(dataset.class_names)
    found = {}
    for split in in_order(before):
        counts = zip(dataset.class_names, before[split], written.get(split, none), strict=True)
        found[split] = tuple(name for name, num_before, num_left in counts if num_before and not num_left)
    return {split: names for split, names in found.items() if names}


def _view_rows(dataset: Dataset, measured: Measured, splits: np.ndarray, reasons: np.ndarray) -> Iterator[ViewRows]:
    # The last name is that of _LEFT_OUT.
    split_names, reason_names = np.array([*measured.split_names, ""]), np.array(REASONS)
    start = 0
    for shard in dataset.manifest.shards:
        rows = slice(start, start + shard.num_rows)
        of_shard = reason_names[reasons[rows]] if reasons[rows].any() else None
        yield ViewRows(shard, measured.labels[rows], split_names[splits[rows]], of_shard)
        start += shard.num_rows


def _leave_out(
    copies: np.ndarray, ids: np.ndarray, measured: Measured, names: Mapping[int, Named]
) -> tuple[np.ndarray, dict[int, int]]:
    """The reason of each example, int8, and for the copies that are left out the one that is kept."""
    reasons = np.full(len(measured.labels), STAYS, np.int8)
    kept_of: dict[int, int] = {}
    sets: dict[int, list[int]] = defaultdict(list)
    for row in copies.tolist():
        sets[int(ids[row])].append(row)
    for rows in sets.values():
        if len({int(measured.labels[row]) for row in rows}) > 1:
            reasons[rows] = CONFLICT
            continue
        # Of copies in several splits the one in the last, held-out split is kept: it is missed more.
        first, *others = sorted(rows, key=lambda row: (-measured.splits[row], names[row].path, row))
        reasons[others] = COPY
        kept_of |= dict.fromkeys(others, first)
    return reasons, kept_of
