"""Batches without waiting for them: an idle model takes what is there; what comes meanwhile is the next batch.

Each thread takes items in the order in which they came, prepares them (the GIL is free while an image is decoded) and
lays them down as ready. Whoever finds the model free then runs it on all that is ready, until nothing is. So an item
that comes alone is prepared and run by one thread, without a handover and without waiting for company.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")
Prepared = TypeVar("Prepared")

_log = logging.getLogger(__name__)
_STOP = object()
# Of the best throughput that the curve shows; what a larger batch gains beyond it costs latency.
_ENOUGH_OF_THE_BEST = 0.95
# A batch that is over so soon makes nobody wait; what surrounds the call is then paid for by more images.
_SOON_SECONDS = 0.005


def choose_batch_size(latency_curve: Sequence[tuple[int, float]], max_batch_size: int = 32) -> int:
    """Return the cap for batches of a model.

    It is the largest size that takes up to 5 ms, or where it is larger the smallest one that gives 95 % of the best
    throughput.

    Args:
        latency_curve: (batch size, seconds of one call), measured.
    """
    curve = [point for point in latency_curve if point[0] <= max_batch_size]
    best = max(size / seconds for size, seconds in curve)
    worthwhile = min(size for size, seconds in curve if size / seconds >= _ENOUGH_OF_THE_BEST * best)
    return max([worthwhile, *(size for size, seconds in curve if seconds <= _SOON_SECONDS)])


class Batcher(Generic[Item, Prepared]):
    """Runs items on threads of its own in batches.

    Args:
        prepare: turns an item into what is run, on any thread; None if there is nothing to run: the item is done.
            It must not raise.
        run: takes the items of a batch and what was prepared for them; one call at a time.
        on_done: called on a thread with items that are done, and the exception if `run` raised one.
        max_batch_size: the most that `run` is given.
        max_waiting: items that may wait to be taken by a thread.
        num_threads: that prepare.
        start_thread: called first on each thread; the constructor returns when all have returned.
    """

    def __init__(
        self,
        prepare: Callable[[Item], Prepared | None],
        run: Callable[[list[Item], list[Prepared]], None],
        on_done: Callable[[list[Item], Exception | None], None],
        *,
        max_batch_size: int,
        max_waiting: int,
        num_threads: int = 1,
        start_thread: Callable[[], None] | None = None,
        name: str = "recognise",
    ) -> None:
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self._prepare = prepare
        self._run = run
        self._on_done = on_done
        self._waiting: SimpleQueue = SimpleQueue()
        self._ready: deque[tuple[Item, Prepared]] = deque()
        self._model_is_free = threading.Lock()
        self._closing = False
        self._submitting = threading.Lock()
        started = threading.Barrier(num_threads + 1)
        self._threads = [
            threading.Thread(target=self._work, args=(started, start_thread), name=f"{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()
        started.wait()

    @property
    def num_waiting(self) -> int:
        """Items that no thread has taken yet."""
        return self._waiting.qsize()

    def submit(self, item: Item) -> bool:
        """Put `item` into the queue; False if that is full or closed. Never blocks."""
        with self._submitting:
            if self._closing or self._waiting.qsize() >= self.max_waiting:
                return False
            self._waiting.put(item)
        return True

    def close(self) -> None:
        """Take nothing more, finish everything that was taken, and end the threads."""
        with self._submitting:
            if not self._closing:
                self._closing = True
                for _ in self._threads:
                    self._waiting.put(_STOP)
        for thread in self._threads:
            thread.join()

    def _work(self, started: threading.Barrier, start_thread: Callable[[], None] | None) -> None:
        try:
            if start_thread is not None:
                start_thread()
        finally:
            started.wait()
        while True:
            items, stop = self._take()
            nothing_to_run = []
            for item in items:
                prepared = self._prepare(item)
                if prepared is None:
                    nothing_to_run.append(item)
                else:
                    self._ready.append((item, prepared))
            if nothing_to_run:
                self._on_done(nothing_to_run, None)
            self._run_what_is_ready()
            if stop:
                return

    def _take(self) -> tuple[list[Item], bool]:
        """Wait for an item; take with it this thread's share of what waits."""
        first = self._waiting.get()
        if first is _STOP:
            return [], True
        items = [first]
        share = min(self.max_batch_size, -(-(self._waiting.qsize() + 1) // len(self._threads)))
        while len(items) < share:
            try:
                item = self._waiting.get_nowait()
            except Empty:  # another thread was faster
                break
            if item is _STOP:
                return items, True
            items.append(item)
        return items, False

    def _run_what_is_ready(self) -> None:
        # Whoever lays something down looks afterwards whether the model is free, and whoever frees it looks afterwards
        # whether something lies there: so nothing is left lying.
        while self._ready and self._model_is_free.acquire(blocking=False):
            try:
                batch: list[tuple[Item, Prepared]] = []
                while self._ready and len(batch) < self.max_batch_size:
                    batch.append(self._ready.popleft())
                if not batch:
                    continue
                items = [item for item, _ in batch]
                failed = None
                try:
                    self._run(items, [prepared for _, prepared in batch])
                except Exception as error:
                    _log.exception("A batch of %d failed", len(items))
                    failed = error
                self._on_done(items, failed)
            finally:
                self._model_is_free.release()
