"""Numbers in the headers of files, read so that a missing end becomes an ImageError."""

from __future__ import annotations

import struct
from typing import Any

from manyeyes.errors import ImageError, Reason


def unpack(layout: str, encoded: bytes, position: int) -> tuple[Any, ...]:
    """struct.unpack_from, where the end of the bytes means a truncated file."""
    try:
        return struct.unpack_from(layout, encoded, position)
    except struct.error:
        raise ImageError(Reason.TRUNCATED, f"ends at byte {len(encoded)}, needed {position}") from None


def need(encoded: bytes, end: int, what: str) -> None:
    """Refuse a file that ends before byte `end`; `what` should have reached it."""
    if end > len(encoded):
        raise ImageError(Reason.TRUNCATED, f"{what} should reach byte {end}, the file has {len(encoded)}")
