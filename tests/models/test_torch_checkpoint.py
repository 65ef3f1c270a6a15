"""The checkpoints are written here with pickle itself, in the layout that PyTorch used before 1.6."""

from __future__ import annotations

import io
import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyeyes.errors import UsageError
from manyeyes.models import torch_checkpoint

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C


class Storage:
    """Stands for a torch storage: written as a persistent id."""

    def __init__(self, key: str, content: np.ndarray, kind: type) -> None:
        self.key, self.content, self.kind = key, content, kind


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, Storage):
            return ("storage", value.kind, value.key, "cpu", value.content.size, None)
        return None


@pytest.fixture(scope="module")
def torch() -> Iterator[types.SimpleNamespace]:
    """Stand-ins with the names of torch, so that pickle writes these names; there is no torch on this machine."""
    package, helpers = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for module, name in ((package, "FloatStorage"), (package, "LongStorage"), (package, "EvilStorage")):
        setattr(module, name, type(name, (), {"__module__": "torch"}))

    def _rebuild_tensor_v2(*arguments: Any) -> None:
        raise AssertionError("the checkpoint made the reader call something")

    _rebuild_tensor_v2.__module__, _rebuild_tensor_v2.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    helpers._rebuild_tensor_v2 = _rebuild_tensor_v2  # type: ignore[attr-defined]
    saved = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules.update({"torch": package, "torch._utils": helpers})
    yield types.SimpleNamespace(package=package, rebuild=_rebuild_tensor_v2)
    for name, module in saved.items():
        if module is None:
            del sys.modules[name]
        else:
            sys.modules[name] = module


class Tensor:
    def __init__(self, torch: Any, storage: Storage, offset: int, shape: tuple, strides: tuple) -> None:
        self.torch, self.arguments = torch, (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> Any:
        return self.torch.rebuild, self.arguments


def contiguous(torch: Any, key: str, array: np.ndarray) -> tuple[Tensor, Storage]:
    kind = torch.package.LongStorage if array.dtype.kind == "i" else torch.package.FloatStorage
    storage = Storage(key, array.ravel(), kind)
    strides = tuple(int(stride) // array.itemsize for stride in array.strides)
    return Tensor(torch, storage, 0, array.shape, strides), storage


def checkpoint(state: Any, storages: list[Storage], magic: int = MAGIC_NUMBER) -> bytes:
    file = io.BytesIO()
    for value in (magic, 1001, {"little_endian": True}):
        pickle.dump(value, file, 2)
    Pickler(file, 2).dump(state)
    pickle.dump([storage.key for storage in storages], file, 2)
    for storage in storages:
        file.write(np.int64(storage.content.size).tobytes() + storage.content.tobytes())
    return file.getvalue()


def read(content: bytes) -> dict[str, np.ndarray]:
    return torch_checkpoint.read(io.BytesIO(content), "test.pth")


def valid(torch: Any) -> bytes:
    a, a_storage = contiguous(torch, "1", np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    b, b_storage = contiguous(torch, "2", np.array(7, dtype=np.int64))
    return checkpoint(OrderedDict(a=a, b=b), [a_storage, b_storage])


def test_tensors_come_back_with_their_names_shapes_and_values(torch: Any) -> None:
    arrays = read(valid(torch))

    assert list(arrays) == ["a", "b"]
    np.testing.assert_array_equal(arrays["a"], np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    assert arrays["b"].shape == () and arrays["b"] == 7 and arrays["b"].dtype == np.int64


def test_a_transposed_view_of_a_shared_storage_is_read_by_its_strides(torch: Any) -> None:
    storage = Storage("1", np.arange(10, dtype=np.float32), torch.package.FloatStorage)
    state = OrderedDict(view=Tensor(torch, storage, 2, (2, 3), (1, 2)), row=Tensor(torch, storage, 0, (4,), (1,)))

    arrays = read(checkpoint(state, [storage]))

    np.testing.assert_array_equal(arrays["view"], [[2, 4, 6], [3, 5, 7]])
    np.testing.assert_array_equal(arrays["row"], [0, 1, 2, 3])


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("place", range(5))
def test_a_malicious_pickle_is_refused_and_nothing_is_executed(tmp_path: Path, protocol: int, place: int) -> None:
    touched = tmp_path / "touched"
    values: list[Any] = [MAGIC_NUMBER, 1001, {}, OrderedDict(), []]
    values[place] = {"a": Malicious(touched)} if place else Malicious(touched)
    content = b"".join(pickle.dumps(value, protocol if index == place else 2) for index, value in enumerate(values))

    with pytest.raises(UsageError, match="can be read safely"):
        read(content)

    assert not touched.exists()
    pickle.loads(pickle.dumps(values[place], protocol))
    assert touched.exists(), "the file is malicious indeed: pickle itself executes it"


@pytest.mark.parametrize(
    "body",
    [
        b"cos\nsystem\nU\x04true\x85R.",
        b"(S'true'\nios\nsystem\n.",
        b"(cos\nsystem\nU\x04trueo.",
        b"\x80\x02cbuiltins\nobject\n)\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        b"Pstorage\n.",
        b"\x82\x01.",
    ],
)
def test_every_opcode_that_could_call_or_import_is_refused(body: bytes) -> None:
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC_NUMBER, 1001, {}))

    with pytest.raises(UsageError, match="safely"):
        read(head + body)


def test_a_storage_of_an_unknown_kind_is_refused(torch: Any) -> None:
    storage = Storage("1", np.zeros(2, np.float32), torch.package.EvilStorage)

    with pytest.raises(UsageError, match="storage"):
        read(checkpoint(OrderedDict(a=Tensor(torch, storage, 0, (2,), (1,))), [storage]))


@pytest.mark.parametrize(
    ("offset", "shape", "strides"), [(0, (5,), (1,)), (3, (2,), (1,)), (0, (2,), (-1,)), (-1, (1,), (1,))]
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(
    torch: Any, offset: int, shape: tuple, strides: tuple
) -> None:
    storage = Storage("1", np.zeros(4, np.float32), torch.package.FloatStorage)

    with pytest.raises(UsageError, match="beyond its storage"):
        read(checkpoint(OrderedDict(a=Tensor(torch, storage, offset, shape, strides)), [storage]))


def test_a_tensor_that_repeats_its_storage_to_fill_the_memory_is_refused(torch: Any) -> None:
    storage = Storage("1", np.zeros(4, np.float32), torch.package.FloatStorage)

    with pytest.raises(UsageError, match="larger than its storage"):
        read(checkpoint(OrderedDict(a=Tensor(torch, storage, 0, (10**9, 10**9), (0, 0))), [storage]))


def test_a_file_of_another_kind_is_refused() -> None:
    for content in (b"", b"PK\x03\x04 a zip file", pickle.dumps({"a": 1}), b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(UsageError, match="not a legacy PyTorch checkpoint"):
            read(content)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_read_but_never_crashes(torch: Any, data: st.DataObject) -> None:
    content = bytearray(valid(torch))
    cut = data.draw(st.integers(0, len(content)))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=4)):
        content[position] = data.draw(st.integers(0, 255))

    try:
        arrays = read(bytes(content[:cut]))
    except UsageError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(array, np.ndarray) for array in arrays.values())
