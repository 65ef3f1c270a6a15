"""Checkpoints that are whole, or passed over."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import keras
import numpy as np
import pytest

from manyeyes.errors import CheckpointError
from manyeyes.training import checkpoint, weights
from manyeyes.training.checkpoint import TrainState

ARRAYS = {
    "model": {"b/kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "a/count": np.array(7, np.int64)},
    "optimizer": {"sgd/iteration": np.array(3, np.int32)},
}


def save(directory: Path, global_step: int, **values: object) -> TrainState:
    state = dataclasses.replace(TrainState(1, 2, global_step, 0, "s", "d", totals=(0.1, 2.0, 3.0)), **values)
    checkpoint.save(str(directory), state, ARRAYS)
    return state


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    state = save(tmp_path, 12, best_step=4, best_val_accuracy=0.1 + 0.2)
    found = checkpoint.load(str(tmp_path), "step-00000012")
    assert found.state == checkpoint.newest_whole(str(tmp_path))
    assert dataclasses.replace(found.state, sha256={}) == state
    for part, arrays in ARRAYS.items():
        assert found.arrays[part].keys() == arrays.keys()
        for key, array in arrays.items():
            np.testing.assert_array_equal(found.arrays[part][key], array)
            assert (found.arrays[part][key].shape, found.arrays[part][key].dtype) == (array.shape, array.dtype)


@pytest.mark.parametrize("damage", ["cut", "flip", "no state", "no weights", "bad state"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 10)
    save(tmp_path, 20)
    weights_file, state_file = tmp_path / "step-00000020/model.safetensors", tmp_path / "step-00000020/state.json"
    content = bytearray(weights_file.read_bytes())
    if damage == "cut":
        weights_file.write_bytes(content[:-3])
    elif damage == "flip":
        content[-1] ^= 1
        weights_file.write_bytes(content)
    elif damage == "no state":
        state_file.unlink()
    elif damage == "no weights":
        weights_file.unlink()
    else:
        state_file.write_text(state_file.read_text()[:-10])
    with pytest.raises(CheckpointError, match="step-00000020") as caught:
        checkpoint.load(str(tmp_path), "step-00000020")
    said: list[str] = []
    found = checkpoint.newest_whole(str(tmp_path), said.append)
    assert found is not None
    assert found.name == "step-00000010"
    assert said == [f"{caught.value} It is passed over."]
    assert len(said) == 1
    assert "step-00000020" in said[0]
    assert "\n" not in said[0]


def test_the_last_ones_and_the_best_are_kept_and_litter_goes(tmp_path: Path) -> None:
    for global_step in (5, 10, 15, 20, 25):
        save(tmp_path, global_step)
    (tmp_path / ".aside-0123456789ab-step-00000030").mkdir()
    checkpoint.prune(str(tmp_path), 2, best_step=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000020", "step-00000025"]


def test_nothing_is_found_where_there_is_nothing(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(str(tmp_path / "none")) is None


def test_weights_of_another_model_are_refused_in_one_line() -> None:
    def make(units: int, name: str) -> keras.Model:
        layers = [keras.Input((4,)), keras.layers.Dense(units, name=name), keras.layers.Dropout(0.5)]
        return keras.Sequential(layers, name="net")

    arrays = weights.arrays_of(make(3, "a").variables)
    same = make(3, "a")
    weights.assign(same.variables, arrays, "the file")
    np.testing.assert_array_equal(same.layers[0].kernel.numpy(), arrays["net/a/kernel"])
    for other, message in (
        (make(2, "a"), r"net/a/kernel is float32\[4, 3\].*float32\[4, 2\]"),
        (make(3, "b"), "lacks net/b/"),
    ):
        before = weights.arrays_of(other.variables)
        with pytest.raises(CheckpointError, match=message) as caught:
            weights.assign(other.variables, arrays, "the file")
        assert "\n" not in str(caught.value)
        for key, array in weights.arrays_of(other.variables).items():
            np.testing.assert_array_equal(array, before[key])


def test_checkpoints_live_on_any_file_system() -> None:
    directory = "memory://checkpoints-of-a-test"
    for global_step in (5, 10, 15):
        checkpoint.save(directory, TrainState(0, global_step, global_step, 0, "s", "d"), ARRAYS)
    checkpoint.prune(directory, 1, best_step=5)
    assert checkpoint.names(directory) == ["step-00000005", "step-00000015"]
    state = checkpoint.newest_whole(directory)
    assert state is not None
    assert state.name == "step-00000015"
    found = checkpoint.load(directory, state.name)
    np.testing.assert_array_equal(found.arrays["model"]["b/kernel"], ARRAYS["model"]["b/kernel"])
