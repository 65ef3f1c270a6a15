"""Transparency and 16 bits: the same pixels as by the plain formula, in little memory."""

from __future__ import annotations

import contextlib
import tracemalloc
from collections.abc import Iterator

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from manyeyes.imaging import decode as decode_module
from manyeyes.imaging.decode import decode


def _by_formula(image: np.ndarray, background: int) -> np.ndarray:
    """What the pixels (height, width, 4) of an image are to become, all at once and in wide integers."""
    if image.dtype == np.uint16:
        image = image >> 8
    colours, opacity = image[:, :, :3].astype(np.int64), image[:, :, 3:].astype(np.int64)
    return ((colours * opacity + background * (255 - opacity) + 127) // 255).astype(np.uint8)


@contextlib.contextmanager
def _small_bands() -> Iterator[None]:
    """Images of a few pixels are worked on in several bands, as large ones are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "_BAND_PIXELS", 20)
        yield


@given(
    st.sampled_from([np.uint8, np.uint16]).flatmap(
        lambda dtype: hnp.arrays(dtype, st.tuples(st.integers(1, 12), st.integers(1, 30), st.just(4)))
    ),
    st.integers(0, 255),
)
def test_transparency_is_laid_on_the_background_as_the_formula_says(image: np.ndarray, background: int) -> None:
    encoded = cv2.imencode(".png", image[:, :, [2, 1, 0, 3]])[1].tobytes()
    with _small_bands():
        found = decode(encoded, background=background)
    np.testing.assert_array_equal(found, _by_formula(image, background))


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 30), st.just(4))), st.integers(0, 255))
def test_colours_that_are_already_multiplied_with_their_opacity_get_the_background_added(
    image: np.ndarray, background: int
) -> None:
    opacity = image[:, :, 3:].astype(np.int64)
    wanted = np.minimum(image[:, :, :3] + (background * (255 - opacity) + 127) // 255, 255).astype(np.uint8)
    with _small_bands():
        found = decode_module._without_alpha(image, background, premultiplied=True)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("dtype, most", [(np.uint8, 9), (np.uint16, 14)])
def test_memory_for_a_large_transparent_image_is_little_more_than_its_pixels(dtype: type, most: int) -> None:
    image = np.zeros((2000, 1000, 4), dtype)
    image[::9] = 77
    encoded = cv2.imencode(".png", image)[1].tobytes()
    del image
    tracemalloc.start()
    try:
        decode(encoded)
        # Of it the pixels that OpenCV gives are 4 or 8 bytes, and what is returned 3.
        assert tracemalloc.get_traced_memory()[1] < most * 2e6
    finally:
        tracemalloc.stop()
