"""Weights from files: safetensors by the paths of the weights; nothing that a file can make run."""

from __future__ import annotations

import keras
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from manyeyes import storage
from manyeyes.errors import UsageError


def load(model: keras.Model, uri: str, head: str) -> None:
    """Set the weights of `model` from a .safetensors file, e.g. the model.safetensors of a checkpoint.

    The layer `head` keeps its initial weights where the file's are for another number of classes.

    Raises:
        UsageError: the file is missing, is no safetensors file, or is of another model; nothing is set then.
    """
    arrays = _read(uri)
    chosen: dict[str, np.ndarray] = {}
    for variable in model.weights:
        found = arrays.get(variable.path)
        if found is not None and found.shape == tuple(variable.shape):
            chosen[variable.path] = found
        elif not variable.path.startswith(f"{head}/"):
            has = "lacks it" if found is None else f"has {list(found.shape)}"
            raise UsageError(
                f"The weights {uri} are of another model than {model.name}: "
                f"{variable.path} is {list(variable.shape)}, the file {has}. Use the model's own weights."
            )
    for variable in model.weights:
        if variable.path in chosen:
            variable.assign(chosen[variable.path])


def _read(uri: str) -> dict[str, np.ndarray]:
    if not uri.endswith(".safetensors"):
        raise UsageError(f"weights={uri!r} is not possible. Use none, imagenet, or the path of a .safetensors file.")
    try:
        return load_safetensors(storage.read_bytes(uri))
    except FileNotFoundError:
        raise UsageError(f"There are no weights at {uri}. Give the path of a .safetensors file.") from None
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{uri} can't be read as a .safetensors file: {error}.") from None
