from __future__ import annotations

import contextlib
import dataclasses
import re
import signal
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyeyes import storage
from manyeyes.data import reading
from manyeyes.data.mix import Mix
from manyeyes.data.pipeline import InputPipeline
from manyeyes.errors import DatasetError, UsageError
from manyeyes.imaging.augment import Augmentation, training_view
from manyeyes.imaging.preprocessing import Preprocessing
from patience import wait_until

AUGMENTATION = Augmentation(flip_horizontal=0.5, rotate_degrees=10, shift=0.1, brightness=0.2)
MIX = Mix(mixup=0.4, cutmix=1.0)
some = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def pixels(count, shape=(6, 5, 1), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), np.uint8)


def groups_of(count, size):
    return [min(size, count - start) for start in range(0, count, size)]


def photos(count, seed=0):
    rng = np.random.default_rng(seed)
    encoded = []
    for _ in range(count):
        height, width = rng.integers(20, 50, 2)
        image = cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (5, 5), 2)
        encoded.append(cv2.imencode(".jpg", image)[1].tobytes())
    return encoded


def kept(batches):
    """Copies, as buffers are reused."""
    return [dataclasses.replace(batch, images=batch.images.copy()) for batch in batches]


def same(first, second):
    for field in dataclasses.fields(first):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype, field.name
            assert np.array_equal(a, b), field.name
        else:
            assert a == b, field.name


def input_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("manyeyes-")]


@pytest.fixture(scope="module")
def raw(write_dataset):
    """103 images in row groups of 10."""
    return write_dataset(pixels(103), row_group_rows=groups_of(103, 10))


@pytest.fixture(scope="module")
def raw_pixels():
    return pixels(103)


@pytest.fixture(scope="module")
def jpeg(write_dataset):
    """31 photos of several sizes in row groups of 5."""
    return write_dataset(photos(31), row_group_rows=groups_of(31, 5))


SIZE = Preprocessing.for_size(16, 16)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30], ids=["by window", "resident"])
@some
@given(count=st.integers(1, 40), part=st.integers(1, 7), world_size=st.integers(1, 5), rows=st.integers(1, 12))
def test_every_example_is_seen_exactly_once_per_epoch(write_dataset, cache_bytes, count, part, world_size, rows):
    images = pixels(count)
    dataset = write_dataset(images, row_group_rows=groups_of(count, rows))
    seen = []
    for rank in range(world_size):
        pipeline = InputPipeline(
            dataset,
            "train",
            global_batch_size=part * world_size,
            rank=rank,
            world_size=world_size,
            cache_bytes=cache_bytes,
            window=2,
        )
        steps = 0
        for batch in pipeline.batches(epoch=1):
            assert np.array_equal(batch.images, images[batch.example_indices])
            assert np.array_equal(batch.labels, batch.example_indices % 3)
            assert batch.global_size == min(part * world_size, count - steps * part * world_size)
            assert (batch.epoch, batch.step) == (1, steps)
            seen += batch.example_indices.tolist()
            steps += 1
        assert steps == pipeline.steps_per_epoch
    assert sorted(seen) == list(range(count))


@some
@given(part=st.integers(1, 9), world_size=st.integers(2, 5), mixed=st.booleans(), resident=st.booleans())
def test_the_workers_parts_joined_are_the_batch_of_one_worker(raw, part, world_size, mixed, resident):
    def batches(rank, world_size):
        return kept(
            InputPipeline(
                raw,
                "train",
                global_batch_size=batch_size,
                augmentation=AUGMENTATION,
                mix=MIX if mixed else None,
                rank=rank,
                world_size=world_size,
                cache_bytes=1 << 30 if resident else 0,
                window=3,
            ).batches(2)
        )

    batch_size = part * world_size
    alone = batches(0, 1)
    for whole, *parts in zip(alone, *(batches(rank, world_size) for rank in range(world_size)), strict=True):
        joined = {
            name: None if getattr(whole, name) is None else np.concatenate([getattr(part, name) for part in parts])
            for name in ("images", "labels", "example_indices", "labels_b", "lam")
        }
        same(dataclasses.replace(parts[0], part_sizes=whole.part_sizes, **joined), whole)


@some
@given(size=st.integers(1, 6), num_parts=st.integers(1, 6), world_size=st.integers(1, 6), mixed=st.booleans())
def test_parts_of_a_batch_are_the_same_on_any_number_of_workers(raw, size, num_parts, world_size, mixed):
    def parts_of_each_batch(world_size):
        pipelines = [
            InputPipeline(
                raw,
                "train",
                global_batch_size=size * num_parts,
                augmentation=AUGMENTATION,
                mix=MIX if mixed else None,
                rank=rank,
                world_size=world_size,
                num_parts=num_parts,
                window=3,
            )
            for rank in range(world_size)
        ]
        batches = zip(*(kept(pipeline.batches(1)) for pipeline in pipelines), strict=True)
        return [[part for batch in of_ranks for part in batch.parts()] for of_ranks in batches]

    for ours, expected in zip(parts_of_each_batch(min(world_size, num_parts)), parts_of_each_batch(1), strict=True):
        assert len(ours) == num_parts
        for part, expected_part in zip(ours, expected, strict=True):
            same(part, expected_part)


@pytest.mark.parametrize("kind", ["raw", "jpeg"])
def test_the_number_of_threads_and_the_memory_change_no_byte(kind, raw, jpeg):
    dataset, preprocessing = (raw, None) if kind == "raw" else (jpeg, SIZE)
    results = [
        kept(
            InputPipeline(
                dataset,
                "train",
                global_batch_size=20,
                augmentation=AUGMENTATION,
                preprocessing=preprocessing,
                mix=MIX,
                num_threads=num_threads,
                prefetch=prefetch,
                cache_bytes=cache_bytes,
                window=2,
            ).batches(0)
        )
        for num_threads, prefetch, cache_bytes in [(1, 1, 0), (7, 1, 0), (3, 6, 1 << 30)]
    ]
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            same(first, second)


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30], ids=["by window", "resident"])
def test_a_start_in_the_middle_is_the_tail_of_the_epoch_bit_for_bit(raw, cache_bytes):
    def pipeline():
        return InputPipeline(
            raw, "train", global_batch_size=8, augmentation=AUGMENTATION, mix=MIX, cache_bytes=cache_bytes, window=2
        )

    whole = kept(pipeline().batches(3))
    for start_step in (0, 1, 5, 12, 13):
        tail = kept(pipeline().batches(3, start_step))
        for first, second in zip(tail, whole[start_step:], strict=True):
            same(first, second)


@pytest.fixture
def read_row_groups(monkeypatch):
    """The numbers of the row groups that are read, as they are read."""
    numbers = []
    original = reading.read_row_group

    def read(dataset, split, number):
        numbers.append(number)
        return original(dataset, split, number)

    monkeypatch.setattr(reading, "read_row_group", read)
    return numbers


def test_a_start_in_the_middle_reads_only_the_windows_from_there(raw, read_row_groups):
    pipeline = InputPipeline(raw, "train", global_batch_size=10, cache_bytes=0, window=2)
    windows = [pipeline.order.row_groups(0, window) for window in range(6)]
    position = sum(int(pipeline.split.row_group_rows[row_groups].sum()) for row_groups in windows[:4])
    list(pipeline.batches(0, -(-position // 10)))
    assert sorted(read_row_groups) == sorted([*windows[4], *windows[5]])


def test_each_row_group_is_read_once_per_epoch(raw, read_row_groups):
    list(InputPipeline(raw, "train", global_batch_size=7, cache_bytes=0, window=3).batches(0))
    assert sorted(read_row_groups) == list(range(11))


def test_the_next_window_is_read_before_it_is_needed(raw, read_row_groups):
    pipeline = InputPipeline(raw, "train", global_batch_size=1, prefetch=1, cache_bytes=0, window=3)
    with contextlib.closing(pipeline.batches(0)) as batches:
        next(batches)
        wanted = sorted([*pipeline.order.row_groups(0, 0), *pipeline.order.row_groups(0, 1)])
        wait_until(lambda: sorted(read_row_groups) == wanted)


def test_as_many_batches_as_asked_for_are_made_ahead(raw, monkeypatch):
    made = set()
    original = InputPipeline._make

    def make(self, part, *arguments):
        original(self, part, *arguments)
        made.add(part.step)

    monkeypatch.setattr(InputPipeline, "_make", make)
    with contextlib.closing(InputPipeline(raw, "train", global_batch_size=4, prefetch=3).batches(0)) as batches:
        next(batches)
        wait_until(lambda: made == {0, 1, 2, 3})
        next(batches)
        wait_until(lambda: made == {0, 1, 2, 3, 4})


def test_epochs_differ_in_order_and_in_pixels(raw):
    def by_index(epoch):
        pipeline = InputPipeline(raw, "train", global_batch_size=103, augmentation=AUGMENTATION)
        (batch,) = kept(pipeline.batches(epoch))
        return batch.example_indices, batch.images[np.argsort(batch.example_indices)]

    (first_order, first), (second_order, second) = by_index(0), by_index(1)
    assert not np.array_equal(first_order, second_order)
    assert np.mean((first != second).any(axis=(1, 2, 3))) > 0.9


def test_evaluation_takes_the_rows_in_order_and_as_stored(raw, raw_pixels):
    batches = kept(InputPipeline(raw, "train", global_batch_size=50, shuffle=False).batches(0))
    assert np.array_equal(np.concatenate([batch.images for batch in batches]), raw_pixels)
    assert [len(batch) for batch in batches] == [50, 50, 3]
    assert all(batch.labels_b is None and batch.lam is None for batch in batches)


def test_photos_of_several_sizes_become_what_the_model_takes(jpeg):
    pipeline = InputPipeline(jpeg, "train", global_batch_size=10, preprocessing=SIZE, augmentation=AUGMENTATION)
    assert pipeline.image_shape == (16, 16, 3)
    encoded = photos(31)
    for batch in pipeline.batches(4):
        for image, index in zip(batch.images, batch.example_indices.tolist(), strict=True):
            assert np.array_equal(image, training_view(encoded[index], SIZE, AUGMENTATION, 0, 4, index))


def test_without_augmentation_photos_are_only_preprocessed(jpeg):
    encoded = photos(31)
    for batch in InputPipeline(jpeg, "train", global_batch_size=10, preprocessing=SIZE).batches(0):
        for image, index in zip(batch.images, batch.example_indices, strict=True):
            assert np.array_equal(image, SIZE(encoded[index]))


def test_raw_pixels_can_be_resized_for_the_model(raw, raw_pixels):
    preprocessing = Preprocessing.for_size(9, 12, fit="stretch", channels=1)
    pipeline = InputPipeline(raw, "train", global_batch_size=20, preprocessing=preprocessing)
    assert pipeline.image_shape == (9, 12, 1)
    for batch in pipeline.batches(0):
        for image, index in zip(batch.images, batch.example_indices, strict=True):
            assert np.array_equal(image, preprocessing.apply(raw_pixels[index]))


def test_encoded_images_of_one_size_need_no_preprocessing(write_dataset):
    encoded = [cv2.imencode(".png", image)[1].tobytes() for image in pixels(9, (7, 8, 3))]
    dataset = write_dataset(encoded, image_shape=(7, 8, 3))
    (batch,) = InputPipeline(dataset, "train", global_batch_size=9, shuffle=False).batches(0)
    assert np.array_equal(batch.images[..., ::-1], pixels(9, (7, 8, 3)))


def test_images_of_several_sizes_ask_for_a_size(jpeg):
    with pytest.raises(UsageError, match=r"several sizes.*for_size\(160, 160\)"):
        InputPipeline(jpeg, "train", global_batch_size=4)
    with pytest.raises(UsageError, match="several sizes"):
        InputPipeline(jpeg, "train", global_batch_size=4, preprocessing=dataclasses.replace(SIZE, steps=SIZE.steps[:1]))


def test_bad_settings_are_refused_in_one_line(raw):
    cases = [
        ({"global_batch_size": 100, "world_size": 8}, "global_batch_size=100 is not divisible by the 8 parts"),
        ({"global_batch_size": 4, "world_size": 2, "rank": 2}, "rank=2 is not in"),
        ({"global_batch_size": 4, "prefetch": 0}, "prefetch=0"),
        ({"global_batch_size": 4, "preprocessing": Preprocessing(channels=3)}, "stores pixels with 1 channels"),
    ]
    for arguments, message in cases:
        with pytest.raises(UsageError, match=re.escape(message)):
            InputPipeline(raw, "train", **arguments)
    with pytest.raises(DatasetError, match="no split 'test'"):
        InputPipeline(raw, "test", global_batch_size=4)
    with pytest.raises(UsageError, match="start_step=27"):
        InputPipeline(raw, "train", global_batch_size=4).batches(0, 27)


def test_a_damaged_image_is_named(write_dataset):
    encoded = photos(12)
    encoded[7] = b"\xff\xd8\xff not a photo at all"
    pipeline = InputPipeline(write_dataset(encoded), "train", global_batch_size=4, preprocessing=SIZE)
    with pytest.raises(DatasetError, match=r"images/000007\.jpg \(example 7 of split 'train'\) can't be used"):
        list(pipeline.batches(0))
    assert input_threads() == []


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30], ids=["by window", "resident"])
def test_a_damaged_row_group_is_named(write_dataset, cache_bytes):
    dataset = write_dataset(pixels(60, (8, 8, 3)), row_group_rows=groups_of(60, 20))
    (shard,) = dataset.manifest.shards
    content = bytearray(storage.read_bytes(dataset.shard_uri(shard)))
    content[len(content) // 2] ^= 1
    storage.write_bytes(dataset.shard_uri(shard), bytes(content))
    pipeline = InputPipeline(dataset, "train", global_batch_size=4, cache_bytes=cache_bytes)
    with pytest.raises(DatasetError, match="fails its checksum in row group 1"):
        list(pipeline.batches(0))
    assert input_threads() == []


@pytest.mark.parametrize("cache_bytes", [0, 1 << 30], ids=["by window", "resident"])
def test_leaving_early_stops_all_threads(raw, cache_bytes):
    pipeline = InputPipeline(raw, "train", global_batch_size=4, augmentation=AUGMENTATION, cache_bytes=cache_bytes)
    for batch in pipeline.batches(0):
        assert len(batch) == 4
        assert input_threads()
        break
    assert input_threads() == []

    with pytest.raises(KeyboardInterrupt), contextlib.closing(pipeline.batches(0)) as batches:
        next(batches)
        raise KeyboardInterrupt
    assert input_threads() == []

    list(pipeline.batches(0))
    assert input_threads() == []


def test_ctrl_c_ends_the_process_at_once(raw):
    script = f"""
from manyeyes.data.dataset import Dataset
from manyeyes.data.pipeline import InputPipeline
pipeline = InputPipeline(Dataset({raw.uri!r}), "train", global_batch_size=1, cache_bytes=0)
print("ready", flush=True)
epoch = 0
while True:
    for batch in pipeline.batches(epoch):
        epoch += 1
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert errors.endswith(b"KeyboardInterrupt\n")


def test_a_batch_is_valid_until_the_batch_after_the_next_is_asked_for(raw, raw_pixels):
    batches = InputPipeline(raw, "train", global_batch_size=4, prefetch=2).batches(0)
    previous = next(batches)
    for batch in batches:
        for held in (previous, batch):
            assert np.array_equal(held.images, raw_pixels[held.example_indices])
        previous = batch


def test_memory_is_bounded_by_the_windows_and_the_batches_ahead(write_dataset):
    images = pixels(640, (64, 64, 3))
    dataset = write_dataset(images, row_group_rows=groups_of(640, 16))
    pipeline = InputPipeline(dataset, "train", global_batch_size=16, cache_bytes=0, window=2, prefetch=2)
    before = pa.total_allocated_bytes()
    most = 0
    for _ in pipeline.batches(0):
        most = max(most, pa.total_allocated_bytes() - before)
    # Three batches of half a window each touch at most three windows, and one more is read ahead.
    window_bytes = images.nbytes / 20
    assert window_bytes < most < 4.5 * window_bytes
    assert pa.total_allocated_bytes() - before < window_bytes
