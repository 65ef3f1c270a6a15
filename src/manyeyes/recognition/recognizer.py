"""The public door to recognition: a bundle in, then any image in, a prediction out."""

from __future__ import annotations

import os
from typing import overload

import numpy as np

from manyeyes.data.sources.base import read_image_file
from manyeyes.errors import ImageError, UsageError
from manyeyes.recognition.bundle import BackendName
from manyeyes.recognition.predictor import Prediction, Predictor

Image = bytes | bytearray | memoryview | str | os.PathLike[str] | np.ndarray
"""Encoded bytes; a path or a URI of a file; or decoded uint8 pixels (height, width, 3 or 1) or (height, width), RGB."""

# A list of photos may be longer than memory is large, and the largest batches are no faster.
_BATCH_SIZE = 32


class Recognizer:
    """Recognises images by a bundle; its methods may be called from several threads.

    recognizer = Recognizer.load("bundles/fashion")
    print(recognizer.predict("photo.jpg").class_name)

    Attributes:
        predictor: the compiled model with its preprocessing, for those who want logits or batches of pixels.
        class_names: label i is class_names[i].
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.class_names = predictor.class_names

    @classmethod
    def load(
        cls, bundle: str | os.PathLike[str], backend: BackendName | None = None, *, num_threads: int | None = None
    ) -> Recognizer:
        """Open the bundle at a path or URI and prove by its golden examples that it answers as at export.

        Args:
            backend: "auto" (the fastest here), "openvino" or "onnxruntime"; default: the one that the bundle prefers.
            num_threads: for one call of the model; default: see Predictor.load.

        Raises:
            BundleError: the bundle is missing, damaged, or does not do here what it did at export.
            MissingExtraError: no backend is installed.
        """
        return cls(Predictor.load(os.fspath(bundle), backend, num_threads=num_threads))

    @overload
    def predict(self, image: Image, *, top_k: int = 5) -> Prediction: ...
    @overload
    def predict(self, image: list[Image], *, top_k: int = 5) -> list[Prediction]: ...
    def predict(self, image: Image | list[Image], *, top_k: int = 5) -> Prediction | list[Prediction]:
        """Recognise one image, or each of a list of images.

        Args:
            image: encoded bytes, a path or URI, a uint8 array (height, width, 3 or 1) or (height, width) in RGB of any
                size, or a list of these.
            top_k: the number of classes in a prediction, at most all.

        Returns:
            A prediction; of a list, one for each image in its order.

        Raises:
            ImageError: an image can't be read or decoded; of a path and in a list it says which.
            UsageError: something else than an image was given, or `top_k` is below 1.
        """
        if not isinstance(image, list):
            return self._predict_all([image], top_k)[0]  # type: ignore[list-item]
        predictions: list[Prediction] = []
        for start in range(0, len(image), _BATCH_SIZE):
            predictions += self._predict_all(image[start : start + _BATCH_SIZE], top_k, start)
        return predictions

    def _predict_all(self, images: list[Image], top_k: int, first: int | None = None) -> list[Prediction]:
        pixels = []
        for index, image in enumerate(images):
            try:
                pixels.append(self._pixels(image))
            except (ImageError, UsageError) as error:
                which = "" if first is None else f"image {first + index}"
                if isinstance(image, str | os.PathLike) and os.fspath(image) not in str(error):
                    which = os.fspath(image)
                if not which:
                    raise
                if isinstance(error, ImageError):
                    raise ImageError(error.reason, f"{which}: {error.detail}") from None
                raise UsageError(f"{which}: {error}") from None
        return self.predictor.predict_pixels(np.stack(pixels), top_k)

    def _pixels(self, image: Image) -> np.ndarray:
        if isinstance(image, str | os.PathLike):
            return self.predictor.preprocess(read_image_file(os.fspath(image)))
        if isinstance(image, bytearray | memoryview):
            return self.predictor.preprocess(bytes(image))
        if isinstance(image, bytes | np.ndarray):
            return self.predictor.preprocess(image)
        raise UsageError(f"An image can't be {_kind(image)}. Give bytes, a path, a uint8 array, or a list of these.")


def _kind(image: object) -> str:
    return "None" if image is None else f"of type {type(image).__name__}"
