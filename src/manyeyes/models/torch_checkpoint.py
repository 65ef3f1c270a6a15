"""Reads the tensors of a legacy PyTorch checkpoint (.pth before PyTorch 1.6) without running pickle.

A legacy file is five pickles (magic number, protocol, machine, state dict, storage keys), then for each key an int64
count and that many little-endian elements. The pickles are walked opcode by opcode with `pickletools.genops`, which
only parses: the few opcodes of a state dict build plain Python values, names of classes stay names, and anything else
is refused. So nothing of the file is imported or called, whatever it says (docs/decisions/0040-torch-checkpoints.md).
"""

from __future__ import annotations

import math
import pickletools
from typing import IO, Any, NamedTuple

import numpy as np

from manyeyes.errors import UsageError

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
_PROTOCOL_VERSION = 1001
_DTYPES = {
    "torch HalfStorage": "<f2",
    "torch FloatStorage": "<f4",
    "torch DoubleStorage": "<f8",
    "torch IntStorage": "<i4",
    "torch LongStorage": "<i8",
}
_ORDERED_DICT = "collections OrderedDict"
_REBUILD_TENSOR = "torch._utils _rebuild_tensor_v2"


class _Name(NamedTuple):
    """A class or function that the file mentions; it stays a name."""

    value: str


class _Storage(NamedTuple):
    key: str
    dtype: str
    size: int


class _Tensor(NamedTuple):
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Mark:
    pass


def read(file: IO[bytes], what: str) -> dict[str, np.ndarray]:
    """Read the state dict of a legacy PyTorch checkpoint.

    Args:
        file: open at the start of the checkpoint.
        what: a name of the file, for the message of an error.

    Returns:
        The tensors by their names, as arrays of their own.

    Raises:
        UsageError: the file is not a legacy checkpoint, is cut short, or its pickle does more than hold tensors.
    """
    try:
        if _unpickle(file) != _MAGIC_NUMBER or _unpickle(file) != _PROTOCOL_VERSION:
            raise ValueError("the magic number or the version is another")
        _unpickle(file)
        state = _unpickle(file)
        keys = _unpickle(file)
        if not isinstance(state, dict) or not isinstance(keys, list):
            raise ValueError("there is no state dict")
        tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, _Tensor)}
        storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
        content = {key: _read_storage(file, storages[key]) for key in keys}
        return {name: _view(tensor, content[tensor.storage.key]) for name, tensor in tensors.items()}
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise UsageError(f"{what} is not a legacy PyTorch checkpoint that can be read safely: {error}.") from None


def _unpickle(file: IO[bytes]) -> Any:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(_Mark)
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(_pop_to_mark(stack)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = _pop_to_mark(stack)
                stack[-1].extend(items)
            case "SETITEM":
                key, value = stack[-2:]
                del stack[-2:]
                stack[-1][key] = value
            case "SETITEMS":
                items = _pop_to_mark(stack)
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Name(argument))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments = stack.pop()
                stack.append(_reduce(stack.pop(), arguments))
            case "BUILD":
                # Attributes of the state dict (versions of modules): not needed.
                stack.pop()
            case _:
                raise ValueError(f"its pickle has the opcode {opcode.name}, which a state dict does not need")
    raise ValueError("a pickle has no end")


def _pop_to_mark(stack: list[Any]) -> list[Any]:
    start = len(stack) - 1 - stack[::-1].index(_Mark)
    items = stack[start + 1 :]
    del stack[start:]
    return items


def _reduce(function: Any, arguments: tuple[Any, ...]) -> Any:
    if function == _Name(_ORDERED_DICT) and arguments == ():
        return {}
    if function == _Name(_REBUILD_TENSOR):
        storage, offset, shape, strides = arguments[:4]
        return _Tensor(storage, offset, shape, strides)
    raise ValueError(f"its pickle wants to call {getattr(function, 'value', function)!r}")


def _storage(persistent_id: Any) -> _Storage:
    kind, dtype, key, _, size = persistent_id[:5]
    if kind != "storage" or not isinstance(dtype, _Name) or dtype.value not in _DTYPES:
        raise ValueError(f"its pickle has the storage {persistent_id!r}")
    return _Storage(key, _DTYPES[dtype.value], size)


def _read_storage(file: IO[bytes], storage: _Storage) -> np.ndarray:
    num_elements = int(np.frombuffer(_read(file, 8), "<i8")[0])
    if num_elements != storage.size:
        raise ValueError(f"storage {storage.key} has {num_elements} elements, {storage.size} were announced")
    return np.frombuffer(_read(file, num_elements * np.dtype(storage.dtype).itemsize), storage.dtype)


def _read(file: IO[bytes], num_bytes: int) -> bytes:
    content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise ValueError("the file is cut short")
    return content


def _view(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
    if min((tensor.offset, *tensor.shape, *tensor.strides)) < 0 or last >= storage.size:
        raise ValueError("a tensor reaches beyond its storage")
    if math.prod(tensor.shape) > storage.size:
        raise ValueError("a tensor is larger than its storage")
    strides = [stride * storage.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(storage[tensor.offset :], tensor.shape, strides).copy()
