from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes.errors import ImageError, Reason, UsageError
from manyeyes.imaging import geometry
from manyeyes.imaging.preprocessing import Preprocessing, Step

sizes = st.integers(1, 60)
interpolations = st.sampled_from(["auto", "area", "linear", "cubic", "nearest"])


@st.composite
def images(draw: st.DrawFn) -> np.ndarray:
    shape = (draw(sizes), draw(sizes), draw(st.sampled_from([1, 3])))
    image = np.random.default_rng(draw(st.integers(0, 1000))).integers(0, 256, shape, dtype=np.uint8)
    image.flags.writeable = False
    return image


def is_image(image: np.ndarray, height: int, width: int, channels: int) -> bool:
    return image.dtype == np.uint8 and image.shape == (height, width, channels)


@given(images(), sizes, sizes, interpolations)
@settings(deadline=None)
def test_resize_gives_the_size_asked_for(image: np.ndarray, height: int, width: int, interpolation: str) -> None:
    result = geometry.resize(image, height, width, interpolation)
    assert is_image(result, height, width, image.shape[2])
    assert geometry.resize(result, height, width, interpolation) is result


@given(images(), sizes, interpolations)
@settings(deadline=None)
def test_resize_short_makes_the_shorter_side_as_asked_and_keeps_the_aspect(
    image: np.ndarray, size: int, interpolation: str
) -> None:
    height, width, channels = image.shape
    result = geometry.resize_short(image, size, interpolation)
    assert min(result.shape[:2]) == size and result.shape[2] == channels
    scale = size / min(height, width)
    assert abs(result.shape[0] - height * scale) <= 0.5 and abs(result.shape[1] - width * scale) <= 0.5


@given(images(), sizes, sizes)
@settings(deadline=None)
def test_cover_covers_with_one_side_exact(image: np.ndarray, height: int, width: int) -> None:
    result = geometry.cover(image, height, width)
    assert result.shape[0] >= height and result.shape[1] >= width
    assert result.shape[0] == height or result.shape[1] == width


@given(images(), sizes, sizes)
@settings(deadline=None)
def test_center_crop_keeps_the_centre(image: np.ndarray, height: int, width: int) -> None:
    old_height, old_width, channels = image.shape
    result = geometry.center_crop(image, height, width, background=7)
    assert is_image(result, height, width, channels)
    if height <= old_height and width <= old_width:
        top, left = (old_height - height) // 2, (old_width - width) // 2
        np.testing.assert_array_equal(result, image[top : top + height, left : left + width])
    if height >= old_height and width >= old_width:
        again = geometry.center_crop(geometry.center_crop(image, height, width, 7), height, width, 9)
        np.testing.assert_array_equal(again, result)
        top, left = (height - old_height) // 2, (width - old_width) // 2
        np.testing.assert_array_equal(result[top : top + old_height, left : left + old_width], image)


@given(images(), sizes, sizes)
@settings(deadline=None)
def test_fit_into_shows_the_whole_image_on_the_background(image: np.ndarray, height: int, width: int) -> None:
    white = np.full_like(image, 255)
    result = geometry.fit_into(white, height, width, background=0)
    assert is_image(result, height, width, image.shape[2])
    rows, columns = np.nonzero(result[:, :, 0])
    shown_height, shown_width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert shown_height == height or shown_width == width
    assert shown_height * shown_width == len(rows), "the image is one rectangle"


@given(images(), st.data())
@settings(deadline=None)
def test_crop_is_the_region_and_refuses_what_is_outside(image: np.ndarray, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(-3, 60)), data.draw(st.integers(-3, 60))
    height, width = data.draw(st.integers(0, 60)), data.draw(st.integers(0, 60))
    inside = top >= 0 and left >= 0 and height > 0 and width > 0
    if inside and top + height <= image.shape[0] and left + width <= image.shape[1]:
        result = geometry.crop(image, top, left, height, width)
        np.testing.assert_array_equal(result, image[top : top + height, left : left + width])
        assert result.flags.c_contiguous
    else:
        with pytest.raises(UsageError, match="not inside"):
            geometry.crop(image, top, left, height, width)


@given(images())
@settings(deadline=None)
def test_flipping_twice_changes_nothing(image: np.ndarray) -> None:
    for flip, mirrored in ((geometry.flip_horizontal, image[:, ::-1]), (geometry.flip_vertical, image[::-1])):
        np.testing.assert_array_equal(flip(image), mirrored)
        np.testing.assert_array_equal(flip(flip(image)), image)


@given(images(), st.floats(-720, 720))
@settings(deadline=None)
def test_rotation_keeps_the_size(image: np.ndarray, degrees: float) -> None:
    assert is_image(geometry.rotate(image, degrees), *image.shape)
    assert geometry.rotate(image, 360) is image


def test_a_quarter_turn_is_counter_clockwise(photo: np.ndarray) -> None:
    turned = geometry.rotate(photo, 90)
    assert np.abs(turned.astype(int) - np.rot90(photo)).max() <= 1
    assert np.abs(geometry.rotate(photo, 180).astype(int) - photo[::-1, ::-1]).max() <= 1


def test_rotation_shows_the_background_in_the_corners_or_mirrors_the_image(photo: np.ndarray) -> None:
    assert (geometry.rotate(photo, 45, background=9)[0, 0] == 9).all()
    grey = np.full((20, 20, 1), 100, np.uint8)
    assert (geometry.rotate(grey, 45, background=None) == 100).all()


def test_shrinking_takes_the_mean_of_the_area() -> None:
    checkerboard = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)[:, :, None]
    assert np.abs(geometry.resize(checkerboard, 8, 8).astype(int) - 128).max() <= 1
    # One axis shrinks while the other grows: no aliasing along the one that shrinks.
    assert np.abs(geometry.resize(checkerboard[:, :8], 8, 16).astype(int) - 128).max() <= 1


def test_a_thread_of_pixels_is_not_enlarged_to_gigabytes() -> None:
    with pytest.raises(ImageError) as caught:
        geometry.resize_short(np.zeros((1, 60_000, 3), np.uint8), 256)
    assert caught.value.reason == Reason.TOO_MANY_PIXELS


def test_an_unknown_interpolation_is_named() -> None:
    with pytest.raises(UsageError, match="lanczos"):
        geometry.resize(np.zeros((4, 4, 3), np.uint8), 2, 2, "lanczos")


@given(images(), sizes, sizes, st.sampled_from(["crop", "pad", "stretch"]))
@settings(deadline=None)
def test_preprocessing_always_gives_its_output_shape(image: np.ndarray, height: int, width: int, fit: str) -> None:
    preprocessing = Preprocessing.for_size(height, width, fit=fit, channels=image.shape[2])
    result = preprocessing.apply(image)
    assert result.shape == preprocessing.output_shape
    np.testing.assert_array_equal(preprocessing.apply(result), result)


def test_steps_run_in_their_order(photo: np.ndarray) -> None:
    first = Preprocessing(steps=(Step("resize_short", 100, 100),))
    second = Preprocessing(steps=(Step("crop", 80, 80),))
    np.testing.assert_array_equal(first.then(second).apply(photo), second.apply(first.apply(photo)))


@pytest.mark.parametrize(("height", "width"), [(160, 213), (100, 100), (48, 64), (20, 30), (374, 60)])
def test_auto_shrinks_photos_to_nearly_the_mean_of_the_area(photos: list[np.ndarray], height: int, width: int) -> None:
    for photo in photos:
        exact = cv2.resize(photo, (width, height), interpolation=cv2.INTER_AREA).astype(int)
        nearly = geometry.resize(photo, height, width) - exact
        linear = cv2.resize(photo, (width, height), interpolation=cv2.INTER_LINEAR) - exact
        assert abs(nearly.mean()) < 0.5
        assert np.abs(nearly).mean() <= min(2, np.abs(linear).mean())
