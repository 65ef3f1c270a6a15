"""In which precision a model can be served: how fast, how far from the trained model, at what cost of accuracy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from manyeyes.errors import BundleError, UsageError
from manyeyes.recognition.bundle import (
    GOLDEN_NAME,
    MODEL_NAME,
    BundleInfo,
    GoldenExamples,
    Precision,
    write_bundle,
)
from manyeyes.recognition.predictor import Predictor
from manyeyes.recognition.selection import Timing, choose, measure_backends, seconds_per_image, to_dicts
from manyeyes.training.held_out import Accuracy, Sample, compare_accuracy
from manyeyes.training.quantize import quantize

# Images of the dataset that both models answer, besides the golden examples.
NUM_PARITY_IMAGES = 256
# Labelled images that a lower precision is compared with float32 on.
NUM_ACCURACY_IMAGES = 1000
# Points of accuracy that a lower precision may cost.
MAX_LOSS_POINTS = 0.5
# In bfloat16 near ties may fall the other way, in float32 only where the lead is below the tolerance. Answers of int8
# differ more often, to the right side as often as to the wrong one: there accuracy decides.
MIN_TOP1_AGREEMENT = {"float32": 0.99, "bfloat16": 0.99, "int8": 0.0}
# A lower precision has to be this much faster to be chosen by itself.
_WORTH_A_PRECISION = 1.1
_BATCH_SIZE = 32


@dataclass(frozen=True)
class Parity:
    """How far the bundle is from the trained model, in the precision that will serve.

    Attributes:
        golden_max_difference, max_difference: largest absolute difference of a logit, on golden examples and images.
        tolerance: what is allowed for it; in bfloat16 and int8 only the golden examples are held to it.
        top1_agreement: share of the images with the same likeliest class.
    """

    num_golden: int
    golden_max_difference: float
    num_images: int
    max_difference: float
    tolerance: float
    top1_agreement: float


@dataclass(frozen=True)
class Candidate:
    """One precision, as it was measured.

    Attributes:
        backend, num_threads: that are the fastest in it here; "" and 0 where none has it.
        milliseconds: of one image alone.
        batch_milliseconds: of one image in a batch of 8.
        parity: beside the trained model; None where it was refused before.
        accuracy: beside float32; None where it was refused before.
        refusal: why it can't be served; "" where it can.
        note: what is special about it, for people.
    """

    precision: Precision
    backend: str = ""
    num_threads: int = 0
    milliseconds: float = 0.0
    batch_milliseconds: float = 0.0
    parity: Parity | None = None
    accuracy: Accuracy | None = None
    refusal: str = ""
    note: str = ""


@dataclass(frozen=True)
class Tried:
    """A candidate with all that is needed to publish it, or with the error that forbids it.

    Attributes:
        seconds: per image, as seconds_per_image; infinite where it was refused.
    """

    candidate: Candidate
    info: BundleInfo
    model: bytes
    error: Exception | None = None
    seconds: float = math.inf


class Examiner:
    """Measures precisions one after the other; float32, which the others are compared with, first."""

    def __init__(
        self,
        aside: str,
        info: BundleInfo,
        golden: GoldenExamples,
        sample: Sample,
        inputs: np.ndarray,
        trained_logits: np.ndarray,
    ) -> None:
        self._aside = aside
        self._info = info
        self._golden = golden
        self._sample = sample
        self._inputs = inputs
        self._trained_logits = trained_logits
        self._float32_logits: np.ndarray | None = None

    def examine(self, precision: Precision, model: bytes) -> Tried:
        """Time `model` in `precision`, and compare it with the trained model and with float32."""
        timings = measure_backends(model, backend=self._info.backend, precision=precision, shape=self._info.input_shape)
        timings = tuple(timing for timing in timings if timing.precision == precision)
        info = dataclasses.replace(self._info, precision=precision, timings=to_dicts(timings))
        candidate = Candidate(precision)
        try:
            if timings:
                candidate = _timed(candidate, timings)
                if precision == "int8":
                    # Backends round in other ways, and accuracy is measured on one of them: that one serves it.
                    info = dataclasses.replace(info, backend=choose(timings).backend)
            write_bundle(self._aside, info, {MODEL_NAME: model, GOLDEN_NAME: self._golden.to_bytes()})
            predictor = Predictor.load(self._aside, replay_golden=False)
            if predictor.backend.precision != precision:
                raise UsageError(
                    f"{predictor.backend.name} can't serve in {precision} on this machine, "
                    f"only in {predictor.backend.precision}. Use --precision {predictor.backend.precision}."
                )
            parity = _compare(predictor, self._golden, self._inputs, self._trained_logits)
            candidate = dataclasses.replace(candidate, parity=parity)
            logits = in_batches(predictor.logits, self._sample.inputs)
            if precision == "float32":
                self._float32_logits = logits
            assert self._float32_logits is not None
            accuracy = compare_accuracy(self._sample, self._float32_logits, logits)
            candidate = dataclasses.replace(candidate, accuracy=accuracy)
            if accuracy.loss_points > MAX_LOSS_POINTS:
                raise BundleError(_told_loss(precision, accuracy))
        except (BundleError, UsageError) as error:
            if precision == "float32":
                raise
            return Tried(dataclasses.replace(candidate, refusal=str(error)), info, model, error)
        return Tried(
            candidate, info, model, seconds=seconds_per_image(timings)[candidate.backend, candidate.num_threads]
        )

    def examine_int8(self, model: bytes, images: np.ndarray) -> list[Tried]:
        """Quantize `model` by the ranges seen on `images` and examine it; if it is refused, so with float32 ends."""
        tried: list[Tried] = []
        for float_ends in (False, True):
            note = "the first and the last layer are in float32" if float_ends else ""
            try:
                found = self.examine("int8", quantize(model, images, float_ends=float_ends))
            except BundleError as error:
                found = Tried(Candidate("int8", refusal=str(error)), self._info, b"", error)
            tried.append(dataclasses.replace(found, candidate=dataclasses.replace(found.candidate, note=note)))
            if found.error is None:
                break
        return tried


def _timed(candidate: Candidate, timings: Sequence[Timing]) -> Candidate:
    chosen = choose(timings)
    alone, batch = sorted(
        (each for each in timings if (each.backend, each.num_threads) == (chosen.backend, chosen.num_threads)),
        key=lambda timing: timing.batch_size,
    )
    return dataclasses.replace(
        candidate,
        backend=chosen.backend,
        num_threads=chosen.num_threads,
        milliseconds=1e3 * alone.seconds,
        batch_milliseconds=1e3 * batch.seconds / batch.batch_size,
    )


def _told_loss(precision: str, accuracy: Accuracy) -> str:
    right = "right" if accuracy.labelled else "as float32"
    return (
        f"{precision} costs {accuracy.loss_points:.2g} points of accuracy, {MAX_LOSS_POINTS} are allowed: of "
        f"{accuracy.num_images} images of {accuracy.split}, {accuracy.float32:.2%} are right in float32 and "
        f"{accuracy.accuracy:.2%} {right} in {precision} ({accuracy.num_lost} lost, {accuracy.num_gained} gained). "
        "Nothing was published. Use --precision float32, or auto for the fastest that passes."
    )


def choose_precision(tried: Sequence[Tried], precision: str) -> Tried:
    """Return what was asked for, and for "auto" the fastest that passed; float32 unless another is a tenth faster.

    Raises:
        BundleError, UsageError: what was asked for was refused.
    """
    if precision != "auto":
        asked = [each for each in tried if each.candidate.precision == precision]
        passed = [each for each in asked if each.error is None]
        if not passed:
            assert asked[0].error is not None
            raise asked[0].error
        return passed[0]
    passed = [each for each in tried if each.error is None]
    return min(
        passed, key=lambda each: each.seconds * (1 if each.candidate.precision == "float32" else _WORTH_A_PRECISION)
    )


def in_batches(answer: Callable[[np.ndarray], np.ndarray], inputs: np.ndarray) -> np.ndarray:
    """Answer `inputs` batch by batch, so that memory is bounded."""
    starts = range(0, len(inputs), _BATCH_SIZE)
    return np.concatenate([answer(inputs[start : start + _BATCH_SIZE]) for start in starts])


def _compare(predictor: Predictor, golden: GoldenExamples, inputs: np.ndarray, trained_logits: np.ndarray) -> Parity:
    golden_max_difference = predictor.replay(golden)
    # A batch of one takes other kernels than a batch of many, so both are compared.
    served = np.concatenate([predictor.logits(inputs[:1]), in_batches(predictor.logits, inputs)])
    wanted = np.concatenate([trained_logits[:1], trained_logits])
    tolerance = predictor.logit_tolerance(wanted)
    max_difference = float(np.max(np.abs(served - wanted)))
    agreement = float(np.mean(served.argmax(axis=1) == wanted.argmax(axis=1)))
    precision = predictor.backend.precision
    if not np.isfinite(max_difference) or (precision == "float32" and max_difference > tolerance):
        raise BundleError(
            f"The exported model differs from the trained one: a logit by {max_difference:.3g} "
            f"on {len(inputs)} images, {tolerance:.3g} is allowed in {precision} ({predictor.backend.name}). "
            "Nothing was published."
        )
    if agreement < MIN_TOP1_AGREEMENT[precision]:
        raise BundleError(
            f"The exported model agrees with the trained one on {agreement:.1%} of {len(inputs)} images in {precision} "
            f"({predictor.backend.name}), {MIN_TOP1_AGREEMENT[precision]:.0%} is required. Nothing was published. "
            "Try --precision float32."
        )
    return Parity(len(golden), golden_max_difference, len(inputs), max_difference, tolerance, agreement)
