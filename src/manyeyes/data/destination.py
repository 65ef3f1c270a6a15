"""The directory that an ingest writes: whose it is, whether it is complete, and what does not belong there."""

from __future__ import annotations

from typing import Any

from manyeyes import storage
from manyeyes.data.manifest import FORMAT, MANIFEST_NAME, QUARANTINE, SHARDS, Manifest
from manyeyes.data.shards import INGEST
from manyeyes.errors import UsageError

# In `.ingest`: whose work this is. Not the name of a task.
_JOB_NAME = "job.json"
_GROUPING = "group_duplicates"


def finished_manifest(dataset: str, identity: dict[str, Any]) -> Manifest | None:
    """Return the manifest if the dataset is complete; None if there is work to do.

    Raises:
        UsageError: what is there was made with other arguments.
    """
    if storage.exists(storage.join(dataset, MANIFEST_NAME)):
        manifest = Manifest.load(dataset)
        # Datasets of before there was this setting.
        before = {"source": manifest.source, "settings": {_GROUPING: False} | manifest.settings}
        if before != identity:
            raise UsageError(
                f"{dataset} is a dataset made with other arguments ({_difference(before, identity)}). "
                "Choose another place, or add --overwrite."
            )
        return manifest
    job_uri = storage.join(dataset, INGEST, _JOB_NAME)
    if storage.exists(job_uri):
        before = storage.read_json(job_uri)
        # What is written before near-duplicates are looked for does not depend on whether they will be.
        if _without_grouping(before) != _without_grouping(identity):
            raise UsageError(
                f"{dataset} holds an unfinished ingest with other arguments ({_difference(before, identity)}). "
                "Give the same arguments to go on, or add --overwrite to start anew."
            )
    return None


def _without_grouping(identity: dict[str, Any]) -> dict[str, Any]:
    settings = {key: value for key, value in identity.get("settings", {}).items() if key != _GROUPING}
    return identity | {"settings": settings}


def check_destination(dataset: str) -> None:
    """Find out before the source is listed, which may take long, whether the dataset can lie there."""
    if storage.exists(dataset):
        if not storage.is_directory(dataset):
            raise UsageError(f"{dataset} is a file. Give a directory for the dataset.")
        if not _is_ours(dataset) and any(True for _ in storage.iterate_directory(dataset)):
            raise UsageError(f"{dataset} is not empty and not a Manyeyes dataset. Give a new or an empty directory.")
    storage.check_writable(dataset)


def _is_ours(dataset: str) -> bool:
    """Whether an ingest has worked in the directory, so that --overwrite may remove what is there."""
    if storage.exists(storage.join(dataset, INGEST)):
        return True
    try:
        values = storage.read_json(storage.join(dataset, MANIFEST_NAME))
    except FileNotFoundError:
        return False
    except ValueError:
        # Many a program has a manifest.json: a damaged one is taken for ours only beside shards.
        return storage.is_directory(storage.join(dataset, SHARDS))
    return isinstance(values, dict) and values.get("format") == FORMAT


def claim(dataset: str, identity: dict[str, Any], overwrite: bool) -> None:
    """Make the destination ready, and note whose it is."""
    try:
        storage.make_directory(dataset)
        # Before anything is removed: if this is interrupted, the directory is known as ours.
        storage.write_json(storage.join(dataset, INGEST, _JOB_NAME), identity)
        if overwrite:
            # The manifest goes first: without it nothing takes the rest for a dataset.
            storage.remove(storage.join(dataset, MANIFEST_NAME))
            for name in storage.list_files(storage.join(dataset, INGEST)):
                if name != _JOB_NAME:
                    storage.remove(storage.join(dataset, INGEST, name))
            for folder in (SHARDS, QUARANTINE):
                storage.remove(storage.join(dataset, folder), recursive=True)
    except OSError as error:
        raise UsageError(f"{dataset} can't be written: {error.strerror or error}. Choose another place.") from None


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    def flat(values: dict[str, Any]) -> dict[str, Any]:
        return {key: value for section in ("source", "settings") for key, value in values.get(section, {}).items()}

    before, now = flat(old), flat(new)
    changed = [key for key in now if before.get(key) != now[key]]
    return ", ".join(f"{key}: {before.get(key)!r}, now {now[key]!r}" for key in changed[:3]) or "unknown ones"


def remove_leftovers(dataset: str, manifest: Manifest) -> None:
    """Remove what an interrupted attempt left beside the shards: half-written files, or shards of an older source."""
    for folder, infos in ((SHARDS, manifest.shards), (QUARANTINE, manifest.quarantine)):
        names = {info.name for info in infos}
        uri = storage.join(dataset, folder)
        for item in list(storage.iterate_directory(uri)) if storage.is_directory(uri) else []:
            if item.name not in names:
                storage.remove(storage.join(uri, item.name))
