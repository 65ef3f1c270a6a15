"""What one should know before one believes the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.data.manifest import Manifest, ShardInfo
from manyeyes.errors import ManyeyesError
from manyeyes.evaluation.recogniser import Recogniser
from manyeyes.evaluation.tasks import MAX_GROUPS, Findings
from manyeyes.recognition.bundle import INFO_NAME
from manyeyes.training.run import Run


def remarks(recogniser: Recogniser, data: Dataset, split: str, found: Findings) -> Iterator[str]:
    """Yield sentences for people: where intervals are too narrow, and where a model has seen what it is measured on."""
    yield from _of_groups(found)
    yield from _of_training(_trained_on(recogniser), data, split)


def _of_groups(found: Findings) -> Iterator[str]:
    # Groups of one example each say nothing.
    if found.num_grouped > len(found.groups):
        number = f"more than {MAX_GROUPS:,}" if len(found.groups) > MAX_GROUPS else f"{len(found.groups):,}"
        yield (
            f"{found.num_grouped:,} examples are of {number} groups. Intervals take examples for independent: where "
            "those of a group are alike, they are narrower than they should be."
        )


@dataclass(frozen=True)
class _TrainedOn:
    dataset: str
    fingerprint: str
    split: str


def _trained_on(recogniser: Recogniser) -> _TrainedOn:
    if recogniser.kind == "run":
        run = Run.open(recogniser.uri)
        split = run.settings.get("data", {}).get("train_split", "train")
        return _TrainedOn(run.dataset, run.dataset_fingerprint, split)
    provenance = storage.read_json(storage.join(recogniser.uri, INFO_NAME)).get("provenance", {})
    return _TrainedOn(provenance.get("dataset", ""), provenance.get("dataset_fingerprint", ""), "train")


def _of_training(trained_on: _TrainedOn, data: Dataset, split: str) -> Iterator[str]:
    known = _manifest_of(trained_on, data)
    if known is None:
        # A dataset of its own is the usual thing; a view takes its examples from elsewhere.
        if data.manifest.view_of is not None:
            yield (
                "Whether the model was trained on some of these examples is not known: the dataset that it was trained "
                f"on ({trained_on.dataset}) is not there any more, or was changed."
            )
        return
    shards = [shard for shard in known.shards if shard.split == trained_on.split]
    here = data.split(split)
    num_seen = _num_common(shards, here.shards)
    if num_seen:
        yield (
            f"The model was trained on {num_seen:,} of these {here.num_examples:,} examples: the figures flatter it. "
            "Measure it on others."
        )


def _manifest_of(trained_on: _TrainedOn, data: Dataset) -> Manifest | None:
    if trained_on.fingerprint == data.manifest.fingerprint:
        return data.manifest
    for uri in (trained_on.dataset, data.manifest.view_of):
        if uri:
            try:
                found = Manifest.load(uri)
            except (ManyeyesError, OSError):
                continue
            if found.fingerprint == trained_on.fingerprint:
                return found
    return None


def _num_common(some: list[ShardInfo], others: tuple[ShardInfo, ...]) -> int:
    """Rows that are among both; files are told by their content, wherever they lie."""
    total = 0
    for other in others:
        same = [shard.file_rows() for shard in some if shard.sha256 == other.sha256]
        if same:
            total += int(np.isin(other.file_rows(), np.concatenate(same)).sum())
    return total
