"""Learning rates by value."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyeyes.training.schedules import scale_at
from manyeyes.training.settings import ScheduleSettings

STEP = 1 / 10


def test_warmup_rises_linearly_and_its_first_step_moves() -> None:
    settings = ScheduleSettings("constant", warmup_epochs=2)
    found = [scale_at(settings, step * STEP, 5, STEP) for step in (0, 9, 19, 20, 49)]
    assert found == pytest.approx([0.05, 0.5, 1, 1, 1])


def test_cosine_goes_from_the_peak_over_the_mean_to_the_final_scale() -> None:
    settings = ScheduleSettings("cosine", warmup_epochs=1, final_scale=0.2)
    assert scale_at(settings, 1, 5, STEP) == pytest.approx(1)
    assert scale_at(settings, 3, 5, STEP) == pytest.approx(0.6)
    assert scale_at(settings, 2, 5, STEP) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert scale_at(settings, 5, 5, STEP) == pytest.approx(0.2)


def test_step_falls_at_its_epochs() -> None:
    settings = ScheduleSettings("step", warmup_epochs=0, step_epochs=(2, 4), step_scale=0.1)
    found = [scale_at(settings, position, 6, STEP) for position in (0, 1.9, 2, 3.9, 4, 5.9)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_one_cycle_rises_to_the_peak_and_falls() -> None:
    settings = ScheduleSettings("one_cycle", rise_share=0.25, initial_scale=0.1, final_scale=0)
    found = [scale_at(settings, position, 8, STEP) for position in (0, 1, 2, 5, 8)]
    assert found == pytest.approx([0.1, 0.55, 1, 0.5, 0])


@given(
    name=st.sampled_from(["constant", "cosine", "one_cycle"]),
    warmup=st.floats(0, 20),
    epochs=st.integers(1, 10),
    share=st.floats(0, 1, exclude_max=True),
)
def test_no_schedule_leaves_the_range_from_0_to_the_peak(name, warmup, epochs, share) -> None:
    scale = scale_at(ScheduleSettings(name, warmup_epochs=warmup), share * epochs, epochs, STEP)
    assert 0 < scale <= 1
