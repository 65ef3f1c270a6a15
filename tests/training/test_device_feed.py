"""The copies of batches to a GPU, with this machine's CPU in the GPU's place; on a GPU: test_gpu.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator

import numpy as np
import pytest
import tensorflow as tf

from manyeyes.data.dataset import Dataset
from manyeyes.data.mix import Mix
from manyeyes.data.pipeline import Batch, InputPipeline
from manyeyes.training import device_feed
from manyeyes.training.device_feed import on_device


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: ["GPU"])
    monkeypatch.setattr(device_feed, "_GPU", "CPU:0")


@pytest.fixture
def pipeline(small_dataset: str) -> InputPipeline:
    return InputPipeline(Dataset(small_dataset), "train", global_batch_size=10, mix=Mix(mixup=0.3), prefetch=1)


def test_batches_that_are_copied_ahead_are_those_of_the_pipeline(as_if_on_a_gpu: None, pipeline: InputPipeline) -> None:
    num_batches = 0
    # Each is compared while it is in use, as its buffer is used again later.
    for found, expected in zip(on_device(pipeline.batches(1, 3)), pipeline.batches(1, 3), strict=True):
        assert isinstance(found.images, tf.Tensor)
        assert found.images.dtype == tf.uint8
        for part, expected_part in zip(found.parts(), expected.parts(), strict=True):
            assert np.array_equal(part.images, expected_part.images)
            assert np.array_equal(part.example_indices, expected_part.example_indices)
        assert (found.step, found.global_size) == (expected.step, expected.global_size)
        assert np.array_equal(found.lam, expected.lam)  # type: ignore[arg-type]
        num_batches += 1
    assert num_batches == 7


def test_an_epoch_that_is_left_stops_the_threads_that_copy_and_decode(
    as_if_on_a_gpu: None, pipeline: InputPipeline
) -> None:
    before = threading.active_count()
    with contextlib.closing(on_device(pipeline.batches(0))) as batches:
        next(batches)
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_a_damaged_image_is_reported_after_the_batches_before_it(as_if_on_a_gpu: None) -> None:
    is_closed = []

    def broken() -> Generator[Batch, None, None]:
        try:
            yield Batch(np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, np.int32), np.zeros(1), 0, 0, 1)
            raise ValueError("damaged")
        finally:
            is_closed.append(True)

    batches = on_device(broken())
    assert len(next(batches)) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(batches)
    assert is_closed


def test_without_a_gpu_batches_are_passed_on_as_they_come(pipeline: InputPipeline) -> None:
    batch = next(batches := on_device(pipeline.batches(0)))
    assert isinstance(batch.images, np.ndarray)
    batches.close()
