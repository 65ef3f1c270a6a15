"""Odd images: those far outside of what the middle half of the dataset has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from manyeyes.auditing.measuring import Measured

# Tukey's "far out": of a normal distribution two in a million lie beyond.
_FENCE = 3.0


@dataclass(frozen=True)
class Measure:
    """One thing that is measured.

    Attributes:
        name: of the column of Measured.
        low, high: what an image far below or above is called; None: that is no fault.
        least_spread: the quartiles are taken to lie at least so far apart, on the scale of `scaled`: datasets of nearly
            one value would call everything else odd.
        scaled, natural: to the scale on which the fences are, and back.
    """

    name: str
    low: str | None
    high: str | None
    least_spread: float
    scaled: Callable[[np.ndarray], np.ndarray]
    natural: Callable[[float], float]


MEASURES = (
    Measure("pixels", "small", "large", 0.5, np.log2, lambda value: float(2.0**value)),
    Measure("aspect", "narrow", "wide", 0.2, np.log2, lambda value: float(2.0**value)),
    Measure("brightness", "dark", "bright", 8.0, lambda values: values, float),
    Measure("sharpness", "blurred", None, 0.5, lambda values: np.log2(1 + values), lambda value: float(2.0**value - 1)),
)


@dataclass(frozen=True)
class Distribution:
    """How a measure is distributed over the dataset, in its natural unit; beyond the fences lie the outliers."""

    minimum: float
    first_quartile: float
    median: float
    third_quartile: float
    maximum: float
    low_fence: float
    high_fence: float


@dataclass(frozen=True)
class Odd:
    """An outlier: the number of its example, the kind, the value, and how many interquartile ranges it lies out."""

    example: int
    kind: str
    value: float
    distance: float


def find_outliers(measured: Measured) -> tuple[dict[str, Distribution], list[Odd]]:
    """Find the examples beyond the fences: 3 interquartile ranges below the first or above the third quartile.

    Quartiles are values that occur, so the result depends on the examples alone and not on their order.

    Returns:
        The distribution of every measure, and the outliers; in no order that counts.
    """
    distributions: dict[str, Distribution] = {}
    found: list[Odd] = []
    for measure in MEASURES:
        values = getattr(measured, measure.name)
        if not len(values):
            continue
        scaled = measure.scaled(values.astype(np.float64))
        marks = np.quantile(scaled, (0, 0.25, 0.5, 0.75, 1), method="inverted_cdf").tolist()
        spread = max(marks[3] - marks[1], measure.least_spread)
        low, high = marks[1] - _FENCE * spread, marks[3] + _FENCE * spread
        natural = [round(measure.natural(mark), 4) for mark in (*marks, low, high)]
        distributions[measure.name] = Distribution(*natural)
        for kind, beyond, quartile in ((measure.low, scaled < low, marks[1]), (measure.high, scaled > high, marks[3])):
            if kind is not None:
                found += [
                    Odd(row, kind, round(float(values[row]), 4), round(abs(scaled[row] - quartile) / spread, 4))
                    for row in np.flatnonzero(beyond).tolist()
                ]
    return distributions, found
