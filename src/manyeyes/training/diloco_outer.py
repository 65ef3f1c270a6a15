"""The driver's arithmetic of DiLoCo, in NumPy: averages over slices, the outer optimizer, averaged weights.

Elementwise operations in a fixed order, so that every machine comes to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

Named = Mapping[str, np.ndarray]


def mean_of(arrays_of_slices: Iterable[Named]) -> dict[str, np.ndarray]:
    """The mean of arrays by key, added in the order in which they come; empty where none comes."""
    total: dict[str, np.ndarray] = {}
    number = 0
    for arrays in arrays_of_slices:
        number += 1
        total = {key: total[key] + array if total else array for key, array in arrays.items()}
    return {key: array / array.dtype.type(number) for key, array in total.items()}


class OuterOptimizer:
    """SGD with Nesterov's momentum on pseudogradients: v = m * v + g, then w = w - lr * (g + m * v).

    With learning_rate=1 and momentum=0 the weights become the average of those of the slices: local SGD.

    Attributes:
        momentum: v by key.
        num_rounds: steps it did.
    """

    def __init__(self, learning_rate: float, momentum: float, weights: Named) -> None:
        self._learning_rate = learning_rate
        self._decay = momentum
        self.momentum = {key: np.zeros_like(array) for key, array in weights.items()}
        self.num_rounds = 0

    def reset(self) -> None:
        """Forget the momentum."""
        self.momentum = {key: np.zeros_like(array) for key, array in self.momentum.items()}

    def step(self, weights: Named, pseudogradients: Named) -> dict[str, np.ndarray]:
        """The weights after one step."""
        self.num_rounds += 1
        new = {}
        for key, weight in weights.items():
            scalar = weight.dtype.type
            gradient = pseudogradients[key].astype(weight.dtype, copy=False)
            velocity = self.momentum[key] = scalar(self._decay) * self.momentum[key] + gradient
            new[key] = weight - scalar(self._learning_rate) * (gradient + scalar(self._decay) * velocity)
        return new


def moved_average(
    average: Named, weights: Named, decay: float, global_step: int, num_steps: int
) -> dict[str, np.ndarray]:
    """What step.update_average comes to after `num_steps` steps that start with `global_step`, all with `weights`."""
    kept = 1.0
    for step in range(global_step, global_step + num_steps):
        kept *= min(decay, (1 + step) / (10 + step))
    return {key: old - old.dtype.type(1 - kept) * (old - weights[key]) for key, old in average.items()}
