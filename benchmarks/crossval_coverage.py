"""How often the interval of a cross-validation contains what it is about: the accuracy to expect of the recipe.

    python benchmarks/crossval_coverage.py [--simulations 500]

Data sets are drawn from a known distribution; learners are one that changes little with its examples (linear
discriminant) and two that change much (nearest neighbour, decision tree). The truth is the mean accuracy, on fresh
examples, of many models that are trained on as many examples as those of the folds. Methods:

- plain t: standard error s / sqrt(n) over the n figures of the folds, as if they were independent.
- corrected t: ours, evaluation.resampling; the standard error is s * sqrt(1 / n + n_test / n_train).
- pooled Wilson: of the held-out predictions of the first repeat, which `manyeyes crossval` prints beside it; it takes
  the models as given.

Nominal: 95 %.
"""

from __future__ import annotations

import argparse

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import t
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import KNeighborsClassifier
from sklearn.tree import DecisionTreeClassifier

from manyeyes.data.splits import kfold
from manyeyes.evaluation.intervals import wilson_interval
from manyeyes.evaluation.resampling import resampled

LEARNERS = {
    "linear discriminant": LinearDiscriminantAnalysis,
    "nearest neighbour": lambda: KNeighborsClassifier(1),
    "decision tree": lambda: DecisionTreeClassifier(max_depth=6, random_state=0),
}
# examples, dimensions, distance of the classes, classes, folds, repeats
CASES = ((200, 5, 1.5, 2, 5, 1), (200, 5, 1.5, 2, 10, 1), (300, 8, 2.0, 4, 5, 3))


def draw_examples(draw: np.random.Generator, num: int, dimensions: int, distance: float, num_classes: int):
    labels = np.arange(num) % num_classes
    centres = np.zeros((num_classes, dimensions))
    centres[np.arange(num_classes), np.arange(num_classes)] = distance
    return draw.normal(size=(num, dimensions)) + centres[labels], labels


def simulate(name: str, case: tuple, num_simulations: int, draw: np.random.Generator) -> dict[str, float]:
    """The share of simulations in which each interval contains the truth."""
    num, dimensions, distance, num_classes, folds, repeats = case
    learner = LEARNERS[name]
    fresh = draw_examples(draw, 4000, dimensions, distance, num_classes)
    of_fold = num - num // folds
    truth = np.mean(
        [
            learner().fit(*draw_examples(draw, of_fold, dimensions, distance, num_classes)).score(*fresh)
            for _ in range(300)
        ]
    )
    hits = dict.fromkeys(("plain t", "corrected t", "pooled Wilson"), 0)
    for simulation in range(num_simulations):
        x, y = draw_examples(draw, num, dimensions, distance, num_classes)
        figures, num_right = [], 0
        for repeat in range(repeats):
            fold_of = kfold(y, None, folds, 1000 * simulation + repeat)
            for fold in range(folds):
                held_out = fold_of == fold
                right = learner().fit(x[~held_out], y[~held_out]).predict(x[held_out]) == y[held_out]
                figures.append(float(right.mean()))
                num_right += int(right.sum()) if repeat == 0 else 0
        half_width = t.ppf(0.975, len(figures) - 1) * np.std(figures, ddof=1) / np.sqrt(len(figures))
        hits["plain t"] += abs(np.mean(figures) - truth) <= half_width
        found = resampled(figures, 1 / (folds - 1))
        hits["corrected t"] += found.low <= truth <= found.high
        interval = wilson_interval(num_right, num)
        hits["pooled Wilson"] += interval.low <= truth <= interval.high
    return {method: count / num_simulations for method, count in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--simulations", type=int, default=500)
    arguments = parser.parse_args()
    draw = np.random.default_rng(0)
    table = Table("learner", "examples", "folds x repeats", "plain t", "corrected t", "pooled Wilson")
    for name in LEARNERS:
        for case in CASES:
            found = simulate(name, case, arguments.simulations, draw)
            shown = [f"{share:.1%}" for share in found.values()]
            table.add_row(name, str(case[0]), f"{case[4]} x {case[5]}", *shown)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
