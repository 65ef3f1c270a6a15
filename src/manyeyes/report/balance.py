"""What became of every input of a dataset: seen = written + quarantined + skipped, with some of what was refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from manyeyes import storage
from manyeyes.data.manifest import QUARANTINE, Manifest
from manyeyes.report.thumbnails import data_uri_of_file

_SHOWN_PER_REASON = 6
# Row groups of 256 rows that are looked through for examples of each reason.
_MAX_ROW_GROUPS = 40


@dataclass(frozen=True)
class Refused:
    """One input in quarantine.

    Attributes:
        label: as the source names it, or None.
        image: a data URI of what can be seen of it, or None.
    """

    path: str
    reason: str
    detail: str
    label: str | None
    image: str | None


@dataclass(frozen=True)
class Balance:
    """The counts of a dataset.

    Attributes:
        written: examples by split, then by label.
        quarantined, skipped: by reason.
        refused: some of the quarantined, of each reason.
        view_of: of a view, the dataset whose examples it takes; its own counts are over these.
    """

    uri: str
    fingerprint: str
    encoding: str
    num_seen: int
    written: dict[str, list[int]]
    quarantined: dict[str, int]
    skipped: dict[str, int]
    refused: tuple[Refused, ...]
    view_of: str | None
    notices: tuple[str, ...] = ()


def read_balance(dataset_uri: str, fingerprint: str | None = None) -> Balance:
    """Read the counts, and look through the quarantine.

    Args:
        fingerprint: that the dataset had; another one becomes a notice.

    Raises:
        DatasetError: there is no dataset.
    """
    manifest = Manifest.load(dataset_uri)
    notices = []
    if fingerprint is not None and manifest.fingerprint != fingerprint:
        notices.append(f"{dataset_uri} was changed since: it has the fingerprint {manifest.fingerprint}.")
    refused: tuple[Refused, ...] = ()
    try:
        refused = tuple(_refused(dataset_uri, manifest))
    except (pa.ArrowException, OSError) as error:
        notices.append(f"The quarantine can't be read: {error}")
    counts = manifest.counts
    return Balance(
        dataset_uri,
        manifest.fingerprint,
        manifest.encoding,
        manifest.num_seen,
        counts.written,
        counts.quarantined,
        counts.skipped,
        refused,
        manifest.view_of,
        tuple(notices),
    )


def _refused(dataset_uri: str, manifest: Manifest) -> Iterator[Refused]:
    """Some of the quarantined, by reason and path."""
    wanted = {reason: min(count, _SHOWN_PER_REASON) for reason, count in manifest.counts.quarantined.items()}
    found: Counter[str] = Counter()
    rows = []
    left = _MAX_ROW_GROUPS
    for shard in manifest.quarantine:
        if not left or all(found[reason] >= count for reason, count in wanted.items()):
            break
        with (
            storage.open_read(storage.join(dataset_uri, QUARANTINE, shard.name)) as opened,
            pq.ParquetFile(opened, page_checksum_verification=True) as file,
        ):
            for index in range(min(left, file.num_row_groups)):
                left -= 1
                for row in file.read_row_group(index, use_threads=False).to_pylist():
                    if found[row["reason"]] < wanted.get(row["reason"], 0):
                        found[row["reason"]] += 1
                        rows.append(row)
    for row in sorted(rows, key=lambda row: (row["reason"], row["path"])):
        image = data_uri_of_file(row["bytes"]) if row["bytes"] else None
        yield Refused(row["path"], row["reason"], row["detail"], row["label"], image)
