"""From images to predictions, by a bundle, without Keras in the process."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from manyeyes.errors import BundleError, ImageError, UsageError
from manyeyes.imaging.decode import DecodeLimits
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.recognition.backends import Backend
from manyeyes.recognition.bundle import BackendName, Bundle, GoldenExamples, Precision
from manyeyes.recognition.selection import select_backend, time_calls

# How far a logit may be from the trained model's, as a share of the largest absolute logit (at least 1). Measured:
# 1e-6 in float32, up to 0.05 in bfloat16, up to 0.2 in int8 (docs/decisions/, 0060 and 0111).
LOGIT_TOLERANCE: dict[Precision, float] = {"float32": 1e-4, "bfloat16": 1e-1, "int8": 0.25}


@dataclass(frozen=True)
class ClassProbability:
    """One class and how likely it is."""

    label: int
    class_name: str
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Attributes:
        label, class_name, probability: of the likeliest class.
        top_k: the k likeliest classes, the likeliest first.
        abstain: whether the probability is below the bundle's threshold, so that the answer should not be relied on;
            None where the bundle has no threshold.
    """

    label: int
    class_name: str
    probability: float
    top_k: tuple[ClassProbability, ...]
    abstain: bool | None = None


class Predictor:
    """A bundle that is ready to recognise; its methods may be called from several threads.

    Make one with `Predictor.load`.

    Attributes:
        backend: the compiled model; its `name`, `precision` and `num_threads` say what runs.
        why: for what reason it was chosen, for people.
    """

    def __init__(self, bundle: Bundle, backend: Backend, why: str = "") -> None:
        self.bundle = bundle
        self.backend = backend
        self.why = why
        self.class_names = bundle.class_names
        self.preprocessing = bundle.preprocessing
        self._temperature = bundle.info.temperature
        self._threshold = bundle.info.threshold

    @classmethod
    def load(
        cls,
        bundle_uri: str,
        backend: BackendName | None = None,
        *,
        replay_golden: bool = True,
        num_threads: int | None = None,
        measure: bool = True,
    ) -> Predictor:
        """Open and check the bundle at `bundle_uri`, compile its model, and replay its golden examples.

        Args:
            backend: "auto" (the fastest here), "openvino" or "onnxruntime"; default: the one that the bundle prefers.
            replay_golden: False skips the replay, where this process has just made it.
            num_threads: for one call of the model; default: the better of one and what the engine gave to this process,
                else all cores.
            measure: False chooses without looking at this machine, so that all processes of a job choose the same.

        Returns:
            The predictor, proven to answer as it did at export.

        Raises:
            BundleError: the bundle is damaged, or does not do here what it did at export.
            MissingExtraError: no backend is installed.
        """
        bundle = Bundle.load(bundle_uri)
        predictor = cls(bundle, *select_backend(bundle, backend or bundle.info.backend, num_threads, measure=measure))
        if predictor.backend.input_shape != bundle.info.input_shape:
            raise BundleError(
                f"{bundle.uri}: the model takes images of {predictor.backend.input_shape}, "
                f"the bundle says {bundle.info.input_shape}. Export the run again."
            )
        if replay_golden:
            predictor.replay(bundle.golden_examples())
        return predictor

    def replay(self, golden: GoldenExamples) -> float:
        """Compare this machine's answers with the trained model's.

        Returns:
            The largest absolute difference of a logit.

        Raises:
            BundleError: pixels differ at all, a logit differs by more than the tolerance of the precision, or another
                class comes first although its lead is larger than the tolerance.
        """
        where = self.bundle.uri
        for name, encoded, expected in zip(golden.names, golden.encoded, golden.pixels, strict=True):
            try:
                pixels = self.preprocessing(encoded)
            except ImageError as error:
                raise BundleError(f"{where}: golden example {name!r} can't be decoded here: {error}") from None
            if pixels.shape != expected.shape:
                raise BundleError(
                    f"{where}: golden example {name!r} gives an image of {pixels.shape} here, "
                    f"{expected.shape} at export. Export the run again."
                )
            if not np.array_equal(pixels, expected):
                difference = np.abs(pixels.astype(np.int16) - expected)
                raise BundleError(
                    f"{where}: golden example {name!r} gives other pixels than at export: "
                    f"{np.count_nonzero(difference)} of {difference.size} values differ, by up to {difference.max()}. "
                    "The image decoder is not that of the export; export the run again here."
                )
        logits = self.logits(golden.pixels)
        if logits.shape != golden.logits.shape or logits.shape[1] != len(self.class_names):
            raise BundleError(
                f"{where}: the model gives logits of shape {logits.shape}, expected {golden.logits.shape} "
                f"for {len(self.class_names)} classes. Export the run again."
            )
        tolerance = self.logit_tolerance(golden.logits)
        for name, found, wanted in zip(golden.names, logits, golden.logits, strict=True):
            difference = float(np.max(np.abs(found - wanted)))
            if not difference <= tolerance:  # NaN must not pass
                raise BundleError(
                    f"{where}: golden example {name!r}: a logit differs by {difference:.3g} from the trained model; "
                    f"{tolerance:.3g} is allowed in {self.backend.precision} ({self.backend.name}). "
                    "Export the run again."
                )
            second, first = np.sort(wanted)[-2:] if len(wanted) > 1 else (-np.inf, wanted[0])
            if first - second > tolerance and int(np.argmax(found)) != int(np.argmax(wanted)):
                raise BundleError(
                    f"{where}: golden example {name!r} is {self.class_names[int(np.argmax(found))]!r} here, but was "
                    f"{self.class_names[int(np.argmax(wanted))]!r} at export. Export the run again."
                )
        return float(np.max(np.abs(logits - golden.logits)))

    def logit_tolerance(self, logits: np.ndarray) -> float:
        """How far a logit may be from `logits` of the trained model, in the precision of this predictor."""
        return LOGIT_TOLERANCE[self.backend.precision] * max(1.0, float(np.max(np.abs(logits))))

    def preprocess(
        self, image: bytes | np.ndarray, limits: DecodeLimits | None = None, preprocessing: Preprocessing | None = None
    ) -> np.ndarray:
        """Encoded bytes, or decoded pixels of any size, to the model's input.

        Args:
            image: encoded bytes, or a uint8 array (height, width, 3 or 1) or (height, width), RGB.
            preprocessing: what is left to do, where a part was done already; default: all.

        Returns:
            uint8 array of the model's input shape.

        Raises:
            ImageError: the bytes can't be decoded, or exceed the limits.
            UsageError: an array is of another type or shape.
        """
        preprocessing = preprocessing or self.preprocessing
        if isinstance(image, np.ndarray):
            return preprocessing.apply(_with_channels(image, preprocessing.channels))
        return preprocessing(image, limits)

    def logits(self, batch: np.ndarray) -> np.ndarray:
        """Map a batch of model inputs, uint8 (n, height, width, channels), to float32 logits (n, classes)."""
        if batch.dtype != np.uint8 or batch.shape[1:] != self.bundle.info.input_shape:
            raise UsageError(
                f"The batch is {batch.dtype} {batch.shape}; expected uint8, n images of {self.bundle.info.input_shape}."
            )
        return self.backend.run(np.ascontiguousarray(batch))

    def probabilities(self, batch: np.ndarray) -> np.ndarray:
        """Map a batch of model inputs to float64 probabilities (n, classes)."""
        return softmax(self.logits(batch), self._temperature)

    def predict(self, images: Sequence[bytes | np.ndarray], top_k: int = 5) -> list[Prediction]:
        """Recognise images.

        Args:
            images: each encoded bytes, or a decoded uint8 array (height, width, channels) in RGB of any size.
            top_k: the number of classes in each prediction, at most all.

        Returns:
            One prediction per image, in their order.

        Raises:
            ImageError: an image can't be decoded.
            UsageError: `top_k` is below 1, or an array is of another type.
        """
        return self.predict_pixels(np.stack([self.preprocess(image) for image in images]), top_k) if len(images) else []

    def predict_pixels(self, batch: np.ndarray, top_k: int = 5) -> list[Prediction]:
        """Recognise a batch of model inputs, uint8 (n, height, width, channels)."""
        if top_k < 1:
            raise UsageError(f"top_k={top_k} is below 1. Ask for at least one class.")
        return self.likeliest(self.probabilities(batch), top_k)

    def likeliest(self, probabilities: np.ndarray, top_k: int = 5) -> list[Prediction]:
        """Name the likeliest classes of probabilities (n, classes)."""
        labels, highest = top_labels(probabilities, top_k)
        predictions = []
        for row, values in zip(labels.tolist(), highest.tolist(), strict=True):
            names = [self.class_names[label] for label in row]
            abstain = None if self._threshold is None else values[0] < self._threshold
            top = tuple(map(ClassProbability, row, names, values))
            predictions.append(Prediction(row[0], names[0], values[0], top, abstain))
        return predictions

    def warm_up(self, batch_sizes: Iterable[int]) -> None:
        """Run the model once on a batch of each of these sizes.

        The first batch of a size takes tens of milliseconds more than the next, in which OpenVINO makes its kernels.
        """
        for batch_size in batch_sizes:
            self.backend.run(np.zeros((batch_size, *self.bundle.info.input_shape), np.uint8))

    def latency_curve(self, max_batch_size: int = 64, max_seconds: float = 0.1) -> list[tuple[int, float]]:
        """Measure how long a batch of 1, 2, 4, … images takes here; every size has been warmed up afterwards.

        Takes about a tenth of a second for a small model, and a few times `max_seconds` for a large one.

        Args:
            max_batch_size: where the curve ends.
            max_seconds: the curve also ends in front of the first batch that takes longer; one image is always in it.

        Returns:
            (batch size, median seconds of one call of the model) in the order of the sizes.
        """
        curve: list[tuple[int, float]] = []
        batch_size = 1
        while batch_size <= max_batch_size:
            seconds = statistics.median(time_calls(self.backend, self.bundle.info.input_shape, batch_size, 0.02, 3))
            if curve and seconds > max_seconds:
                break
            curve.append((batch_size, seconds))
            batch_size *= 2
        return curve


def top_labels(values: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The labels of the k highest of values (n, classes), the highest first, and these values; both (n, k).

    Equal values come in the order of their labels, on every machine.
    """
    labels = np.argsort(-values, axis=1, kind="stable")[:, :k]
    return labels, np.take_along_axis(values, labels, axis=1)


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Map logits (n, classes), divided by `temperature`, to float64 probabilities (n, classes); never overflows."""
    scaled = logits.astype(np.float64) / temperature
    exponentials = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def _with_channels(image: np.ndarray, channels: int) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3)):
        raise UsageError(
            f"The image is an array of {image.dtype} {image.shape}; expected uint8 (height, width, 3 or 1)."
        )
    image = image.reshape(*image.shape[:2], -1)
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None]
