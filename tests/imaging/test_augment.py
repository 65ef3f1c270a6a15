from __future__ import annotations

import dataclasses
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes import config
from manyeyes.errors import ConfigError, ImageError, UsageError
from manyeyes.imaging import randaugment
from manyeyes.imaging.augment import Augmentation, augment_batch, training_view
from manyeyes.imaging.preprocessing import Preprocessing

EVERYTHING = Augmentation(
    flip_horizontal=0.5,
    flip_vertical=0.5,
    rotate_degrees=20,
    shift=0.2,
    zoom=0.3,
    random_resized_crop=0.3,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    randaugment_ops=2,
    erase=0.5,
)
SINGLE = [
    Augmentation(**{field: value})  # type: ignore[arg-type]
    for field, value in dataclasses.asdict(EVERYTHING).items()
    if field != "randaugment_magnitude"
]


def name_of(augmentation: Augmentation) -> str:
    changed = {k for k, v in dataclasses.asdict(augmentation).items() if v != getattr(Augmentation(), k)}
    return "+".join(sorted(changed)) if len(changed) < 3 else "everything"


def random_images(num: int, height: int = 28, width: int = 28, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (num, 4, 5, channels), dtype=np.uint8)
    resized = [cv2.resize(image, (width, height)).reshape(height, width, channels) for image in coarse]
    images = np.stack(resized)
    images.flags.writeable = False
    return images


@st.composite
def augmentations(draw: st.DrawFn) -> Augmentation:
    fields = dataclasses.asdict(EVERYTHING)
    chosen = draw(st.sets(st.sampled_from(sorted(fields))))
    return Augmentation(**{field: fields[field] for field in chosen})


@given(augmentations(), st.integers(1, 6), st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]), st.data())
@settings(deadline=None, max_examples=200)
def test_a_row_depends_only_on_its_image_and_its_index(
    augmentation: Augmentation, num: int, height: int, width: int, channels: int, data: st.DataObject
) -> None:
    images = random_images(num, height, width, channels)
    indices = np.array(data.draw(st.lists(st.integers(0, 2**40), min_size=num, max_size=num)))
    seed, epoch = data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, 1000))
    together = augment_batch(images, augmentation, seed, epoch, indices)
    assert together.dtype == np.uint8 and together.shape == images.shape
    order = data.draw(st.permutations(range(num)))
    out = np.empty_like(images)
    shuffled = augment_batch(images[order], augmentation, seed, epoch, indices[order], out)
    assert shuffled is out
    np.testing.assert_array_equal(shuffled, together[order])
    alone = augment_batch(images[:1], augmentation, seed, epoch, indices[:1])
    np.testing.assert_array_equal(alone, together[:1])


@pytest.mark.parametrize("augmentation", [*SINGLE, EVERYTHING], ids=name_of)
@pytest.mark.parametrize("channels", [1, 3])
def test_each_augmentation_changes_images_and_differs_by_example_epoch_and_seed(
    augmentation: Augmentation, channels: int
) -> None:
    if channels == 1 and name_of(augmentation) in ("saturation", "hue"):
        grey = random_images(4, channels=1)
        np.testing.assert_array_equal(augment_batch(grey, augmentation, 0, 0, np.arange(4)), grey)
        return
    images = np.repeat(random_images(1, channels=channels), 32, axis=0)
    first = augment_batch(images, augmentation, 0, 0, np.arange(32))
    assert (first != images).any()
    assert len(np.unique(first.reshape(32, -1), axis=0)) > 1
    assert (augment_batch(images, augmentation, 0, 1, np.arange(32)) != first).any()
    assert (augment_batch(images, augmentation, 1, 0, np.arange(32)) != first).any()
    np.testing.assert_array_equal(augment_batch(images, augmentation, 0, 0, np.arange(32)), first)


def test_no_augmentation_changes_nothing() -> None:
    images = random_images(5)
    assert Augmentation().is_identity and Augmentation(randaugment_magnitude=3).is_identity
    assert not any(augmentation.is_identity for augmentation in SINGLE)
    np.testing.assert_array_equal(augment_batch(images, Augmentation(), 0, 0, np.arange(5)), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_certain_flip_is_exactly_the_mirror_image(channels: int) -> None:
    images = random_images(4, 27, 33, channels)
    horizontal = augment_batch(images, Augmentation(flip_horizontal=1), 0, 0, np.arange(4))
    np.testing.assert_array_equal(horizontal, images[:, :, ::-1])
    vertical = augment_batch(images, Augmentation(flip_vertical=1), 0, 0, np.arange(4))
    np.testing.assert_array_equal(vertical, images[:, ::-1])


def test_about_as_many_images_are_flipped_as_asked_for() -> None:
    images = np.repeat(random_images(1), 2000, axis=0)
    result = augment_batch(images, Augmentation(flip_horizontal=0.3), 0, 0, np.arange(2000))
    num_flipped = (result == images[0, :, ::-1]).all(axis=(1, 2, 3)).sum()
    assert 520 <= num_flipped <= 680


def test_a_shift_moves_whole_pixels_and_stays_within_its_bound() -> None:
    ramp = np.arange(40, dtype=np.uint8)
    images = np.repeat((ramp[:, None] + 100 * (ramp[None] % 2)).astype(np.uint8)[None, :, :, None], 200, axis=0)
    position = np.zeros((200, 40, 40, 1), np.uint8)
    position[:, 20, 20] = 1
    result = augment_batch(position, Augmentation(shift=0.25), 3, 0, np.arange(200))
    assert (result.sum(axis=(1, 2, 3)) == 1).all(), "one pixel stays one pixel"
    _, rows, columns, _ = np.nonzero(result)
    assert set(rows) == set(range(10, 31)) and set(columns) == set(range(10, 31))
    moved = augment_batch(images, Augmentation(shift=0.25), 3, 0, np.arange(200))
    assert set(np.unique(moved)) <= set(np.unique(images)), "no value is interpolated"


def test_geometry_brings_no_new_colours_into_a_plain_image() -> None:
    plain = np.full((20, 30, 30, 3), 77, np.uint8)
    moving = Augmentation(rotate_degrees=45, shift=0.3, zoom=0.5, random_resized_crop=0.2, flip_horizontal=0.5)
    np.testing.assert_array_equal(augment_batch(plain, moving, 0, 0, np.arange(20)), plain)


def test_colour_changes_keep_grey_grey_and_hue_keeps_brightness() -> None:
    grey = np.repeat(random_images(8, channels=1), 3, axis=3)
    result = augment_batch(grey, Augmentation(saturation=0.9, hue=0.5), 0, 0, np.arange(8))
    assert np.abs(result.astype(int) - grey).max() <= 1
    images = (random_images(8) // 4 + 96).astype(np.uint8)
    turned = augment_batch(images, Augmentation(hue=0.5), 0, 0, np.arange(8))
    luma = np.array([0.299, 0.587, 0.114])
    assert np.abs(turned @ luma - images @ luma).max() < 2
    assert np.abs(turned.astype(int) - images).max() > 20


def test_erasing_paints_one_rectangle_in_about_the_asked_share_of_images() -> None:
    images = np.full((1000, 20, 24, 3), 50, np.uint8)
    result = augment_batch(images, Augmentation(erase=0.4), 0, 0, np.arange(1000))
    changed = (result != 50).any(axis=3)
    assert 340 <= changed.any(axis=(1, 2)).sum() <= 460
    for mask, image in zip(changed, result, strict=True):
        if mask.any():
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            assert len(np.unique(image[mask], axis=0)) == 1
            assert mask.mean() < 0.4


@pytest.mark.parametrize("operation", randaugment.OPERATIONS, ids=lambda operation: operation.__name__.strip("_"))
@pytest.mark.parametrize("channels", [1, 3])
def test_each_operation_keeps_shape_and_input(photo: np.ndarray, operation: Callable, channels: int) -> None:
    image = np.ascontiguousarray(photo[:90, :70, :channels])
    before = image.copy()
    for strength in (0.0, 0.5, 1.0):
        for sign in (-1.0, 1.0):
            result = operation(image, strength, sign).reshape(image.shape)
            assert result.dtype == np.uint8
            changes = operation.__name__ != "_identity" and not (operation.__name__ == "_colour" and channels == 1)
            if strength == 1:
                assert (result != image).any() == changes
            elif strength == 0 and operation.__name__ not in ("_auto_contrast", "_equalize"):
                np.testing.assert_array_equal(result, image)
    np.testing.assert_array_equal(image, before)


def test_an_out_array_of_another_shape_is_refused() -> None:
    images = random_images(2)
    with pytest.raises(UsageError, match="shape of images"):
        augment_batch(images, Augmentation(), 0, 0, np.arange(2), out=np.empty((2, 28, 28, 1), np.uint8))


@pytest.mark.parametrize(
    "field", ["flip_horizontal", "hue", "zoom", "randaugment_ops", "randaugment_magnitude", "erase"]
)
@pytest.mark.parametrize("value", [-1, 1000, float("nan")])
def test_a_setting_out_of_range_says_the_range(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"augmentation\.{field}=.* Use 0 to"):
        Augmentation(**{field: value})  # type: ignore[arg-type]


def test_settings_survive_a_recipe() -> None:
    assert config.from_dict(Augmentation, config.to_dict(EVERYTHING)) == EVERYTHING


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augmentation", [Augmentation(), EVERYTHING, Augmentation(random_resized_crop=0.1)], ids=name_of
)
def test_a_training_view_has_the_output_shape_and_repeats_exactly(
    photo: np.ndarray, encode: Callable[..., bytes], augmentation: Augmentation, channels: int
) -> None:
    preprocessing = Preprocessing.for_size(64, 96, channels=channels)
    encoded = encode(photo[:150, :200], "JPEG")
    views = [training_view(encoded, preprocessing, augmentation, 1, 2, index) for index in (5, 5, 6)]
    assert all(view.shape == (64, 96, channels) and view.dtype == np.uint8 for view in views)
    np.testing.assert_array_equal(views[0], views[1])
    assert (views[0] != views[2]).any() == (not augmentation.is_identity)
    if augmentation.is_identity:
        np.testing.assert_array_equal(views[0], preprocessing(encoded))


def test_a_training_view_of_pixels_is_that_of_their_lossless_file(
    photo: np.ndarray, encode: Callable[..., bytes]
) -> None:
    preprocessing = Preprocessing.for_size(64, 64)
    from_pixels = training_view(photo, preprocessing, EVERYTHING, 0, 0, 3)
    np.testing.assert_array_equal(from_pixels, training_view(encode(photo, "PNG"), preprocessing, EVERYTHING, 0, 0, 3))


def test_a_training_view_of_a_fixed_size_image_equals_its_row_in_a_batch(photo: np.ndarray) -> None:
    augmentation = dataclasses.replace(EVERYTHING, random_resized_crop=0.0)
    view = training_view(photo, Preprocessing(), augmentation, 4, 5, 6)
    np.testing.assert_array_equal(view, augment_batch(photo[None], augmentation, 4, 5, np.array([6]))[0])


def test_random_resized_crop_cuts_from_the_full_resolution() -> None:
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 256, (512, 512, 3), dtype=np.uint8)
    preprocessing = Preprocessing.for_size(64, 64)
    crop = Augmentation(random_resized_crop=0.05)
    views = [training_view(sharp, preprocessing, crop, 0, 0, index) for index in range(20)]
    # The whole image at 64 pixels has lost the detail that a twentieth of it still has.
    assert max(view.std() for view in views) > 1.8 * preprocessing.apply(sharp).std()


def test_random_resized_crop_needs_a_fixed_size(photo: np.ndarray) -> None:
    with pytest.raises(UsageError, match="fixed size"):
        training_view(photo, Preprocessing(), Augmentation(random_resized_crop=0.5), 0, 0, 0)


def test_a_training_view_of_a_bad_file_is_an_error_not_a_blank_image() -> None:
    with pytest.raises(ImageError):
        training_view(b"not an image", Preprocessing.for_size(8, 8), EVERYTHING, 0, 0, 0)
