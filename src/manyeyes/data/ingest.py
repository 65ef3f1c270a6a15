"""Ingest: from a source to a dataset. The driver lists, splits and shuffles; workers read, decode and write shards."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import manyeyes
from manyeyes import config, storage
from manyeyes.data.destination import check_destination, claim, finished_manifest, remove_leftovers
from manyeyes.data.listing import Listing, list_source
from manyeyes.data.manifest import MANIFEST_NAME, SPLITS, Counts, Manifest
from manyeyes.data.mending import Mended, bring_together
from manyeyes.data.scatter import Scatter
from manyeyes.data.shards import INGEST, ShardRecord, ShardTask, ShardWriter, row_group_rows, write_shard
from manyeyes.data.sources import Source, SourceEntry, open_source
from manyeyes.data.splits import Fractions
from manyeyes.engines.base import Engine
from manyeyes.engines.registry import create_engine
from manyeyes.errors import DatasetError, ManyeyesError, SourceError, UsageError
from manyeyes.imaging.decode import DecodeLimits
from manyeyes.imaging.preprocessing import Fit, Preprocessing

# Raw pixels up to this size an image are stored decoded unless told; larger ones would fill disks.
MAX_AUTO_RAW_BYTES = 128 * 1024
_TARGET_SHARD_BYTES = 64 << 20
_MAX_SHARD_ROWS = 8192
# A dataset that is small is still cut into about this many tasks, so that all workers have work and a resume is cheap.
_MIN_TASKS = 16
_UNKNOWN_SIZE_BYTES = 128 * 1024

Progress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class IngestSettings:
    """What an ingest does; all but `overwrite` is part of the dataset's identity.

    Attributes:
        size: (height, width) in pixels of stored images, or None to keep each image's own.
        fit: how an image comes to that size: "crop", "pad" or "stretch".
        resize_short: with "crop": the shorter side before the cut.
        channels: 3 (RGB), 1 (grey), or None: 1 where the source is known to be grey, else 3.
        encoding: "raw", "jpeg", or "auto": raw if the size is fixed and an image has at most 128 KiB of pixels.
        val, test: shares of the splits where the source has none.
        group_duplicates: near-duplicates stay in one split, as groups do (see data.mending); False deals each alone.
        seed: of splits and order.
        shuffle: False keeps the order of the source; what near-duplicates bring to another split comes last there.
        source_kind: see sources.open_source.
        image_column, label_column: of a Parquet source.
        class_names: the classes in the order of their labels; other labels go to quarantine. None: those found.
        max_pixels: larger images go to quarantine before they are decoded.
        overwrite: replace a dataset that was made with other settings.
    """

    size: tuple[int, int] | None = None
    fit: Fit = "crop"
    resize_short: int | None = None
    channels: int | None = None
    encoding: Literal["auto", "raw", "jpeg"] = "auto"
    val: float = 0.1
    test: float = 0.1
    group_duplicates: bool = True
    seed: int = 0
    shuffle: bool = True
    source_kind: str = "auto"
    image_column: str = "image"
    label_column: str = "label"
    class_names: tuple[str, ...] | None = None
    max_pixels: int = DecodeLimits().max_pixels
    overwrite: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        if self.channels not in (None, 1, 3):
            raise UsageError(f"--channels {self.channels} is not possible. Use 3 (RGB), 1 (grey) or auto.")
        if self.resize_short is not None and (self.size is None or self.fit != "crop"):
            raise UsageError("--resize-short goes with --size and --fit crop only.")
        if self.size is not None:
            Preprocessing.for_size(*self.size, self.fit, resize_short=self.resize_short)
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is below 0.")
        if self.max_pixels < 1:
            raise UsageError(f"--max-pixels {self.max_pixels} is below 1.")
        if self.class_names is not None and len(set(self.class_names)) != len(self.class_names):
            twice = next(name for name, count in Counter(self.class_names).items() if count > 1)
            raise UsageError(f"The class names have {twice!r} twice. Give each class one name.")
        Fractions(self.val, self.test)

    def identity(self) -> dict[str, Any]:
        """What the result depends on, as JSON values."""
        values = config.to_dict(self)
        del values["overwrite"]
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


@dataclass(frozen=True)
class IngestResult:
    """What an ingest made. num_seen = num_written + quarantined + skipped.

    Attributes:
        was_complete: the dataset was there already and nothing was done.
        written: split -> number of examples.
        num_moved, remarks: see Manifest.
        quarantined, skipped: reason -> number of inputs.
        size_bytes: of all shards.
        seconds: of this run; images_per_second counts what this run read, listing included.
    """

    dataset: str
    was_complete: bool
    num_seen: int
    num_written: int
    written: dict[str, int]
    quarantined: dict[str, int]
    skipped: dict[str, int]
    num_classes: int
    encoding: str
    image_shape: tuple[int, int, int] | None
    num_shards: int
    size_bytes: int
    seconds: float
    images_per_second: float
    num_moved: int = 0
    remarks: tuple[str, ...] = ()


def ingest(
    source: str | Source,
    dataset: str,
    *,
    settings: IngestSettings | None = None,
    engine: Engine | None = None,
    on_progress: Progress | None = None,
) -> IngestResult:
    """Write the images of a source as a dataset; interrupted and called again, it goes on where it stopped.

    Args:
        source: URI of a folder tree, a table, IDX files, tars or Parquet files (see data.sources); or a source that is
            open already.
        dataset: URI of the dataset directory to make.
        settings: defaults to IngestSettings().
        engine: where it runs; defaults to the local engine with one worker per core.
        on_progress: called with ("list", inputs so far, None), then ("write", inputs done, inputs in all), and at last
            ("compare", 0, None) where near-duplicates are looked for.

    Returns:
        Counts that balance, and what the dataset has.

    Raises:
        SourceError: the source is missing, can't be understood, or has fewer than two classes.
        UsageError: a setting is wrong, or the destination can't be used.
    """
    started = time.perf_counter()
    settings = settings or IngestSettings()
    engine = engine or create_engine()
    report = on_progress or (lambda phase, done, total: None)
    opened, source = (None, source) if isinstance(source, str) else (source, source.uri)
    source, dataset = storage.absolute(source), storage.absolute(dataset)
    if (dataset + "/").startswith(source.rstrip("/") + "/"):
        raise UsageError(f"The dataset {dataset} would lie inside its source. Choose a place outside {source}.")
    opened = opened or open_source(source, settings.source_kind, settings.image_column, settings.label_column)
    identity = {"source": {"uri": source, "kind": opened.kind}, "settings": settings.identity()}
    complete = None if settings.overwrite else finished_manifest(dataset, identity)
    check_destination(dataset)
    if complete is not None:
        _clean(dataset, complete)
        return _result(dataset, complete, True, time.perf_counter() - started, 0)
    with Scatter(settings.seed if settings.shuffle else None) as scatter:
        listing = list_source(opened, settings.class_names, scatter, lambda count: report("list", count, None))
        _check_classes(listing, source)
        writer = _writer(opened, dataset, settings, listing.class_names)
        claim(dataset, identity, settings.overwrite)
        total, done = listing.num_entries, 0

        def on_result(_: int, record: ShardRecord) -> None:
            nonlocal done
            done += record.num_entries
            report("write", done, total)

        report("write", 0, total)
        fractions = Fractions(settings.val, settings.test)
        tasks = _tasks(opened, writer, listing, scatter, fractions, settings.seed)
        mended = Mended(engine.map(write_shard, tasks, on_result=on_result))
    manifest = _manifest(writer, listing, mended.records, identity)
    dealt = [split for split in listing.shares(fractions) if sum(manifest.counts.written.get(split, ()))]
    if settings.group_duplicates and len(dealt) > 1:
        report("compare", 0, None)
        mended = bring_together(writer, manifest, mended.records, dealt, engine)
        manifest = _manifest(writer, listing, mended.records, identity)
        manifest = dataclasses.replace(manifest, num_moved=mended.num_moved, remarks=mended.remarks)
    if not manifest.balances:
        raise ManyeyesError(
            f"Internal error: {dataset} does not balance: "
            f"{manifest.num_seen} seen, {manifest.counts.num_written} written, "
            f"{manifest.counts.num_quarantined} quarantined, {manifest.counts.num_skipped} skipped. Please report this."
        )
    manifest.save(dataset)
    _clean(dataset, manifest)
    return _result(dataset, manifest, False, time.perf_counter() - started, listing.num_entries)


def _clean(dataset: str, manifest: Manifest) -> None:
    """Remove what only the ingest needed; if this is interrupted, the next call does it."""
    records = storage.join(dataset, INGEST)
    if storage.exists(records):
        remove_leftovers(dataset, manifest)
        storage.remove(records, recursive=True)


def _check_classes(listing: Listing, source: str) -> None:
    if not listing.num_entries:
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(listing.skipped.items()))
        raise SourceError(f"No images found in {source}{f' (passed over: {skipped})' if skipped else ''}.")
    if not listing.num_usable:
        problems = ", ".join(f"{count} {reason}" for reason, count in sorted(listing.problems.items()))
        raise SourceError(f"None of the {listing.num_entries} images in {source} has a usable label: {problems}.")
    if listing.num_classes_found < 2:
        raise SourceError(
            f"{source} has images of one class only. A classifier needs two or more: "
            "expected one folder per class, or a label column with several values."
        )


def _writer(source: Source, dataset: str, settings: IngestSettings, class_names: tuple[str, ...]) -> ShardWriter:
    native = source.image_shape
    channels = settings.channels or (native[2] if native else 3)
    size = settings.size or (native[:2] if native else None)
    if size is None:
        preprocessing, shape = Preprocessing(channels=channels), None
    else:
        # At the images' own size this changes no pixel; a recogniser trained on them then knows the size it serves.
        preprocessing = Preprocessing.for_size(*size, settings.fit, channels, settings.resize_short)
        shape = (*size, channels)
    encoding = settings.encoding
    if encoding == "auto":
        is_small = shape is not None and shape[0] * shape[1] * shape[2] <= MAX_AUTO_RAW_BYTES
        encoding = "raw" if is_small else "jpeg"
    if encoding == "raw" and shape is None:
        raise UsageError("--encoding raw stores pixels of one size. Say which with --size, e.g. --size 160.")
    if shape is None and settings.max_pixels > DecodeLimits().max_pixels:
        raise UsageError(
            f"--max-pixels {settings.max_pixels} would keep originals that training refuses to decode. "
            f"Use at most {DecodeLimits().max_pixels}, or --size."
        )
    return ShardWriter(
        dataset=dataset,
        encoding=encoding,
        preprocessing=preprocessing,
        limits=DecodeLimits(max_pixels=settings.max_pixels),
        class_names=class_names,
        row_group_rows=row_group_rows(encoding, shape),
        seed=settings.seed if settings.shuffle else None,
    )


def _tasks(
    source: Source, writer: ShardWriter, listing: Listing, scatter: Scatter, fractions: Fractions, seed: int
) -> Iterator[ShardTask]:
    split_of = listing.splitter(fractions, seed)
    label_of = {name: label for label, name in enumerate(writer.class_names)}
    shape = writer.preprocessing.output_shape
    fixed_bytes = None
    if shape is not None:
        # A JPEG of quality 92 has about a sixth of its pixels' bytes.
        fixed_bytes = max(1, shape[0] * shape[1] * shape[2] // (1 if writer.encoding == "raw" else 6))
    max_rows = _MAX_SHARD_ROWS if fixed_bytes is None else min(_MAX_SHARD_ROWS, _TARGET_SHARD_BYTES // fixed_bytes)
    max_rows = min(max_rows, -(-listing.num_entries // _MIN_TASKS))
    # Whole row groups, so that only the last one of a split is short.
    max_rows = max(1, round(max_rows / writer.row_group_rows)) * writer.row_group_rows
    pending: dict[str, list[SourceEntry]] = {split: [] for split in (*SPLITS, "")}
    pending_bytes: Counter[str] = Counter()
    num_tasks: Counter[str] = Counter()

    def flush(split: str) -> ShardTask:
        entries = tuple(pending[split])
        name = f"{split or 'problem'}-{num_tasks[split]:05d}"
        num_tasks[split] += 1
        pending[split].clear()
        pending_bytes[split] = 0
        labels = tuple(-1 if entry.label is None else label_of.get(entry.label, -1) for entry in entries)
        return ShardTask(name, split, entries, labels, source, writer)

    for record in scatter:
        entry = SourceEntry.from_json(record[:-1])
        split = "" if entry.problem is not None else split_of(entry, record[-1])
        estimate = fixed_bytes or (entry.size_bytes if entry.size_bytes >= 0 else _UNKNOWN_SIZE_BYTES)
        if pending[split] and pending_bytes[split] + estimate > _TARGET_SHARD_BYTES and fixed_bytes is None:
            yield flush(split)
        pending[split].append(entry)
        pending_bytes[split] += estimate
        if len(pending[split]) >= max_rows:
            yield flush(split)
    for split in pending:
        if pending[split]:
            yield flush(split)


def _manifest(writer: ShardWriter, listing: Listing, records: list[ShardRecord], identity: dict[str, Any]) -> Manifest:
    written = {split: [0] * len(writer.class_names) for split in SPLITS}
    quarantined: Counter[str] = Counter()
    for record in records:
        quarantined.update(record.quarantined)
        for label, count in record.written.items():
            written[record.split][int(label)] += count
    order = {split: position for position, split in enumerate(SPLITS)}
    shards = sorted((r.shard for r in records if r.shard), key=lambda info: (order[info.split], info.name))
    return Manifest(
        class_names=writer.class_names,
        encoding=writer.encoding,
        preprocessing=writer.preprocessing.to_dict(),
        preprocessing_fingerprint=writer.preprocessing.fingerprint,
        image_shape=writer.preprocessing.output_shape,
        num_seen=listing.num_entries + sum(listing.skipped.values()),
        counts=Counts(
            skipped=dict(sorted(listing.skipped.items())),
            quarantined=dict(sorted(quarantined.items())),
            written={split: counts for split, counts in written.items() if sum(counts)},
        ),
        shards=tuple(shards),
        quarantine=tuple(sorted((r.quarantine for r in records if r.quarantine), key=lambda info: info.name)),
        source=identity["source"],
        settings=identity["settings"],
        manyeyes_version=manyeyes.__version__,
    )


def _result(dataset: str, manifest: Manifest, was_complete: bool, seconds: float, num_read: int) -> IngestResult:
    if not manifest.balances:
        raise DatasetError(f"{dataset}: the counts in {MANIFEST_NAME} do not balance. Ingest again with --overwrite.")
    counts = manifest.counts
    return IngestResult(
        dataset=dataset,
        was_complete=was_complete,
        num_seen=manifest.num_seen,
        num_written=counts.num_written,
        written={split: sum(counts.written[split]) for split in SPLITS if split in counts.written},
        quarantined=counts.quarantined,
        skipped=counts.skipped,
        num_classes=len(manifest.class_names),
        encoding=manifest.encoding,
        image_shape=manifest.image_shape,
        num_shards=len(manifest.shards),
        size_bytes=sum(shard.size_bytes for shard in manifest.shards),
        seconds=seconds,
        images_per_second=num_read / seconds if seconds > 0 else 0.0,
        num_moved=manifest.num_moved,
        remarks=manifest.remarks,
    )


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of "160" or "HEIGHTxWIDTH".

    Raises:
        UsageError: it is neither.
    """
    parts = text.lower().replace("×", "x").split("x")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise UsageError(f"--size {text!r} is not a size. Write pixels as N or HEIGHTxWIDTH, e.g. 160 or 128x96.")
    return int(parts[0]), int(parts[-1])


def read_class_names(uri: str) -> tuple[str, ...]:
    """Return the lines of a file of class names; blank ones are passed over.

    Raises:
        UsageError: it can't be read, or has fewer than two names.
    """
    try:
        lines = storage.read_bytes(uri).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).rstrip(".")
        raise UsageError(f"The class names can't be read: {uri}: {reason}. Give a file with one name a line.") from None
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) < 2:
        raise UsageError(f"{uri} has {len(names)} class names. A classifier needs two or more, one a line.")
    return names
