"""How far the probabilities of a bundle can be believed: a temperature, and a threshold below which it abstains.

Temperature scaling (Guo et al., On Calibration of Modern Neural Networks, 2017): logits are divided by the one number
that makes the log loss on the validation split smallest. The order of the classes does not change, nor the accuracy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from manyeyes.data.dataset import Dataset
from manyeyes.errors import UsageError
from manyeyes.intervals import wilson_interval
from manyeyes.recognition.bundle import Calibration
from manyeyes.recognition.predictor import softmax
from manyeyes.training.held_out import read_batches
from manyeyes.training.run import Run

SPLIT = "val"
# Below this chance moves the temperature by more than a tenth, so logits are left as they are.
MIN_EXAMPLES = 200
# So many examples, taken evenly, place the temperature within about 3 %; a threshold needs more.
MAX_EXAMPLES = 2000
MAX_EXAMPLES_FOR_THRESHOLD = 10_000
# Of the Wilson interval whose lower end has to reach the target.
CONFIDENCE = 0.95
# A best temperature beyond these says that the examples don't determine it, as where no prediction is wrong.
_BOUNDS = (0.05, 20.0)
_NUM_BINS = 15


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """What a bundle is served with.

    Attributes:
        temperature: logits are divided by it.
        threshold: below this probability of the likeliest class a prediction abstains; None: it never does.
        record: how both were found.
    """

    temperature: float
    threshold: float | None
    record: Calibration


def calibrate(
    logits_of: Callable[[np.ndarray], np.ndarray],
    trained: Run,
    dataset_uri: str,
    *,
    scale: bool = True,
    target_precision: float | None = None,
) -> Calibrated:
    """Find the temperature, and the threshold for a target, on the validation split.

    Args:
        logits_of: from uint8 images (n, height, width, channels) to float32 logits (n, num_classes).
        scale: False leaves the temperature at 1.
        target_precision: the share of right answers among those that are given; None: there is no threshold.

    Raises:
        UsageError: no threshold reaches the target.
        DatasetError: the dataset can't be read, or gives another shape than the model takes.
    """
    dataset = Dataset(dataset_uri)
    why = ""
    if tuple(dataset.class_names) != tuple(trained.class_names):
        why = f"{dataset_uri} has other classes than the model"
    elif SPLIT not in dataset.split_names:
        why = f"{dataset_uri} has no split {SPLIT!r}"
    elif (num_examples := dataset.split(SPLIT).num_examples) < MIN_EXAMPLES and target_precision is None:
        why = f"{SPLIT} has {num_examples} examples, {MIN_EXAMPLES} are needed"
    if why:
        if target_precision is not None:
            raise UsageError(f"There is no threshold for precision {target_precision}: {why}.")
        return Calibrated(1.0, None, Calibration(note=f"{why}."))
    wanted = MAX_EXAMPLES if target_precision is None else MAX_EXAMPLES_FOR_THRESHOLD
    indices = np.linspace(0, num_examples - 1, min(wanted, num_examples)).astype(np.int64)
    batches = [(logits_of(images), labels) for images, labels in read_batches(dataset, SPLIT, indices, trained)]
    logits = np.concatenate([logits for logits, _ in batches]).astype(np.float64)
    labels = np.concatenate([labels for _, labels in batches])
    temperature, note = 1.0, ""
    if scale and len(labels) < MIN_EXAMPLES:
        note = f"Logits are left as they are: {SPLIT} has {len(labels)} examples, {MIN_EXAMPLES} are needed."
    elif scale:
        temperature, note = fit_temperature(logits, labels)
    probabilities = softmax(logits, temperature)
    right = logits.argmax(axis=1) == labels
    confidences = probabilities.max(axis=1)
    record = Calibration(
        split=SPLIT,
        num_examples=len(labels),
        log_loss_before=log_loss(logits, labels),
        log_loss=log_loss(logits, labels, temperature),
        ece_before=calibration_error(softmax(logits).max(axis=1), right),
        ece=calibration_error(confidences, right),
        note=note,
    )
    if target_precision is None:
        return Calibrated(temperature, None, record)
    threshold = choose_threshold(confidences, right, target_precision)
    accepted = confidences >= threshold
    num_accepted, num_right = int(accepted.sum()), int(right[accepted].sum())
    record = dataclasses.replace(
        record,
        target_precision=target_precision,
        coverage=num_accepted / len(labels),
        precision=num_right / num_accepted,
        precision_low=wilson_interval(num_right, num_accepted, CONFIDENCE).low,
    )
    return Calibrated(temperature, threshold, record)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> tuple[float, str]:
    """The temperature with the smallest log loss, and a remark where logits are left as they are instead.

    Args:
        logits: float64 (n, num_classes).
        labels: int (n,).

    Returns:
        The temperature and ""; or 1 and the reason, for people.
    """
    # The log loss is convex in the inverse of the temperature, so its slope has one zero: bisection, by Newton's steps
    # where they stay inside.
    low, high = 1 / _BOUNDS[1], 1 / _BOUNDS[0]
    if _slopes(logits, labels, low)[0] > 0 or _slopes(logits, labels, high)[0] < 0:
        return (
            1.0,
            f"Logits are left as they are: {len(labels)} examples of {SPLIT} don't say how sure the model may be.",
        )
    inverse = 1.0
    for _ in range(100):
        slope, curvature = _slopes(logits, labels, inverse)
        if slope > 0:
            high = inverse
        else:
            low = inverse
        newton = inverse - slope / curvature if curvature > 0 else high
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - inverse) <= 1e-12 * inverse:
            break
        inverse = following
    temperature = 1 / inverse
    if not log_loss(logits, labels, temperature) < log_loss(logits, labels):
        return 1.0, "Logits are left as they are: no temperature makes the log loss smaller."
    return temperature, ""


def log_loss(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """The mean negative natural logarithm of the probability of the true class."""
    scaled = logits / temperature
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]))


def calibration_error(confidences: np.ndarray, right: np.ndarray) -> float:
    """The expected calibration error over 15 bins of equal width (see evaluation.metrics.Calibration)."""
    bins = np.searchsorted(np.linspace(0, 1, _NUM_BINS + 1)[1:-1], confidences)
    return float(np.abs(np.bincount(bins, weights=right - confidences, minlength=_NUM_BINS)).sum()) / len(right)


def choose_threshold(confidences: np.ndarray, right: np.ndarray, target_precision: float) -> float:
    """The lowest threshold that keeps the target.

    Of the examples at or above it so many are right that the lower end of the 95 % Wilson interval of the precision is
    at least the target.

    Args:
        confidences: float64 (n,), probability of the predicted class.
        right: bool (n,).
        target_precision: above 0 and below 1.

    Raises:
        UsageError: no threshold does.
    """
    order = np.argsort(-confidences, kind="stable")
    ordered = confidences[order]
    num_right = np.cumsum(right[order])
    # Equal confidences are on one side of a threshold.
    ends = np.flatnonzero(np.diff(ordered, append=-1.0))
    best = 0.0
    for end in ends[::-1].tolist():
        low = wilson_interval(int(num_right[end]), end + 1, CONFIDENCE).low
        if low >= target_precision:
            # Midway to the next example: other arithmetic may move a probability by its last digits.
            return float((ordered[end] + ordered[end + 1]) / 2) if end + 1 < len(ordered) else 0.0
        best = max(best, low)
    raise UsageError(
        f"No threshold is shown to reach precision {target_precision} on {len(right)} examples of {SPLIT}: the lower "
        f"end of the 95 % interval is {best:.4f} at most. Give a lower --target-precision, or a larger {SPLIT} split."
    )


def _slopes(logits: np.ndarray, labels: np.ndarray, inverse: float) -> tuple[float, float]:
    """First and second derivative of the log loss by the inverse temperature."""
    probabilities = softmax(logits, 1 / inverse)
    means = (probabilities * logits).sum(axis=1)
    variances = (probabilities * (logits - means[:, None]) ** 2).sum(axis=1)
    return float(np.mean(means - logits[np.arange(len(labels)), labels])), float(np.mean(variances))
