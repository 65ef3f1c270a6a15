from __future__ import annotations

import pathlib
from pathlib import Path

import cv2
import fsspec
import numpy as np
import pytest

from manyeyes import Recognizer
from manyeyes.errors import BundleError, ImageError, Reason, UsageError
from manyeyes.recognition.predictor import Prediction


@pytest.fixture(scope="module")
def recognizer(small_bundle: str) -> Recognizer:
    return Recognizer.load(small_bundle)


def _pixels(label: int) -> np.ndarray:
    pixels = np.full((30, 40, 3), 60, np.uint8)
    pixels[:, :, label] = 170
    return pixels


def _png(label: int) -> bytes:
    return cv2.imencode(".png", _pixels(label)[:, :, ::-1])[1].tobytes()


def test_one_image_gives_one_prediction_however_it_is_given(recognizer: Recognizer, tmp_path: Path) -> None:
    path = tmp_path / "green.png"
    path.write_bytes(_png(1))
    with fsspec.open("memory://pictures/green.png", "wb") as file:
        file.write(_png(1))
    uris = [str(path), f"file://{path}", "memory://pictures/green.png"]
    answers = [recognizer.predict(each) for each in (_png(1), bytearray(_png(1)), path, *uris, _pixels(1))]
    assert all(isinstance(answer, Prediction) and answer == answers[0] for answer in answers)
    assert answers[0].class_name == "green"


def test_a_list_gives_a_list_in_its_order_also_where_it_is_longer_than_a_batch(
    recognizer: Recognizer, tmp_path: Path
) -> None:
    path = tmp_path / "blue.png"
    path.write_bytes(_png(2))
    mixed = [_png(0), path, _pixels(1), str(path)]
    predictions = recognizer.predict(mixed * 20, top_k=2)
    assert [prediction.class_name for prediction in predictions] == ["red", "blue", "green", "blue"] * 20
    assert all(len(prediction.top_k) == 2 for prediction in predictions)
    assert recognizer.predict([]) == []


def test_an_image_that_cannot_be_used_is_named(recognizer: Recognizer, tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(_png(0)[:-20])
    for image, reason, words in (
        (b"no image", Reason.NOT_AN_IMAGE, ""),
        (tmp_path / "nowhere.png", Reason.UNREADABLE, "nowhere.png"),
        (broken, Reason.TRUNCATED, "broken.png"),
        ([_png(0)] * 40 + [b"", _png(0)], Reason.EMPTY, "image 40"),
        ([_png(0), broken], Reason.TRUNCATED, "broken.png"),
    ):
        with pytest.raises(ImageError) as caught:
            recognizer.predict(image)  # type: ignore[call-overload]
        assert caught.value.reason is reason
        assert words in str(caught.value)
        assert str(caught.value).count(words) == 1 or not words


@pytest.mark.parametrize(
    "image, words",
    [
        (7, "can't be of type int"),
        (None, "can't be None"),
        ([None], "image 0: An image can't be None"),
        (np.zeros((3, 4, 5), np.float32), "expected uint8"),
    ],
)
def test_something_else_than_an_image_gets_one_clear_line(recognizer: Recognizer, image: object, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        recognizer.predict(image)  # type: ignore[call-overload]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_bundle_may_be_given_as_a_path_and_a_missing_one_is_said(small_bundle: str, tmp_path: Path) -> None:
    assert Recognizer.load(pathlib.Path(small_bundle)).class_names == ("red", "green", "blue")
    with pytest.raises(BundleError, match="no bundle at"):
        Recognizer.load(tmp_path / "nothing")
