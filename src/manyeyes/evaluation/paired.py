"""Two recipes on the same folds: paired tests over folds, and over examples."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from manyeyes.errors import DataError
from manyeyes.evaluation.crossval import FIGURES, load_crossval, require_same_folds, right_by_path
from manyeyes.evaluation.resampling import McNemar, PairedTest, mcnemar, paired_test


@dataclass(frozen=True)
class Comparison:
    """How two cross-validations differ.

    Attributes:
        first, second: their directories.
        figures: by name: first - second over the folds, by the corrected resampled t test.
        mcnemar: over the held-out examples of the first repeat.
    """

    first: str
    second: str
    figures: dict[str, PairedTest]
    mcnemar: McNemar


def compare(first: str, second: str, confidence: float = 0.95) -> Comparison:
    """Compare two cross-validations on the same folds.

    Args:
        first, second: directories that `crossval` wrote.

    Raises:
        UsageError: see require_same_folds.
        DataError: their predictions are not of the same examples.
    """
    a, b = load_crossval(first), load_crossval(second)
    require_same_folds(a.dataset_fingerprint, a.folds_fingerprint, second)
    pairs = []
    for one, other in itertools.zip_longest(right_by_path(first), right_by_path(second)):
        if one is None or other is None or one[0] != other[0]:
            raise DataError(f"{first} and {second} hold predictions of other examples. Were they changed? Start again.")
        pairs.append((one[1], other[1]))
    both = np.array(pairs, bool).reshape(-1, 2)
    return Comparison(
        first,
        second,
        {
            name: paired_test(
                [fold.figures[name] for fold in a.folds],
                [fold.figures[name] for fold in b.folds],
                a.test_share,
                confidence,
            )
            for name in FIGURES
        },
        mcnemar(both[:, 0], both[:, 1]),
    )
