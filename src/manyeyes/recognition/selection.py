"""Which backend serves a model, on how many threads: measured here, or read from what export measured on such a CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from manyeyes import config
from manyeyes.engines.base import threads_per_worker
from manyeyes.errors import BundleError, ConfigError, MissingExtraError
from manyeyes.recognition.backends import Backend, create_backend
from manyeyes.recognition.bundle import MODEL_NAME, BackendName, Bundle

_log = logging.getLogger(__name__)

_CANDIDATES: tuple[BackendName, ...] = ("openvino", "onnxruntime")
# What a lone request waits for, and what a server under load makes of its queue.
BATCH_SIZES = (1, 8)
# Of one backend and one batch size. The least time is taken: what else runs on the machine only ever adds.
_MEASURE_SECONDS = 0.04
_MIN_REPEATS = 3
# A model that takes less than this for an image on one thread gets one. Others would save a part of it on an idle
# machine; on a busy one the call waits for the last of them to be given a core, and decoding lacks that core.
_ONE_THREAD_SECONDS = 1e-3


@dataclass(frozen=True)
class Timing:
    """How long one backend took on one machine.

    Attributes:
        precision: that it computed in.
        batch_size: images in one call of the model.
        seconds: of one call, the least of several.
        cpu: the name of the machine's processor.
    """

    backend: str
    precision: str
    num_threads: int
    batch_size: int
    seconds: float
    cpu: str


@dataclass(frozen=True)
class Choice:
    """A backend, its threads, and why it was chosen, for people."""

    backend: BackendName
    num_threads: int
    why: str


@functools.cache
def cpu_name() -> str:
    """What the machine calls its processor, with the instructions for small numbers that it has."""
    lines: dict[str, str] = {}
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            lines[name.strip()] = value.strip()
    # Virtual machines give processors of several generations the same name.
    known = ("avx2", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
    has = [flag for flag in known if flag in lines.get("flags", "").split()]
    return " ".join([lines.get("model name", platform.processor() or platform.machine()), *has])


def select_backend(
    bundle: Bundle, backend: BackendName, num_threads: int | None, *, measure: bool = True
) -> tuple[Backend, str]:
    """Compile the model of `bundle` by the backend that is the fastest here.

    What export measured decides where it was done on such a CPU with as many threads; else it is measured now, once per
    process: a small part of a second for a small model.

    Args:
        backend: "auto", or one to use; then only its number of threads is chosen.
        num_threads: to use; default: the better of one and what the engine gave to this process, else all cores.
        measure: False never measures: the choice is then that of the export, whatever its machine, else the first that
            can compile the model, and so the same in all processes of a job.

    Returns:
        The backend, and why it was chosen.

    Raises:
        MissingExtraError, BundleError, UsageError: see create_backend.
    """
    threads = num_threads or threads_per_worker()
    create = functools.partial(create_backend, bundle.read_file(MODEL_NAME), precision=bundle.info.precision)
    recorded = _recorded(bundle, backend)
    if not measure:
        if backend == "auto" and recorded:
            with contextlib.suppress(MissingExtraError):
                return create(backend=choose(recorded).backend, num_threads=threads), "as export measured"
        return create(backend=backend, num_threads=threads), "the first that can compile the model"
    if backend != "auto" and (num_threads is not None or threads == 1):
        return create(backend=backend, num_threads=threads), "it was asked for"

    key = (bundle.info.fingerprint, backend, num_threads, threads)
    if key not in _chosen:
        here = [timing for timing in recorded if timing.cpu == cpu_name()]
        if num_threads is not None:
            here = [timing for timing in here if timing.num_threads == num_threads]
        if max((timing.num_threads for timing in here), default=0) == threads:
            chosen = choose(here)
            _chosen[key] = dataclasses.replace(chosen, why=f"{chosen.why}; export measured it on such a CPU")
    if key in _chosen:
        with contextlib.suppress(MissingExtraError):
            chosen = _chosen[key]
            return create(backend=chosen.backend, num_threads=chosen.num_threads), chosen.why
    compiled = _measured(create, bundle.info.input_shape, backend, num_threads, threads)
    if not compiled:
        # Says why, for all of them.
        return create(backend=backend, num_threads=threads), "the only one"
    chosen = _chosen[key] = choose(timing for _, timings in compiled for timing in timings)
    _log.info("%s: %s", chosen.backend, chosen.why)
    wanted = (chosen.backend, chosen.num_threads)
    return next(found for found, _ in compiled if (found.name, found.num_threads) == wanted), chosen.why


# By model, backend and threads: measured once in a process.
_chosen: dict[Any, Choice] = {}


def _measured(
    create: Callable[..., Backend],
    shape: tuple[int, int, int],
    backend: BackendName,
    num_threads: int | None,
    threads: int,
) -> list[tuple[Backend, list[Timing]]]:
    found = [(each, time_backend(each, shape)) for each in _compiled(create, _names(backend), threads)]
    # A large model takes so much longer on one thread that it is not worth a look.
    fastest = min((timings[0].seconds for _, timings in found), default=math.inf)
    if num_threads is None and threads > 1 and fastest < _ONE_THREAD_SECONDS:
        found += [(each, time_backend(each, shape)) for each in _compiled(create, _names(backend), 1)]
    return found


def measure_backends(
    model: bytes, *, backend: BackendName, precision: Any, shape: tuple[int, int, int]
) -> tuple[Timing, ...]:
    """Time every backend that can compile `model` in `precision`, on one thread and on all; for export.

    Args:
        backend: "auto" is all of them.
        shape: of one image, (height, width, channels).
    """
    create = functools.partial(create_backend, model, precision=precision)
    timings: list[Timing] = []
    for threads in sorted({1, threads_per_worker()}):
        for found in _compiled(create, _names(backend), threads):
            timings += time_backend(found, shape)
    return tuple(timings)


def time_backend(backend: Backend, shape: tuple[int, int, int]) -> list[Timing]:
    """Time one backend on BATCH_SIZES; each size was seen before the clock starts."""
    timings = []
    for batch_size in BATCH_SIZES:
        seconds = min(time_calls(backend, shape, batch_size, _MEASURE_SECONDS, _MIN_REPEATS))
        timings.append(
            Timing(backend.name, backend.precision, backend.num_threads, batch_size, seconds, cpu_name()),
        )
    return timings


def time_calls(
    backend: Backend, shape: tuple[int, int, int], batch_size: int, budget_seconds: float, min_repeats: int
) -> list[float]:
    """Seconds of each of several calls of a backend, after one that is not counted.

    Args:
        budget_seconds: after it no further call is begun, but for `min_repeats`.
    """
    # Pixels, not zeros: arithmetic on zeros may be faster.
    images = np.random.default_rng(0).integers(0, 256, (batch_size, *shape), dtype=np.uint8)
    backend.run(images)
    seconds: list[float] = []
    end = time.perf_counter() + budget_seconds
    while len(seconds) < min_repeats or time.perf_counter() < end:
        started = time.perf_counter()
        backend.run(images)
        seconds.append(time.perf_counter() - started)
    return seconds


def choose(timings: Iterable[Timing]) -> Choice:
    """Choose the backend and number of threads whose time per image is least (see seconds_per_image).

    A model that is fast enough on one thread gets one. Where some compute in a lower precision than others (those that
    lack bfloat16), only the lowest counts: it is what the bundle asks for.
    """
    known = list(timings)
    precisions = {timing.precision for timing in known}
    wanted = next(name for name in ("int8", "bfloat16", "float32") if name in precisions)
    known = [timing for timing in known if timing.precision == wanted]
    costs = seconds_per_image(known)
    single = {timing.backend for timing in known if timing.num_threads == 1 and timing.seconds < _ONE_THREAD_SECONDS}
    allowed = [key for key in costs if key[1] == 1] if single else list(costs)
    backend, num_threads = min(allowed, key=lambda key: costs[key])
    others = ", ".join(
        f"{name} on {threads} {1e3 * cost:.3g}"
        for (name, threads), cost in sorted(costs.items())
        if (name, threads) != (backend, num_threads)
    )
    why = f"{1e3 * costs[backend, num_threads]:.3g} ms an image on {num_threads} thread{'s' * (num_threads > 1)}"
    return Choice(cast(BackendName, backend), num_threads, f"{why} ({others})" if others else why)


def seconds_per_image(timings: Iterable[Timing]) -> dict[tuple[str, int], float]:
    """By backend and number of threads, the geometric mean of the time per image over the batch sizes."""
    groups: dict[tuple[str, int], list[float]] = {}
    for timing in timings:
        key = (timing.backend, timing.num_threads)
        groups.setdefault(key, []).append(math.log(timing.seconds / timing.batch_size))
    return {key: math.exp(sum(logs) / len(logs)) for key, logs in groups.items()}


def _recorded(bundle: Bundle, backend: BackendName) -> list[Timing]:
    try:
        timings = [config.from_dict(Timing, values) for values in bundle.info.timings]
    except ConfigError as error:
        raise BundleError(f"{bundle.uri}: the timings can't be read: {error} Export the run again.") from None
    return [timing for timing in timings if timing.backend in _names(backend)]


def _names(backend: BackendName) -> tuple[BackendName, ...]:
    return _CANDIDATES if backend == "auto" else (backend,)


def _compiled(create: Callable[..., Backend], names: tuple[BackendName, ...], threads: int) -> Iterator[Backend]:
    for name in names:
        try:
            yield create(backend=name, num_threads=threads)
        except (MissingExtraError, BundleError) as error:
            _log.info("%s is no candidate: %s", name, error)


def to_dicts(timings: Iterable[Timing]) -> tuple[dict[str, Any], ...]:
    """As bundle.json holds them, with times rounded to the microsecond."""
    return tuple(
        config.to_dict(dataclasses.replace(timing, seconds=round(timing.seconds, 6) or 1e-6)) for timing in timings
    )
