from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from manyeyes.errors import UsageError
from manyeyes.models.registry import ModelConfig, build

keras = pytest.importorskip("keras")

CONFIG = ModelConfig("cnn", (8, 8, 1), 3, options={"width": 4})


def with_weights(uri: str, num_classes: int = 3, width: int = 4) -> keras.Model:
    return build(ModelConfig("cnn", (8, 8, 1), num_classes, weights=uri, options={"width": width}))


@pytest.fixture
def trained(tmp_path: Path) -> tuple[keras.Model, str]:
    model = build(CONFIG)
    uri = str(tmp_path / "model.safetensors")
    save_file({variable.path: variable.numpy() for variable in model.weights}, uri)
    return model, uri


def test_weights_from_a_file_give_the_same_logits(trained: tuple[keras.Model, str]) -> None:
    model, uri = trained
    images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)

    np.testing.assert_array_equal(with_weights(uri)(images), model(images))


def test_another_number_of_classes_keeps_the_backbone_and_gets_a_new_head(trained: tuple[keras.Model, str]) -> None:
    model, uri = trained

    other = with_weights(uri, num_classes=7)

    np.testing.assert_array_equal(
        other.get_layer("stage1_0_conv").kernel.numpy(), model.get_layer("stage1_0_conv").kernel.numpy()
    )
    assert other.output.shape == (None, 7)


def test_weights_of_another_model_are_refused_by_the_name_of_the_first_that_differs(
    trained: tuple[keras.Model, str],
) -> None:
    with pytest.raises(UsageError, match=r"of another model.*stage0_0_conv/kernel"):
        with_weights(trained[1], width=8)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", b"\x80\x04cos\nsystem\n."])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)

    with pytest.raises(UsageError, match="can't be read"):
        with_weights(str(path))


def test_missing_weights_and_unknown_words_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no weights at"):
        with_weights(str(tmp_path / "absent.safetensors"))
    with pytest.raises(UsageError, match="none, imagenet, or"):
        with_weights("imagnet")
