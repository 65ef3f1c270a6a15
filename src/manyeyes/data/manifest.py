"""The manifest of a dataset directory: what is in it, where it came from, and counts that balance."""

from __future__ import annotations

import base64
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from manyeyes import config, storage
from manyeyes.errors import ConfigError, DatasetError

FORMAT = "manyeyes.dataset"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
SHARDS = "shards"
QUARANTINE = "quarantine"
SPLITS = ("train", "val", "test")

Encoding = Literal["jpeg", "raw"]


@dataclass(frozen=True)
class ShardInfo:
    """One Parquet file of a dataset: rows of one split, in row groups. Split and name are its own in the dataset.

    Attributes:
        name: file name in `shards/` (or `quarantine/`).
        split: "train", "val" or "test"; "" for quarantine.
        row_group_rows: the number of rows of each row group; in a view, of those that have any, as the view has them.
        size_bytes, sha256: of the file.
        rows: in a view, which rows of the file these are: base64 of a bit for each, most significant bit first.
        file_row_group_rows: in a view, the number of rows of each row group of the file.
    """

    name: str
    split: str
    row_group_rows: tuple[int, ...]
    size_bytes: int
    sha256: str
    rows: str | None = None
    file_row_group_rows: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        """The number of rows in all row groups."""
        return sum(self.row_group_rows)

    def file_rows(self) -> np.ndarray:
        """The rows of the file that belong to it: int64 (num_rows,), counted from 0 through all row groups."""
        if self.rows is None:
            return np.arange(self.num_rows)
        bits = np.frombuffer(base64.b64decode(self.rows), np.uint8)
        return np.flatnonzero(np.unpackbits(bits, count=sum(self.file_row_group_rows)))


@dataclass(frozen=True)
class Counts:
    """What became of every input. seen = written + quarantined + skipped.

    Attributes:
        skipped: inputs that are not examples by design (hidden files, other file types), by reason.
        quarantined: inputs that should have been examples but can't be, by reason code.
        written: examples, by split and then by label (a list as long as class_names).
    """

    skipped: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)
    written: dict[str, list[int]] = field(default_factory=dict)

    @property
    def num_skipped(self) -> int:
        """Inputs that were passed over."""
        return sum(self.skipped.values())

    @property
    def num_quarantined(self) -> int:
        """Inputs in quarantine."""
        return sum(self.quarantined.values())

    @property
    def num_written(self) -> int:
        """Examples in shards."""
        return sum(sum(by_label) for by_label in self.written.values())


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    Attributes:
        class_names: label i is class_names[i].
        encoding: "raw" (uint8 pixels of image_shape) or "jpeg" (encoded bytes in any format that is decoded).
        preprocessing: how stored pixels were made from source bytes (see imaging.Preprocessing.to_dict).
        image_shape: (height, width, channels) of every stored image, or None where they differ.
        num_seen: all inputs of the source; ingest checks it against `counts`.
        settings: what else the result depends on (seed, fractions …).
        num_moved: examples that an ingest brought to another split than was dealt, beside near-duplicates.
        remarks: what people should know of the splits, in sentences.
        view_of: URI of the dataset that has the shards, where this one is a view of it (see data.view).
    """

    class_names: tuple[str, ...]
    encoding: Encoding
    preprocessing: dict[str, Any]
    preprocessing_fingerprint: str
    image_shape: tuple[int, int, int] | None
    num_seen: int
    counts: Counts
    shards: tuple[ShardInfo, ...]
    quarantine: tuple[ShardInfo, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    num_moved: int = 0
    remarks: tuple[str, ...] = ()
    view_of: str | None = None
    manyeyes_version: str = ""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @property
    def balances(self) -> bool:
        """Whether seen = written + quarantined + skipped, and the shards hold what the counts say."""
        counts = self.counts
        return (
            self.num_seen == counts.num_written + counts.num_quarantined + counts.num_skipped
            and counts.num_written == sum(shard.num_rows for shard in self.shards)
            and counts.num_quarantined == sum(shard.num_rows for shard in self.quarantine)
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the whole content: the identity of the dataset, kept in runs and bundles."""
        return hashlib.sha256(storage.canonical_json(self.to_dict())).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; what only views have, or datasets with near-duplicates, is left out elsewhere."""
        values = config.to_dict(self)
        if not self.num_moved and not self.remarks:
            del values["num_moved"], values["remarks"]
        if self.view_of is None:
            del values["view_of"]
            for shard in (*values["shards"], *values["quarantine"]):
                del shard["rows"], shard["file_row_group_rows"]
        return values

    def save(self, dataset_uri: str) -> None:
        """Publish the manifest; it is the last file of an ingest."""
        storage.write_json(storage.join(dataset_uri, MANIFEST_NAME), self.to_dict())

    @classmethod
    def load(cls, dataset_uri: str) -> Manifest:
        """Read the manifest of the dataset at `dataset_uri`.

        Raises:
            DatasetError: there is none, it is damaged, or it is of another format version.
        """
        uri = storage.join(dataset_uri, MANIFEST_NAME)
        try:
            values = storage.read_json(uri)
        except FileNotFoundError:
            if not storage.exists(dataset_uri):
                raise DatasetError(
                    f"There is no dataset at {dataset_uri}. Make one with: manyeyes ingest SOURCE {dataset_uri}"
                ) from None
            raise DatasetError(
                f"{dataset_uri} has no {MANIFEST_NAME}: it is not a dataset, or its ingest did not finish. "
                f"Run manyeyes ingest again with the same arguments; it goes on where it stopped."
            ) from None
        except ValueError as error:
            raise DatasetError(f"{uri} is damaged: {error}. Restore it, or ingest again with --overwrite.") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise DatasetError(f"{uri} is not the manifest of a Manyeyes dataset.")
        if values.get("format_version") != FORMAT_VERSION:
            raise DatasetError(
                f"{uri} has format version {values.get('format_version')}, this Manyeyes reads {FORMAT_VERSION}. "
                "Ingest again with --overwrite."
            )
        try:
            manifest = config.from_dict(cls, values)
        except ConfigError as error:
            raise DatasetError(f"{uri} can't be used: {error}") from None
        for shard in (*manifest.shards, *manifest.quarantine):
            if not storage.is_file_name(shard.name):
                raise DatasetError(
                    f"{uri} lists {shard.name!r}, which is not a file of the dataset. Ingest again with --overwrite."
                )
        # A split and a file's name tell a row: whatever names rows builds on it.
        counts = Counter((shard.split, shard.name) for shard in manifest.shards)
        for split, name in (key for key, count in counts.items() if count > 1):
            mend = "Ingest again with --overwrite." if manifest.view_of is None else "Make the view again."
            raise DatasetError(f"{uri} lists {name} twice in {split}. {mend}")
        return manifest
