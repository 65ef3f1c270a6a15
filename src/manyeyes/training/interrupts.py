"""Ctrl-C and SIGTERM as a wish that the loop fulfils between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class StopWish:
    """The signal that asked for an end, or None.

    Attributes:
        interrupts: whether the signal also interrupts what the main thread does, as Ctrl-C does.
    """

    signal_number: int | None = None
    interrupts: bool = False

    def __bool__(self) -> bool:
        return self.signal_number is not None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopWish]:
    """Note the first SIGINT or SIGTERM instead of dying of it; a second one acts as always.

    Python delivers signals to the main thread only; elsewhere the wish is never set.
    """
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, frame: object) -> None:
        wish.signal_number = number
        for each, handler in before.items():
            signal.signal(each, handler)
        if wish.interrupts:
            raise KeyboardInterrupt

    for number in before:
        signal.signal(number, note)
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class InterruptedByWishError(Exception):
    """What a block was at was cut short by a wish."""


@contextlib.contextmanager
def interruptible(wish: StopWish) -> Iterator[None]:
    """Let a wish cut the block short, which may take long and can be done again.

    Raises:
        InterruptedByWishError: it did, or the wish was there before.
    """
    if wish:
        raise InterruptedByWishError
    wish.interrupts = True
    try:
        yield
    except KeyboardInterrupt:
        if not wish:
            raise
        raise InterruptedByWishError from None
    finally:
        wish.interrupts = False
