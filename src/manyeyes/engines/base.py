"""The seam between Manyeyes and whatever runs its jobs: three methods (docs/design.md, section 2)."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

from manyeyes.errors import UsageError

Item = TypeVar("Item")
Result = TypeVar("Result")

# Set for each worker process by its engine, so that workers share the cores instead of fighting for them.
THREADS_VARIABLE = "MANYEYES_NUM_THREADS"
# Set by the `manyeyes` command for itself and what it starts: no code of others runs in such a process.
COMMAND_VARIABLE = "MANYEYES_COMMAND"
# How often a task is tried before the job fails.
MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class GangContext:
    """What one worker of a gang knows about the gang: its rank in [0, world_size) and every rank's host:port."""

    rank: int
    world_size: int
    addresses: tuple[str, ...]


@runtime_checkable
class Engine(Protocol):
    """Runs jobs. `fn` and its items must be picklable; `fn` must be idempotent: a task may be retried or run twice."""

    name: str
    num_workers: int

    def map(
        self,
        fn: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        on_result: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """Return `[fn(item) for item in items]`, in order.

        `items` is consumed as workers come free, so it may be larger than memory. `on_result(index, result)` is called
        in the driver as each task ends, in the order of completion.

        Raises:
            TaskError: a task failed on every attempt, or ended its worker process on every attempt.
            ManyeyesError: raised by a task on purpose; it is not tried again.
        """
        ...

    def map_reduce(
        self, map_fn: Callable[[Item], Result], reduce_fn: Callable[[Result, Result], Result], items: Iterable[Item]
    ) -> Result | None:
        """Reduce `map_fn(item)` over all items by `reduce_fn`; None if there are no items. Raises as `map` does.

        Results are reduced in any order, so `reduce_fn` must be associative and commutative. Sums of floats are not:
        use integers where the result has to be the same for any number of workers.
        """
        ...

    def gang(self, fn: Callable[[GangContext], Result], world_size: int) -> list[Result]:
        """Run `fn` in `world_size` workers at once and return the results by rank; all or nothing.

        Raises:
            TaskError: a worker failed or died; the others are stopped. Nothing is tried again.
            UsageError: the engine can't run that many workers at once.
        """
        ...


def collect(
    outcomes: Generator[tuple[int, Result], None, None], on_result: Callable[[int, Result], None] | None
) -> list[Result]:
    """Return the results of (index, result) outcomes in the order of their indexes; each is reported as it comes."""
    results: dict[int, Result] = {}
    with contextlib.closing(outcomes):
        for index, result in outcomes:
            if on_result is not None:
                on_result(index, result)
            results[index] = result
    return [results[index] for index in range(len(results))]


def reduce_outcomes(
    outcomes: Generator[tuple[int, Result], None, None], reduce_fn: Callable[[Result, Result], Result]
) -> Result | None:
    """Reduce the results of (index, result) outcomes as they come, so that few are held; None if there are none."""
    with contextlib.closing(outcomes):
        for _, first in outcomes:
            return functools.reduce(reduce_fn, (result for _, result in outcomes), first)
    return None


@contextlib.contextmanager
def kept_workers(engine: Engine) -> Iterator[None]:
    """While the block runs, jobs of one function find the worker processes of the job before, where an engine can.

    For jobs that follow each other and whose tasks keep in their process what is slow to make. It only saves time: a
    task must not count on what an earlier one left.
    """
    keep = getattr(engine, "keep_workers", None)
    with contextlib.nullcontext() if keep is None else keep():
        yield


def available_cores() -> int:
    """The number of CPU cores that this process may use: of those it may run on as many as its quota pays for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(cores, _cores_of_quota())))


def _cores_of_quota(groups: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> float:
    """The least cpu.max of this process's control group (v2) and those around it, in cores; infinite without one."""
    cores = math.inf
    with contextlib.suppress(OSError, UnicodeDecodeError):
        named = [line.removeprefix("0::/") for line in membership.read_text().splitlines() if line.startswith("0::/")]
        for group in (path for name in named for path in (groups / name, *(groups / name).parents)):
            with contextlib.suppress(OSError, ValueError):  # "max" is no quota; the outermost group has no file
                quota, period = map(int, (group / "cpu.max").read_text().split())
                cores = min(cores, quota / period)
            if group == groups:
                break
    return cores


def threads_per_worker() -> int:
    """The number of threads that the current process should use: set by its engine, else all cores."""
    value = os.environ.get(THREADS_VARIABLE, "")
    return int(value) if value.isdigit() and int(value) > 0 else available_cores()


def refuse_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Raise a UsageError if an engine that has no settings was given some."""
    if settings:
        raise UsageError(
            f"The {name} engine has no settings, got {', '.join(settings)}. Use --workers, or another engine."
        )


class _InEnvironment:
    """A task's function, and environment variables that are set where it is unpickled."""

    def __init__(self, func: Callable[..., Any], variables: Mapping[str, str]) -> None:
        self.func = func
        self.variables = dict(variables)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_in_environment, (self.func, self.variables)

    def __call__(self, *arguments: Any) -> Any:
        return self.func(*arguments)


def _restore_in_environment(func: Callable[..., Any], variables: Mapping[str, str]) -> _InEnvironment:
    os.environ.update(variables)
    return _InEnvironment(func, variables)


def with_environment(fn: Callable[..., Any], patterns: Sequence[str]) -> Callable[..., Any]:
    """Return `fn` so that its tasks get those of this process's environment variables that match a pattern (`AWS_*`).

    The variables travel with the function: credentials stand on no command line and in no settings of a cluster.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    return _InEnvironment(fn, variables) if variables else fn


def describe_failure(fn: Callable[..., Any]) -> str:
    """A readable name of a task's function, also when it is a functools.partial."""
    return getattr(getattr(fn, "func", fn), "__qualname__", repr(fn))
