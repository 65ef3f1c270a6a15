"""Recognises the images of a stream as they come: never behind, with its latency told."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import numpy as np

from manyeyes.errors import ImageError, UsageError
from manyeyes.recognition.predictor import ClassProbability, Predictor
from manyeyes.recognition.stream_sources import Frame, FrameSource

# What the figures "now" are of, and what the percentiles of the end are of.
_RECENT_SECONDS = 5.0
_MAX_LATENCIES = 100_000


@dataclass(frozen=True)
class StreamResult:
    """What became of one frame: an answer, or a reason.

    Attributes:
        frame: its number in the source, from 0.
        name: of the file, in a folder; else "".
        time_seconds: place in a video file; else since the start.
        top_k: the likeliest classes, the likeliest first; smoothed, where that was asked for. () without an answer.
        latency_ms: from the frame being there to its answer.
        reason, detail: why there is no answer; "" where there is one.
    """

    frame: int
    name: str
    time_seconds: float
    top_k: tuple[ClassProbability, ...] = ()
    latency_ms: float = 0.0
    reason: str = ""
    detail: str = ""


@dataclass
class StreamStatistics:
    """Counts and times of a stream; every frame that was read is recognised, failed or dropped.

    Attributes:
        num_recognised: frames with an answer.
        num_failed: frames without one, by reason in `failed`.
        num_dropped: frames of a live source that were replaced by newer ones while the model was busy.
    """

    num_recognised: int = 0
    num_dropped: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    _latencies: deque[float] = field(default_factory=lambda: deque(maxlen=_MAX_LATENCIES))
    _recent: deque[tuple[float, float]] = field(default_factory=deque)

    @property
    def num_failed(self) -> int:
        """Frames that could not be recognised."""
        return sum(self.failed.values())

    def add(self, latency_ms: float) -> None:
        """Count an answer."""
        now = time.perf_counter()
        self.num_recognised += 1
        self._latencies.append(latency_ms)
        self._recent.append((now, latency_ms))
        while self._recent[0][0] < now - _RECENT_SECONDS:
            self._recent.popleft()

    def told(self, *, now: bool = False) -> str:
        """One line for people: of the last seconds, or of all."""
        latencies = [latency for _, latency in self._recent] if now else list(self._latencies)
        seconds = time.perf_counter() - self.started if not self.seconds else self.seconds
        if now:
            seconds = min(seconds, _RECENT_SECONDS)
        rate = len(latencies) / seconds if now else self.num_recognised / max(seconds, 1e-9)
        p50, p95 = percentiles(latencies)
        line = f"{rate:.1f} frames/s, latency p50 {p50:.1f} ms, p95 {p95:.1f} ms; {self.num_recognised:,} recognised"
        line += f", {self.num_dropped:,} dropped" if self.num_dropped else ""
        if self.failed:
            reasons = ", ".join(f"{reason}: {number:,}" for reason, number in sorted(self.failed.items()))
            line += f", {self.num_failed:,} failed ({reasons})"
        return line


def percentiles(latencies: list[float]) -> tuple[float, float]:
    """The median and the 95th percentile; 0 of none."""
    if not latencies:
        return 0.0, 0.0
    ordered = sorted(latencies)
    return statistics.median(ordered), ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]


def watch(
    predictor: Predictor,
    source: FrameSource,
    *,
    on_result: Callable[[StreamResult, Frame], None],
    top_k: int = 5,
    smooth: int = 1,
    max_frames: int | None = None,
    realtime: bool = False,
    stop: threading.Event | None = None,
    statistics: StreamStatistics | None = None,
) -> StreamStatistics:
    """Recognise the frames of `source` until it ends, `stop` is set, or `max_frames` have an answer.

    A live source is read by a thread of its own into a place for one frame: while the model is busy a newer frame
    replaces the one that waits, so that no answer is older than one frame's time and the model's. Of a file or a folder
    every frame is recognised.

    Args:
        on_result: called with what became of each frame, in their order.
        smooth: probabilities are an exponential mean over frames; a new frame has the weight 2 / (smooth + 1), so about
            `smooth` frames count. 1 is none. A frame without an answer changes nothing.
        realtime: play a video file at its own speed, and drop frames as for a live source.
        statistics: to be kept up to date meanwhile; default: new ones.

    Returns:
        The statistics.

    Raises:
        SourceError: the source has nothing, or a live one stays away.
        UsageError: a setting is below 1.
    """
    for name, value in (("top_k", top_k), ("smooth", smooth), ("max_frames", max_frames or 1)):
        if value < 1:
            raise UsageError(f"{name}={value} must be at least 1.")
    stop = stop or threading.Event()
    counts = statistics or StreamStatistics()
    counts.started = time.perf_counter()
    weight = 2 / (smooth + 1)
    mean: np.ndarray | None = None
    drops = source.is_live or realtime
    with contextlib.closing(_newest(source, stop, counts, paced=realtime) if drops else source.frames(stop)) as frames:
        for frame in frames:
            try:
                if isinstance(frame.image, ImageError):
                    raise frame.image
                pixels = predictor.preprocess(frame.image)
            except ImageError as error:
                if source.put_back(frame):
                    continue
                counts.failed[error.reason.value] += 1
                result = StreamResult(
                    frame.index, frame.name, frame.time_seconds, reason=error.reason.value, detail=error.detail
                )
            else:
                probabilities = predictor.probabilities(pixels[None])
                mean = probabilities if mean is None else mean + weight * (probabilities - mean)
                latency_ms = 1e3 * (time.perf_counter() - frame.taken)
                best = predictor.likeliest(mean, top_k)[0].top_k
                counts.add(latency_ms)
                result = StreamResult(frame.index, frame.name, frame.time_seconds, best, latency_ms)
            on_result(result, frame)
            source.done(frame)
            if stop.is_set() or counts.num_recognised == max_frames:
                break
    counts.seconds = time.perf_counter() - counts.started
    return counts


def _newest(
    source: FrameSource, stop: threading.Event, counts: StreamStatistics, *, paced: bool
) -> Generator[Frame, None, None]:
    """Yield the newest frame each time; a thread reads on meanwhile, and counts those that it replaces."""
    slot: deque[Frame] = deque()
    changed = threading.Condition()
    ended: list[BaseException | None] = []
    closing = threading.Event()

    def read() -> None:
        error: BaseException | None = None
        try:
            began = time.perf_counter()
            for frame in source.frames(_Either(stop, closing)):
                if paced and (early := began + frame.time_seconds - time.perf_counter()) > 0 and closing.wait(early):
                    break
                if paced:
                    frame = Frame(frame.index, frame.name, frame.time_seconds, frame.image, time.perf_counter())
                with changed:
                    # What could not be read is told, not replaced.
                    if slot and not isinstance(slot[-1].image, ImageError):
                        slot.pop()
                        counts.num_dropped += 1
                    slot.append(frame)
                    changed.notify()
        except BaseException as caught:  # raised again where the frames are taken
            error = caught
        with changed:
            ended.append(error)
            changed.notify()

    # A camera that hangs must not hold up the end.
    thread = threading.Thread(target=read, name="manyeyes-stream", daemon=True)
    thread.start()
    try:
        while not stop.is_set():
            with changed:
                # In short waits, as a signal only sets `stop`.
                if not slot and not ended:
                    changed.wait(0.1)
                frame = slot.popleft() if slot else None
                over = not slot and frame is None and bool(ended)
            if frame is not None:
                yield frame
            elif over:
                if ended[0] is not None:
                    raise ended[0]
                return
    finally:
        closing.set()
        thread.join(1.0)


class _Either(threading.Event):
    """Set when one of two events is; waits for the second."""

    def __init__(self, first: threading.Event, second: threading.Event) -> None:
        super().__init__()
        self._first = first
        self._second = second

    def is_set(self) -> bool:
        return self._first.is_set() or self._second.is_set()

    def wait(self, timeout: float | None = None) -> bool:
        return self._first.is_set() or self._second.wait(timeout) or self._first.is_set()
