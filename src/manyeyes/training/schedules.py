"""Learning rate schedules: pure functions of how far the run is.

`position` counts epochs, with fractions: the step s (from 0) of epoch e has position e + s / steps_per_epoch.
"""

from __future__ import annotations

import math

from manyeyes.training.settings import ScheduleSettings


def scale_at(settings: ScheduleSettings, position: float, epochs: int, step_epochs: float) -> float:
    """The factor on the peak learning rate at `position`.

    With w warm-up epochs: `(position + step_epochs) / w` up to 1 while position < w, so that the first step moves too.
    With t = (position - w) / (epochs - w) and f = final_scale, after the warm-up:
        constant: 1
        cosine: f + (1 - f) * (1 + cos(pi * t)) / 2
        step: step_scale ** (number of step_epochs that are <= position)
    one_cycle, with t = position / epochs, has half a cosine from initial_scale to 1 up to t = rise_share, then half a
    cosine from 1 to final_scale.

    Args:
        position: in [0, epochs).
        epochs: length of the run.
        step_epochs: length of one step in epochs, 1 / steps_per_epoch.
    """
    if settings.name == "one_cycle":
        share = position / epochs
        if share < settings.rise_share:
            return _half_cosine(settings.initial_scale, 1.0, share / settings.rise_share)
        return _half_cosine(1.0, settings.final_scale, (share - settings.rise_share) / (1 - settings.rise_share))
    warmup = min(settings.warmup_epochs, epochs)
    if position < warmup:
        return min(1.0, (position + step_epochs) / warmup)
    if settings.name == "cosine":
        return _half_cosine(1.0, settings.final_scale, (position - warmup) / (epochs - warmup))
    if settings.name == "step":
        return settings.step_scale ** sum(epoch <= position for epoch in settings.step_epochs)
    return 1.0


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2
