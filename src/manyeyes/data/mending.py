"""The last step of an ingest: near-duplicates that were dealt to several splits come together in one of them.

That two files show the same picture is known only when all are decoded. So shards are written first; where a picture
turns out to lie in several splits, those shards are written again without its rows, which go to shards of their own.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import pyarrow as pa

from manyeyes import config, storage
from manyeyes.data.dataset import Dataset
from manyeyes.data.duplicates import DEFAULT_DISTANCE, ChosenRows, Duplicates, choose_rows, find_duplicates
from manyeyes.data.manifest import Manifest, ShardInfo
from manyeyes.data.shards import (
    INGEST,
    MAX_ROW_GROUP_BYTES,
    RECORD_ROW,
    WRITER_VERSION,
    ShardRecord,
    ShardWriter,
    finished_record,
    publish_shard,
    shard_schema,
)
from manyeyes.data.splits import is_torn, join_relations, join_torn
from manyeyes.engines.base import Engine

# In `.ingest`: the manifest of what was dealt, a view of the shards as they were first written.
_DEALT = "dealt"
_MAX_NAMES = 10
# A row takes a row group to be read: of this many a task reads some gigabytes at most.
_MAX_ROW_GROUPS = 512


@dataclass(frozen=True)
class Mended:
    """What came of it.

    Attributes:
        records: of all tasks, those of shards that were written again replaced.
        num_moved: how many examples are in another split than was dealt.
        remarks: what people should know, in sentences.
    """

    records: list[ShardRecord]
    num_moved: int = 0
    remarks: tuple[str, ...] = ()


def bring_together(
    writer: ShardWriter, manifest: Manifest, records: list[ShardRecord], dealt: Sequence[str], engine: Engine
) -> Mended:
    """Mend the splits of a dataset whose shards are written and whose manifest is not published yet.

    What is joined by groups and near-duplicates (see duplicates.find_duplicates) and lies in several of the splits
    `dealt` goes to one, where the counts of each label stay nearest to what they were; all else stays.

    Args:
        manifest: of all that was written.
        records: of all tasks.
        dealt: the splits to which the ingest has dealt entries; none of them is empty. What the source itself has put
            into others stays there.

    Raises:
        DatasetError: a shard is damaged.
    """
    stored = [record for record in records if record.shard is not None]
    shards = tuple(record.shard for record in stored if record.shard is not None)
    uri = storage.join(writer.dataset, INGEST, _DEALT)
    dataclasses.replace(manifest, shards=shards, quarantine=(), view_of=writer.dataset).save(uri)
    dataset = Dataset(uri)
    rows = np.frombuffer(b"".join(base64.b64decode(record.rows) for record in stored), RECORD_ROW)
    found = find_duplicates(dataset, engine, hashes=np.ascontiguousarray(rows["phash"]))
    if (found.clusters < 0).all():
        return Mended(records)
    labels = np.ascontiguousarray(rows["label"])
    units = join_relations(np.ascontiguousarray(rows["group"]), found.clusters)
    split_names = [*dealt, *sorted({shard.split for shard in shards} - set(dealt))]
    of_rows = np.repeat([split_names.index(shard.split) for shard in shards], [shard.num_rows for shard in shards])
    # What the source itself has put into a split takes no part.
    before = np.where(of_rows < len(dealt), of_rows, -1)
    splits = _joined(units, labels, before, dealt)
    remarks = [*_of_search(found), *_of_given(found.clusters, of_rows, split_names, len(dealt))]
    emptied = [name for split, name in enumerate(dealt) if not (splits == split).any()]
    if emptied:
        remarks.append(
            f"Near-duplicates lie in several splits: kept together they would leave {' and '.join(emptied)} empty. "
            "They stay where they were dealt. For honest figures give val and test pictures of their own."
        )
        splits = before
    moved = np.flatnonzero(splits != before)
    leaving = {chosen.shard.name: chosen for chosen in choose_rows(shards, moved)}
    tasks = [task for shard in shards if shard.name in leaving for task in _without(leaving[shard.name])]
    for split, name in enumerate(dealt):
        tasks += _of_moved(name, list(choose_rows(shards, moved[splits[moved] == split])), shards)
    kept = [
        dataclasses.replace(record, shard=None, written={})
        if record.shard is not None and record.shard.name in leaving
        else record
        for record in records
    ]
    new = engine.map(functools.partial(write_again, dataset, writer), tasks) if tasks else []
    remarks += _of_lost(writer.class_names, labels, before, splits, dealt)
    return Mended([*kept, *new], len(moved), tuple(remarks))


def _joined(units: np.ndarray, labels: np.ndarray, before: np.ndarray, dealt: Sequence[str]) -> np.ndarray:
    """The split of each example, int (n,), with no unit in several of those that were dealt; -1 stays."""
    free = np.flatnonzero(before >= 0)
    torn = free[is_torn(units[free], before[free])]
    splits = before.copy()
    splits[torn] = join_torn(torn, units[torn], labels, before, dealt, [f"{row:012d}" for row in torn.tolist()])
    # As in dealing: a class that has a single picture is trained on.
    train = dealt.index("train") if "train" in dealt else -1
    lost = np.setdiff1d(labels[before == train], labels[splits == train])
    back = np.isin(units[torn], units[torn][np.isin(labels[torn], lost)])
    splits[torn[back]] = train
    return splits


@dataclass(frozen=True)
class RewriteTask:
    """A shard that takes rows of others.

    Attributes:
        name: without extension.
        split: of all its rows.
        parts: the rows, in their order.
    """

    name: str
    split: str
    parts: tuple[ChosenRows, ...]

    @property
    def fingerprint(self) -> str:
        """16 hex digits over all that the result depends on."""
        digest = hashlib.sha256(f"{WRITER_VERSION}/{self.name}/{self.split}".encode())
        for part in self.parts:
            digest.update(part.shard.sha256.encode())
            digest.update(np.ascontiguousarray(part.rows, "<i8").tobytes())
        return digest.hexdigest()[:16]


def write_again(dataset: Dataset, writer: ShardWriter, task: RewriteTask) -> ShardRecord:
    """Write the shard of a task, unless an earlier attempt has; see shards.write_shard."""
    record_uri = storage.join(writer.dataset, INGEST, f"{task.name}.json")
    finished = finished_record(record_uri, task.fingerprint, writer.dataset)
    if finished is not None:
        return finished
    labels: Counter[int] = Counter()

    def tables() -> Iterator[pa.Table]:
        for table in _row_groups(dataset, writer, task):
            labels.update(table.column("label").to_pylist())
            yield table

    shard = publish_shard(writer, f"{task.name}.parquet", task.split, tables())
    written = {str(label): count for label, count in sorted(labels.items())}
    record = ShardRecord(task.fingerprint, task.split, shard.num_rows, shard, None, written, {})
    storage.write_json(record_uri, config.to_dict(record))
    return record


def _row_groups(dataset: Dataset, writer: ShardWriter, task: RewriteTask) -> Iterator[pa.Table]:
    """The rows of a task, in its split, cut into row groups."""
    schema = shard_schema(writer.encoding, writer.class_names)
    pending: list[pa.Table] = []
    for table in _rows(dataset, task, schema):
        start = 0
        while start < table.num_rows:
            room = writer.row_group_rows - sum(each.num_rows for each in pending)
            piece = table.slice(start, room)
            # Two row groups of very large originals have no room in one.
            is_full = sum(each.nbytes for each in (*pending, piece)) > MAX_ROW_GROUP_BYTES
            if pending and (room == 0 or is_full):
                yield pa.concat_tables(pending)
                pending = []
                continue
            pending.append(piece)
            start += piece.num_rows
    if pending:
        yield pa.concat_tables(pending)


def _rows(dataset: Dataset, task: RewriteTask, schema: pa.Schema) -> Iterator[pa.Table]:
    for part in task.parts:
        with dataset.open_shard(part.shard) as reader:
            for index, rows in part.by_row_group():
                table = reader.read_table(index, schema.names).take(pa.array(rows))
                columns = {name: table.column(name) for name in schema.names}
                columns["split"] = pa.array([task.split] * table.num_rows, pa.string())
                yield pa.Table.from_arrays(list(columns.values()), schema=schema)


def _without(leaving: ChosenRows) -> list[RewriteTask]:
    """The task that writes a shard again without rows, if any stay."""
    shard = leaving.shard
    stays = np.setdiff1d(np.arange(shard.num_rows), leaving.rows, assume_unique=True)
    name = PurePosixPath(shard.name).stem
    return [RewriteTask(f"{name}-kept", shard.split, (ChosenRows(shard, stays),))] if len(stays) else []


def _of_moved(split: str, parts: Sequence[ChosenRows], shards: Sequence[ShardInfo]) -> Iterator[RewriteTask]:
    """Tasks for the rows that come to a split: about as large as the largest of `shards`, if rows are as the others."""
    max_rows, max_bytes = (max(getattr(shard, name) for shard in shards) for name in ("num_rows", "size_bytes"))
    taken: list[ChosenRows] = []
    total, number = np.zeros(3), 0
    for part in parts:
        num_row_groups = sum(1 for _ in part.by_row_group())
        size = np.array([len(part.rows), len(part.rows) * part.shard.size_bytes / part.shard.num_rows, num_row_groups])
        if taken and (total + size > (max_rows, max_bytes, _MAX_ROW_GROUPS)).any():
            yield RewriteTask(f"{split}-moved-{number:05d}", split, tuple(taken))
            taken, total, number = [], np.zeros(3), number + 1
        taken.append(part)
        total += size
    if taken:
        yield RewriteTask(f"{split}-moved-{number:05d}", split, tuple(taken))


def _of_search(found: Duplicates) -> list[str]:
    if found.distance == DEFAULT_DISTANCE:
        return []
    return [
        f"So many images look alike that near-duplicates were looked for within {found.distance} of 64 bits only "
        f"(otherwise {DEFAULT_DISTANCE})."
    ]


def _of_given(clusters: np.ndarray, of_rows: np.ndarray, split_names: Sequence[str], num_dealt: int) -> list[str]:
    """A sentence on examples that were dealt although the source holds out their near-duplicates."""
    is_given = of_rows >= num_dealt
    leaks = ~is_given & (clusters >= 0) & np.isin(clusters, clusters[is_given & (clusters >= 0)])
    if not leaks.any():
        return []
    given = " and ".join(split_names[num_dealt:])
    count = int(leaks.sum())
    return [
        f"{count:,} {'example has a near-duplicate' if count == 1 else 'examples have near-duplicates'} in {given}, as "
        "the source has it. `manyeyes audit` lists them, and its --fix mends the splits."
    ]


def _of_lost(
    class_names: Sequence[str], labels: np.ndarray, before: np.ndarray, splits: np.ndarray, dealt: Sequence[str]
) -> list[str]:
    """Sentences on splits that have lost most of their examples, or the last one of some classes."""
    remarks = []
    for split, name in enumerate(dealt):
        had, has = (np.bincount(labels[each == split], minlength=len(class_names)) for each in (before, splits))
        if 2 * has.sum() < had.sum():
            remarks.append(
                f"{name} has {has.sum():,} examples, where {had.sum():,} were dealt to it: most of the others are "
                "near-duplicates of examples elsewhere."
            )
        lost = [class_names[label] for label in np.flatnonzero((had > 0) & (has == 0)).tolist()]
        if lost:
            some = ", ".join(lost[:_MAX_NAMES]) + (" …" if len(lost) > _MAX_NAMES else "")
            remarks.append(
                f"{name} has no example of {len(lost)} of {len(class_names)} classes ({some}): what was dealt to it "
                "are near-duplicates of examples elsewhere."
            )
    return remarks
