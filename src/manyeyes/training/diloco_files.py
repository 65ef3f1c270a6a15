"""What travels between the driver of DiLoCo and its tasks, as safetensors files in the run directory.

    RUN/rounds/step-00000200/       of the round that starts when 200 steps are done
        weights.safetensors         with which every slice starts it
        inner-3.safetensors         with which the optimizer of slice 3 starts it; made at the end of the round before
        slice-3.safetensors         what slice 3 came to: `delta/KEY` and `value/KEY` (see diloco_task)
        measured.safetensors        weights for the val split, where those that count are not those of the round

Every file is published whole. A task that runs twice writes the same bytes twice.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Collection, Mapping
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from manyeyes import storage
from manyeyes.errors import CheckpointError
from manyeyes.training import checkpoint

ROUNDS = "rounds"

Wire = Literal["float32", "bfloat16", "float16"]

# safetensors of NumPy know no bfloat16.
_DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "U64": "u8", "I32": "i4", "U32": "u4", "U8": "u1"}
# float16 ends at 65504: arrays are scaled by a power of two so that their largest value is in [2**14, 2**15).
_FLOAT16_TOP_EXPONENT = 15


class RoundFiles:
    """The files of the rounds of one run.

    Args:
        run_uri: of the run directory.
    """

    def __init__(self, run_uri: str) -> None:
        self.uri = storage.join(run_uri, ROUNDS)

    def weights(self, step: int) -> str:
        """The URI of the weights of the round that starts after `step`."""
        return self._file(step, "weights")

    def inner(self, step: int, slice_: int) -> str:
        """The URI of the state of a slice's optimizer at the start of that round."""
        return self._file(step, f"inner-{slice_}")

    def result(self, step: int, slice_: int) -> str:
        """The URI of what a slice came to in that round."""
        return self._file(step, f"slice-{slice_}")

    def measured(self, step: int) -> str:
        """The URI of the weights that are measured after `step`."""
        return self._file(step, "measured")

    def prune(self, step: int | None, steps_of_checkpoints: Collection[int]) -> None:
        """Remove what neither the round that starts after `step` nor a resumed run needs: that needs inner states."""
        fs, path = storage.filesystem(self.uri)
        if not fs.isdir(path):
            return
        for entry in fs.ls(path, detail=True):
            name = posixpath.basename(entry["name"].rstrip("/"))
            directory = storage.join(self.uri, name)
            if not name.startswith("step-") or checkpoint.step_of_name(name) not in {step, *steps_of_checkpoints}:
                storage.remove(directory, recursive=True)
            elif checkpoint.step_of_name(name) != step:
                for file in storage.list_files(directory):
                    if not file.startswith("inner-"):
                        storage.remove(storage.join(directory, file))

    def _file(self, step: int, name: str) -> str:
        return storage.join(self.uri, checkpoint.name_of_step(step), f"{name}.safetensors")


def encode(
    arrays: Mapping[str, np.ndarray],
    wire: Wire = "float32",
    exact: Collection[str] = (),
    note: Mapping[str, Any] | None = None,
) -> bytes:
    """Arrays as the bytes of a safetensors file; equal ones give equal bytes.

    Args:
        wire: the dtype in which floats travel; with float32 they travel as they are. float16 has a scale for each
            array, a power of two, so that nothing becomes infinite that was finite, and small values stay exact to 11
            bits.
        exact: keys of arrays that travel as they are.
        note: plain values that travel along.
    """
    scales = {}
    encoded = {}
    for key, array in arrays.items():
        if wire == "bfloat16" and key not in exact and array.dtype.kind == "f":
            import ml_dtypes

            array = array.astype(ml_dtypes.bfloat16)
        elif wire == "float16" and key not in exact and array.dtype.kind == "f":
            finite = np.abs(array[np.isfinite(array)])
            exponent = int(np.frexp(finite.max())[1]) if finite.size and finite.max() > 0 else 0
            scales[key] = _FLOAT16_TOP_EXPONENT - exponent
            array = np.ldexp(array, scales[key]).astype(np.float16)
        encoded[key] = np.asarray(array, order="C")
    # One entry, as the file has its entries in no order.
    about = {"note": dict(note or {}), "scales": scales}
    return save(encoded, {"manyeyes": storage.canonical_json(about).decode()})


def decode(content: bytes, what: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the note of `encode`; what travelled in 16 bits is float32.

    Raises:
        CheckpointError: the bytes are damaged; `what` names them.
    """
    try:
        size = int.from_bytes(content[:8], "little")
        about = json.loads(json.loads(content[8 : 8 + size])["__metadata__"]["manyeyes"])
        arrays = {}
        for key, tensor in deserialize(content):
            if tensor["dtype"] == "BF16":
                array = (np.frombuffer(tensor["data"], "<u2").astype(np.uint32) << 16).view(np.float32)
            else:
                array = np.frombuffer(tensor["data"], "<" + _DTYPES[tensor["dtype"]])
            if key in about["scales"]:
                array = np.ldexp(array.astype(np.float32), -about["scales"][key])
            arrays[key] = array.reshape(tensor["shape"])
    except (ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{what} is damaged: {error}.") from None
    return arrays, about["note"]


def publish(uri: str, content: bytes) -> str:
    """Publish a file; returns its SHA-256, in hex."""
    storage.write_bytes(uri, content)
    return sha256_of(content)


def sha256_of(content: bytes) -> str:
    """The SHA-256 of bytes, in hex."""
    return hashlib.sha256(content).hexdigest()
