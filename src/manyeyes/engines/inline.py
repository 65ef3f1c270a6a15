"""The inline engine: a loop in the driver's own process, for debugging and tests."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from manyeyes.engines.base import MAX_ATTEMPTS, GangContext, Item, Result, describe_failure, refuse_settings
from manyeyes.errors import ManyeyesError, TaskError, UsageError


class InlineEngine:
    """Runs every task in the calling process, one after the other."""

    name = "inline"
    num_workers = 1

    def map(
        self,
        fn: Callable[[Item], Result],
        items: Iterable[Item],
        *,
        on_result: Callable[[int, Result], None] | None = None,
    ) -> list[Result]:
        """See Engine.map."""
        results = []
        for index, item in enumerate(items):
            result = _attempt(fn, item, index)
            if on_result is not None:
                on_result(index, result)
            results.append(result)
        return results

    def map_reduce(
        self, map_fn: Callable[[Item], Result], reduce_fn: Callable[[Result, Result], Result], items: Iterable[Item]
    ) -> Result | None:
        """See Engine.map_reduce."""
        mapped = (_attempt(map_fn, item, index) for index, item in enumerate(items))
        for first in mapped:
            return functools.reduce(reduce_fn, mapped, first)
        return None

    def gang(self, fn: Callable[[GangContext], Result], world_size: int) -> list[Result]:
        """See Engine.gang; only a gang of one is possible in one process."""
        if world_size != 1:
            raise UsageError(f"The inline engine runs one worker, not {world_size}. Use --engine local.")
        context = GangContext(rank=0, world_size=1, addresses=("127.0.0.1:0",))
        try:
            return [fn(context)]
        except ManyeyesError:
            raise
        except (Exception, SystemExit) as error:
            raise TaskError(f"Worker 0 of the gang failed: {error!r}", traceback.format_exc()) from error


def create(num_workers: int | None, settings: Mapping[str, Any]) -> InlineEngine:
    """Make the engine; it has one worker whatever is asked for, and no settings."""
    refuse_settings("inline", settings)
    return InlineEngine()


def _attempt(fn: Callable[[Item], Result], item: Item, index: int) -> Result:
    for attempt in range(1, MAX_ATTEMPTS + 1):
        try:
            return fn(item)
        except ManyeyesError:
            raise  # it is said on purpose: trying again would say the same
        except (Exception, SystemExit) as error:
            if attempt == MAX_ATTEMPTS:
                message = f"Task {index} ({describe_failure(fn)}) failed {attempt} times: {error!r}"
                raise TaskError(message, traceback.format_exc(), index) from error
    raise AssertionError("unreachable")
