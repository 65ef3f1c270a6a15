"""Keras variables as named arrays and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manyeyes.errors import CheckpointError

if TYPE_CHECKING:
    import keras


def keyed_variables(variables: Sequence[Any]) -> dict[str, Any]:
    """Give each Keras variable a key that is unique, and equal in every process that builds the same model.

    The key is the variable's path; states of random number generators, whose paths count the models of a process, are
    numbered instead, and a path that occurs again gets a number.
    """
    keyed: dict[str, Any] = {}
    num_random = 0
    for variable in variables:
        path = variable.path
        if "seed_generator" in path:
            path, num_random = f"random_state/{num_random}", num_random + 1
        key, repetition = path, 1
        while key in keyed:
            repetition += 1
            key = f"{path}#{repetition}"
        keyed[key] = variable
    return keyed


def arrays_of(variables: Sequence[Any]) -> dict[str, np.ndarray]:
    """Copy the values of Keras variables to arrays, by key."""
    return {key: np.array(variable.numpy()) for key, variable in keyed_variables(variables).items()}


def assign(variables: Sequence[Any], arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Set Keras variables from arrays of the same keys, shapes and dtypes.

    Args:
        what: what the arrays are, for the message of an error.

    Raises:
        CheckpointError: keys, a shape or a dtype differ; nothing is assigned then.
    """
    keyed = keyed_variables(variables)
    if missing := sorted(keyed.keys() - arrays.keys()):
        raise CheckpointError(f"{what} lacks {missing[0]} and {len(missing) - 1} more: it is of another model.")
    if surplus := sorted(arrays.keys() - keyed.keys()):
        raise CheckpointError(f"{what} has {surplus[0]} and {len(surplus) - 1} more that this model lacks.")
    for key, variable in keyed.items():
        found, expected = arrays[key], (tuple(variable.shape), str(variable.dtype))
        if (found.shape, str(found.dtype)) != expected:
            raise CheckpointError(
                f"{what}: {key} is {found.dtype}{list(found.shape)}, this model has {expected[1]}{list(expected[0])}."
            )
    for key, variable in keyed.items():
        variable.assign(arrays[key])


def averaged_variables(model: keras.Model) -> list[Any]:
    """The variables that an exponential moving average covers: all floating weights, with batch-norm statistics."""
    return [variable for variable in model.weights if "float" in str(variable.dtype)]
