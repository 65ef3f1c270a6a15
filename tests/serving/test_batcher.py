"""The laws of the batcher."""

from __future__ import annotations

import threading
import time
from queue import SimpleQueue

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes.serving.batcher import Batcher, choose_batch_size


class Recorder:
    """What a batcher did: batches in order, and how often each item was done."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.done: list[int] = []
        self.failed: list[int] = []
        self._lock = threading.Lock()

    def on_done(self, items: list[int], error: Exception | None) -> None:
        with self._lock:
            (self.done if error is None else self.failed).extend(items)


@settings(max_examples=60, deadline=None)
@given(
    num_items=st.integers(0, 60),
    max_batch_size=st.integers(1, 9),
    num_threads=st.integers(1, 4),
    pauses=st.lists(st.sampled_from([0.0, 0.0, 0.0002, 0.001]), min_size=1, max_size=8),
    dropped=st.sets(st.integers(0, 59)),
)
def test_every_item_is_done_exactly_once_in_batches_under_the_cap_and_one_at_a_time(
    num_items: int, max_batch_size: int, num_threads: int, pauses: list[float], dropped: set[int]
) -> None:
    record = Recorder()
    running = threading.Lock()

    def run(items: list[int], prepared: list[int]) -> None:
        assert running.acquire(blocking=False), "two batches at once"
        assert prepared == [-item for item in items]
        time.sleep(pauses[len(record.batches) % len(pauses)])
        record.batches.append(items)
        running.release()

    batcher = Batcher(
        lambda item: None if item in dropped else -item,
        run,
        record.on_done,
        max_batch_size=max_batch_size,
        max_waiting=100,
        num_threads=num_threads,
    )
    for item in range(num_items):
        assert batcher.submit(item)
        time.sleep(pauses[item % len(pauses)] / 4)
    batcher.close()
    assert sorted(record.done) == list(range(num_items))
    assert not record.failed
    ran = [item for batch in record.batches for item in batch]
    assert sorted(ran) == [item for item in range(num_items) if item not in dropped]
    assert all(1 <= len(batch) <= max_batch_size for batch in record.batches)
    if num_threads == 1:
        assert ran == sorted(ran)
    assert not batcher.submit(0)


@settings(max_examples=40, deadline=None)
@given(arrivals=st.lists(st.integers(0, 12), min_size=1, max_size=6), max_batch_size=st.integers(1, 8))
def test_a_free_model_takes_what_waits_at_once_up_to_the_cap(arrivals: list[int], max_batch_size: int) -> None:
    record = Recorder()
    begun: SimpleQueue[list[int]] = SimpleQueue()
    may_end: SimpleQueue[None] = SimpleQueue()

    def run(items: list[int], prepared: list[int]) -> None:
        begun.put(items)
        may_end.get(timeout=30)

    batcher = Batcher(lambda item: item, run, record.on_done, max_batch_size=max_batch_size, max_waiting=1000)
    number, expected_waiting = 1, 0
    assert batcher.submit(0)
    assert begun.get(timeout=30) == [0]  # alone, without waiting for company
    for arrived in arrivals:
        # While the model works on the last batch, `arrived` more come.
        for _ in range(arrived):
            assert batcher.submit(number)
            number += 1
        expected_waiting += arrived
        may_end.put(None)
        if not expected_waiting:
            # Nothing waits, so the model rests, and who comes next is taken at once.
            assert batcher.submit(number)
            number, expected_waiting = number + 1, 1
        batch = begun.get(timeout=30)
        taken = min(expected_waiting, max_batch_size)
        assert batch == list(range(number - expected_waiting, number - expected_waiting + taken))
        expected_waiting -= taken
    for _ in range(1000):
        may_end.put(None)
    batcher.close()
    assert record.done == list(range(number))


def test_a_full_queue_refuses_and_what_it_took_is_still_done() -> None:
    record = Recorder()
    gate = threading.Event()
    begun = threading.Event()

    def run(items: list[int], prepared: list[int]) -> None:
        begun.set()
        gate.wait(30)

    batcher = Batcher(lambda item: item, run, record.on_done, max_batch_size=2, max_waiting=3)
    assert batcher.submit(0)
    assert begun.wait(30)
    assert [batcher.submit(item) for item in (1, 2, 3, 4, 5)] == [True, True, True, False, False]
    assert batcher.num_waiting == 3
    gate.set()
    batcher.close()
    assert record.done == [0, 1, 2, 3]


def test_a_batch_that_fails_fails_alone() -> None:
    record = Recorder()

    def run(items: list[int], prepared: list[int]) -> None:
        if 1 in items:
            raise ValueError("this one is bad")

    batcher = Batcher(lambda item: item, run, record.on_done, max_batch_size=1, max_waiting=10)
    for item in range(4):
        assert batcher.submit(item)
    batcher.close()
    assert (record.done, record.failed) == ([0, 2, 3], [1])


def test_while_one_thread_runs_the_model_others_prepare() -> None:
    record = Recorder()
    prepared = threading.Semaphore(0)
    gate = threading.Event()

    def prepare(item: int) -> int:
        prepared.release()
        return item

    batcher = Batcher(
        prepare,
        lambda items, _: gate.wait(30) and None,
        record.on_done,
        max_batch_size=4,
        max_waiting=10,
        num_threads=2,
    )
    for item in range(4):
        assert batcher.submit(item)
    # All four are prepared although the model has not let go of the first.
    for _ in range(4):
        assert prepared.acquire(timeout=30)
    gate.set()
    batcher.close()
    assert sorted(record.done) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "curve, size",
    [
        ([(1, 1.0)], 1),
        ([(1, 1.0), (2, 2.0), (4, 4.0)], 1),
        ([(1, 1.0), (2, 1.1), (4, 1.3), (8, 2.6), (16, 5.2)], 4),
        ([(1, 1.0), (2, 1.0), (4, 1.0)], 4),
        ([(1, 0.001), (2, 0.002), (4, 0.004), (8, 0.008)], 4),
        ([(1, 0.0002), (2, 0.0003), (64, 0.004)], 2),
    ],
)
def test_the_cap_is_what_is_over_soon_or_the_smallest_batch_that_is_nearly_the_fastest(
    curve: list[tuple[int, float]], size: int
) -> None:
    assert choose_batch_size(curve) == size
