"""Probable label errors by confident learning (Northcutt, Jiang and Chuang, 2021) on predictions for unseen images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from manyeyes.errors import DataError, MissingExtraError
from manyeyes.evaluation.predictions import Predictions, read_predictions
from manyeyes.recognition.predictor import softmax


@dataclass(frozen=True)
class Suspect:
    """A label that is probably wrong.

    Attributes:
        path: of the example.
        label: that it has.
        predicted: that the model gives it.
        label_probability: what the model gives the label that it has; the lower, the more probable is an error.
    """

    path: str
    label: int
    predicted: int
    label_probability: float


def find_label_errors(directory: str, num_classes: int) -> tuple[list[Suspect], int]:
    """Estimate how many labels are wrong, and name as many: those to which the model gives the least probability.

    The predictions are read three times, a row group at a time; only a few bytes per example stay in memory.

    Args:
        directory: of `manyeyes evaluate … --predictions` or `manyeyes crossval`. The model must not have been trained
            on these examples: it would repeat their labels.

    Returns:
        The suspects, the least probable label first, and the number of examples that were judged.

    Raises:
        MissingExtraError: cleanlab is not installed.
        DataError: there are no predictions, or they have another number of classes.
    """
    try:
        from cleanlab.experimental.label_issues_batched import LabelInspector
    except ImportError:
        raise MissingExtraError("Finding label errors", "audit") from None
    inspector = LabelInspector(num_class=num_classes, verbose=False, n_jobs=1)
    for batch in read_predictions(directory):
        inspector.update_confident_thresholds(batch.labels, _probabilities(batch, directory, num_classes))
    scores = [
        inspector.score_label_quality(batch.labels, _probabilities(batch, directory, num_classes))
        for batch in read_predictions(directory)
    ]
    num_judged = sum(map(len, scores))
    is_suspect = np.zeros(num_judged, bool)
    is_suspect[inspector.get_label_issues()] = True
    suspects: list[Suspect] = []
    start = 0
    for batch in read_predictions(directory):
        probabilities = _probabilities(batch, directory, num_classes)
        for row in np.flatnonzero(is_suspect[start : start + len(batch)]).tolist():
            label, predicted = int(batch.labels[row]), int(batch.predicted[row])
            if label != predicted:
                probability = round(float(probabilities[row, label]), 6)
                suspects.append(Suspect(batch.paths[row], label, predicted, probability))
        start += len(batch)
    return sorted(suspects, key=lambda suspect: (suspect.label_probability, suspect.path)), num_judged


def _probabilities(batch: Predictions, directory: str, num_classes: int) -> np.ndarray:
    if batch.logits.shape[1] != num_classes:
        raise DataError(
            f"{directory} has predictions of {batch.logits.shape[1]} classes, but the dataset has {num_classes}. "
            "Give predictions for this dataset."
        )
    return softmax(batch.logits)
