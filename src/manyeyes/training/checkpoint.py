"""Checkpoints: a directory a checkpoint, published whole, checked when it is read.

    checkpoints/step-00001234/
        model.safetensors       every variable of the model, with batch-norm statistics and the states of dropout
        optimizer.safetensors   every variable of the optimizer
        ema.safetensors         the averaged weights, where the run averages
        state.json              where the run stands, and the SHA-256 of the other files; written last

A directory is written aside and renamed, so that a checkpoint with its proper name is complete unless the disk lost
part of it; that is found by the checksums, and the checkpoint before is taken. S3 renames by copying, file by file in
the order of their names, so that a writer that dies can leave a checkpoint without its state.json there.
"""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from manyeyes import config, storage
from manyeyes.errors import CheckpointError, ConfigError

CHECKPOINTS = "checkpoints"
STATE_NAME = "state.json"

Arrays = Mapping[str, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class TrainState:
    """Where a run stands: all that is needed to go on, beside the arrays.

    Attributes:
        epoch, step: the next step to do: `step` steps of `epoch` are done.
        global_step: steps done since the start.
        seed: of the run.
        settings_fingerprint, dataset_fingerprint: of what the weights were trained with.
        totals: sums over the steps of this epoch so far: (loss, correct, examples).
        logged: the part of them that metrics.jsonl has already told.
        best_step: global_step of the checkpoint with the best val accuracy, or None before the first validation.
        best_epoch, best_val_accuracy: of that checkpoint.
        epochs_without_gain: epochs since then.
        finished: whether the run is over.
        sha256: of the checkpoint's other files, by name; a checkpoint that is saved fills it in.
    """

    epoch: int
    step: int
    global_step: int
    seed: int
    settings_fingerprint: str
    dataset_fingerprint: str
    totals: tuple[float, float, float] = (0.0, 0.0, 0.0)
    logged: tuple[float, float, float] = (0.0, 0.0, 0.0)
    best_step: int | None = None
    best_epoch: int | None = None
    best_val_accuracy: float | None = None
    epochs_without_gain: int = 0
    finished: bool = False
    sha256: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The directory name of the checkpoint that this is the state of."""
        return name_of_step(self.global_step)

    @property
    def best_name(self) -> str:
        """The directory name of the best checkpoint: this one before the first validation."""
        return self.name if self.best_step is None else name_of_step(self.best_step)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the weights of the checkpoint that this is the state of."""
        return hashlib.sha256(storage.canonical_json(self.sha256)).hexdigest()[:16]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in memory: `arrays` is {"model": {key: array}, "optimizer": …, "ema": …}."""

    state: TrainState
    arrays: Arrays


def name_of_step(global_step: int) -> str:
    """The directory name of a checkpoint."""
    return f"step-{global_step:08d}"


def step_of_name(name: str) -> int:
    """The global_step of a checkpoint's directory name."""
    return int(name[5:])


def save(directory: str, state: TrainState, arrays: Arrays) -> str:
    """Publish a checkpoint in the checkpoints directory at URI `directory`; returns its name."""
    name = state.name
    target = storage.join(directory, name)
    aside = storage.join(directory, f"{storage.ASIDE_MARK}{uuid.uuid4().hex[:12]}-{name}")
    sha256 = {}
    try:
        storage.make_directory(aside)
        for part, values in arrays.items():
            content = save_safetensors({key: np.asarray(value, order="C") for key, value in values.items()})
            storage.write_bytes(storage.join(aside, f"{part}.safetensors"), content)
            sha256[f"{part}.safetensors"] = hashlib.sha256(content).hexdigest()
        storage.write_json(storage.join(aside, STATE_NAME), {**config.to_dict(state), "sha256": sha256})
        storage.remove(target, recursive=True)
        storage.rename(aside, target)
    except OSError as error:
        storage.remove(aside, recursive=True)
        raise CheckpointError(
            f"The checkpoint {target} can't be written: {error.strerror or error}. "
            "Free some space, then go on with --resume."
        ) from error
    return name


def names(directory: str) -> list[str]:
    """Names of the checkpoints in the directory at URI `directory`, oldest first."""
    fs, path = storage.filesystem(directory)
    if not fs.isdir(path):
        return []
    found = (posixpath.basename(entry["name"].rstrip("/")) for entry in fs.ls(path, detail=True))
    return sorted(name for name in found if name.startswith("step-") and name[5:].isdigit())


def load(directory: str, name: str) -> Checkpoint:
    """Read and check one checkpoint.

    Raises:
        CheckpointError: it is missing, incomplete, or a file fails its checksum.
    """
    uri = storage.join(directory, name)
    arrays = {}
    with _damage_told(uri):
        state = _read_state(uri)
        for file, sha256 in state.sha256.items():
            content = storage.read_bytes(storage.join(uri, file))
            _require_checksum(f"{uri}/{file}", hashlib.sha256(content).hexdigest(), sha256)
            arrays[posixpath.splitext(file)[0]] = load_safetensors(content)
    return Checkpoint(state, arrays)


def check(directory: str, name: str) -> TrainState:
    """Read the state of one checkpoint and check its other files, of which nothing stays in memory.

    Raises:
        CheckpointError: as `load` does.
    """
    uri = storage.join(directory, name)
    with _damage_told(uri):
        state = _read_state(uri)
        for file, sha256 in state.sha256.items():
            _require_checksum(f"{uri}/{file}", storage.sha256_of_file(storage.join(uri, file)), sha256)
    return state


def newest_whole(directory: str, on_damaged: Callable[[str], None] = warnings.warn) -> TrainState | None:
    """The state of the newest checkpoint that is whole, or None; `on_damaged` is told of those passed over."""
    for name in reversed(names(directory)):
        try:
            return check(directory, name)
        except CheckpointError as error:
            on_damaged(f"{error} It is passed over.")
    return None


def _read_state(uri: str) -> TrainState:
    return config.from_dict(TrainState, storage.read_json(storage.join(uri, STATE_NAME)))


def _require_checksum(file: str, found: str, expected: str) -> None:
    if found != expected:
        raise CheckpointError(f"{file} fails its checksum.")


@contextlib.contextmanager
def _damage_told(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise CheckpointError(f"The checkpoint {uri} is incomplete or missing: {error}.") from None
    except (ValueError, SafetensorError, ConfigError) as error:
        raise CheckpointError(f"The checkpoint {uri} is damaged: {error}.") from None


def prune(directory: str, keep: int, best_step: int | None) -> None:
    """Remove all checkpoints but the newest `keep` and the best, and what killed writers left aside."""
    found = names(directory)
    kept = {*found[-keep:]} | ({name_of_step(best_step)} if best_step is not None else set())
    for name in found:
        if name not in kept:
            storage.remove(storage.join(directory, name), recursive=True)
    fs, path = storage.filesystem(directory)
    for entry in fs.ls(path, detail=True) if fs.isdir(path) else []:
        if posixpath.basename(entry["name"]).startswith(storage.ASIDE_MARK):
            storage.remove(storage.join(directory, posixpath.basename(entry["name"])), recursive=True)
