from __future__ import annotations

import time

import cv2
import numpy as np
import pytest

from manyeyes.errors import UsageError
from manyeyes.imaging.decode import decode
from manyeyes.recognition.bundle import Bundle
from manyeyes.recognition.predictor import Predictor
from manyeyes.recognition.saliency import default_level, overlay, saliency

HEIGHT, WIDTH = 24, 20


class _Spot:
    """A backend that says "green" by how green the image is at one place, and "red" otherwise."""

    name, precision, num_threads, input_shape = "spot", "float32", 1, (HEIGHT, WIDTH, 3)

    def __init__(self, row: int, column: int) -> None:
        self.place = (slice(None), slice(row, row + 6), slice(column, column + 5))

    def run(self, images: np.ndarray) -> np.ndarray:
        green = images[self.place].astype(np.float32)[..., 1].mean(axis=(1, 2)) / 32 - 4
        return np.stack([np.zeros_like(green), green, np.full_like(green, -9)], axis=1)


def _noise(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 120, (HEIGHT, WIDTH, 3), dtype=np.uint8)


@pytest.mark.parametrize("level", [2, 3])
@pytest.mark.parametrize("row, column", [(0, 0), (0, 15), (18, 0), (18, 15), (9, 7)])
def test_the_map_is_highest_where_the_answer_was_decided(small_bundle: str, level: int, row: int, column: int) -> None:
    predictor = Predictor(Bundle.load(small_bundle), _Spot(row, column))
    pixels = _noise()
    pixels[row : row + 6, column : column + 5, 1] = 255
    found = saliency(predictor, pixels, 1, level=level)
    assert (found.shape, found.dtype) == ((HEIGHT, WIDTH), np.float32)
    assert (found.min(), found.max()) == (0, 1)
    top, left = np.unravel_index(found.argmax(), found.shape)
    assert row - 2 <= top < row + 8
    assert column - 2 <= left < column + 7
    inside = found[row : row + 6, column : column + 5].mean()
    assert inside > 3 * np.delete(found.ravel(), np.flatnonzero(found == 1)).mean()


def test_the_pixels_that_the_map_names_decide_more_than_others_for_a_trained_model(small_bundle: str) -> None:
    predictor = Predictor.load(small_bundle)
    draw = np.random.default_rng(1)
    falls = []
    for seed in range(8):
        # Mostly green in one quarter, grey noise elsewhere: the trained model decides by what is there.
        pixels = np.repeat(_noise(seed)[:, :, :1], 3, axis=2)
        row, column = draw.integers(0, 2, 2)
        quarter = (slice(row * 12, row * 12 + 12), slice(column * 10, column * 10 + 10))
        pixels[(*quarter, 1)] += 100
        found = saliency(predictor, pixels, 1, level=2)
        outside = found.sum() - found[quarter].sum()
        falls.append(found[quarter].mean() / (outside / (found.size * 3 / 4)))
    assert np.median(falls) > 2


def test_the_same_image_gives_the_same_map_and_any_backend_nearly_the_same(small_bundle: str) -> None:
    predictor = Predictor.load(small_bundle, "openvino")
    first = saliency(predictor, _noise(), 1)
    np.testing.assert_array_equal(first, saliency(predictor, _noise(), 1))
    other = saliency(Predictor.load(small_bundle, "onnxruntime"), _noise(), 1, level=3)
    np.testing.assert_allclose(saliency(predictor, _noise(), 1, level=3), other, atol=1e-3)


def test_without_a_label_the_likeliest_class_is_asked_about(small_bundle: str) -> None:
    predictor = Predictor.load(small_bundle)
    label = int(predictor.logits(_noise()[None]).argmax())
    np.testing.assert_array_equal(saliency(predictor, _noise(), level=2), saliency(predictor, _noise(), label, level=2))


class _Counting(_Spot):
    def __init__(self, milliseconds: float) -> None:
        super().__init__(0, 0)
        self.seconds = milliseconds / 1e3
        self.num_images = 0

    def run(self, images: np.ndarray) -> np.ndarray:
        self.num_images += len(images)
        time.sleep(self.seconds * len(images))
        return super().run(images)


def test_a_busy_machine_gives_the_map_that_an_idle_one_gives(small_bundle: str) -> None:
    maps = []
    for milliseconds in (0, 5):
        counting = _Counting(milliseconds)
        maps.append(saliency(Predictor(Bundle.load(small_bundle), counting), _noise(), 1))
        assert counting.num_images == 288, "a label that is known is not asked for"
    np.testing.assert_array_equal(maps[0], maps[1])
    assert default_level((224, 224, 3)) == 1  # 64 answers


@pytest.mark.parametrize("channels", [1, 3])
def test_the_overlay_is_a_png_of_the_image_with_the_decisive_part_in_yellow(channels: int) -> None:
    pixels = np.full((HEIGHT, WIDTH, channels), 128, np.uint8)
    found = np.zeros((HEIGHT, WIDTH), np.float32)
    found[:10] = 1
    image = decode(overlay(pixels, found)).astype(int)
    assert image.shape == (12 * HEIGHT, 12 * WIDTH, 3), "a small image is enlarged, so that people see it"
    assert image[: 12 * 9, :, :2].min() > 150
    assert image[: 12 * 9, :, 0].mean() > image[: 12 * 9, :, 2].mean() + 80
    assert image[12 * 12 :, :, 2].mean() > image[12 * 12 :, :, 0].mean()
    large = np.full((224, 300, channels), 128, np.uint8)
    assert decode(overlay(large, np.zeros((224, 300), np.float32))).shape == (224, 300, 3)


def test_wrong_arguments_get_one_clear_line(small_bundle: str) -> None:
    predictor = Predictor.load(small_bundle)
    for arguments, words in (({"label": 3}, "3 classes"), ({"label": -1}, "no label -1"), ({"level": 4}, "level=4")):
        with pytest.raises(UsageError, match=words):
            saliency(predictor, _noise(), **arguments)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected uint8"):
        saliency(predictor, cv2.resize(_noise(), (9, 9)))
    with pytest.raises(UsageError, match="expected uint8"):
        saliency(predictor, _noise() / 255, 1)
