"""What mistakes cost: a table of costs by true and predicted class, and the mean cost of an evaluation."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

import numpy as np

from manyeyes import storage
from manyeyes.errors import UsageError
from manyeyes.evaluation.intervals import Interval, symmetric_interval


def read_cost_matrix(uri: str, class_names: Sequence[str]) -> np.ndarray:
    """Read a CSV file: the first row names the predicted classes, the first column the true ones, both in any order.

    Returns:
        float64 (num_classes, num_classes): the cost of an example by true label (row) and predicted label (column).

    Raises:
        UsageError: it is missing, has not every class once, or something else than numbers.
    """
    mend = "The first row names the predicted classes, the first column the true ones, the rest are numbers."
    try:
        rows = [row for row in csv.reader(io.StringIO(storage.read_bytes(uri).decode("utf-8-sig"))) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"The cost matrix {uri} can't be read: {error}. {mend}") from None
    if not rows:
        raise UsageError(f"The cost matrix {uri} is empty. {mend}")
    known = set(class_names)
    predicted, true = [_name(text, known) for text in rows[0][1:]], [_name(row[0], known) for row in rows[1:]]
    for what, names in (("row", predicted), ("column", true)):
        if sorted(names) != sorted(class_names):
            odd = [*(set(class_names) ^ set(names)), *(name for name in names if names.count(name) > 1)]
            raise UsageError(
                f"The first {what} of the cost matrix {uri} must name each of the {len(class_names)} classes once, but "
                f"not so {sorted(odd)[0]!r}. {mend}"
            )
    costs = np.empty((len(class_names), len(class_names)))
    labels = {name: label for label, name in enumerate(class_names)}
    for name_of_row, row in zip(true, rows[1:], strict=True):
        if any(text.strip() for text in row[1 + len(predicted) :]):
            raise UsageError(
                f"The cost matrix {uri} has {len(row) - 1} numbers for {name_of_row!r}, expected {len(predicted)}. "
                f"{mend}"
            )
        for name, text in zip(predicted, row[1:] + [""] * len(predicted), strict=False):
            try:
                cost = float(text)
            except ValueError:
                cost = math.nan
            if not math.isfinite(cost):
                where = f"{name_of_row!r} taken for {name!r}"
                raise UsageError(f"The cost matrix {uri} has {text!r} for {where}, which is not a number. {mend}")
            costs[labels[name_of_row], labels[name]] = cost
    return costs


def _name(text: str, known: set[str]) -> str:
    # Blanks around a name are of the file, unless a class is called so.
    return text if text in known else text.strip()


def mean_cost(confusion_matrix: np.ndarray, costs: np.ndarray, confidence: float) -> tuple[float, Interval | None]:
    """The mean cost of an example, and its normal interval; that is None where all examples cost the same."""
    num_examples = int(confusion_matrix.sum())
    mean = float((confusion_matrix * costs).sum()) / num_examples
    variance = float((confusion_matrix * (costs - mean) ** 2).sum()) / max(1, num_examples - 1)
    return mean, symmetric_interval(mean, math.sqrt(variance / num_examples), confidence)
