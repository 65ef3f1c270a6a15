"""What HDFS and S3 share: how they differ from fsspec's own file systems, range reads, and whether a server answers."""

from __future__ import annotations

import io
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import IO, NamedTuple

from manyeyes.errors import UsageError

# A server that has not taken a connection by then is said not to answer. Clients of their own wait for minutes.
ANSWER_SECONDS = 5.0
# One that has taken it has so long for its first answer.
FIRST_ANSWER_SECONDS = 10.0
# What a file that is read from its start to its end asks for at once.
BUFFER_BYTES = 1 << 20

# A file that is being written; readers and listings pass over it.
ASIDE_MARK = ".aside-"

# Servers that have answered this process; they are not asked again.
_answered: set[tuple[int, str, int]] = set()


def without_aside(uri: str) -> str:
    """Return the URI of the file that one aside is to become, or that the parts below it are for."""
    return re.sub(rf"{re.escape(ASIDE_MARK)}[0-9a-f]+-", "", uri)


class Item(NamedTuple):
    """What lies directly in a directory; the size of a directory is 0."""

    name: str
    is_directory: bool
    size_bytes: int


class RemoteFiles:
    """What storage needs of a file system beyond fsspec's methods. Paths are those that fsspec's methods take.

    What these raise is an OSError with errno, strerror and the URI as its filename where the server gave a reason,
    else a ConnectionError that says all in its message.
    """

    def unstrip_protocol(self, name: str) -> str:
        """Return the URI of a path."""
        raise NotImplementedError

    def iterate(self, path: str) -> Iterator[Item]:
        """Yield what is directly in a directory, page by page; in the order of `manyeyes.storage.iterate_directory`.

        Raises:
            FileNotFoundError, NotADirectoryError: there is no such directory.
        """
        raise NotImplementedError

    def publish(self, path: str) -> AbstractContextManager[IO[bytes]]:
        """See manyeyes.storage.publish."""
        raise NotImplementedError

    def open_ranges(self, path: str) -> RangeReader:
        """Open a file whose every read is one request."""
        raise NotImplementedError


class RangeReader(io.RawIOBase):
    """A remote file that is read by ranges: every read is one request for exactly those bytes.

    Args:
        size: of the file in bytes.
        fetch: returns the bytes [start, end) of the file.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size = size
        self._fetch = fetch
        self._position = 0

    def readable(self) -> bool:
        """Whether it can be read: yes."""
        return True

    def seekable(self) -> bool:
        """Whether `seek` works: yes."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See io.IOBase.seek."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        """See io.IOBase.tell."""
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return `size` bytes, fewer only at the end of the file; all that is left without `size`."""
        end = self._size if size is None or size < 0 else min(self._size, self._position + size)
        content = self._fetch(self._position, end) if end > self._position else b""
        self._position += len(content)
        return content

    def readall(self) -> bytes:
        """Return all that is left."""
        return self.read()

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        """See io.RawIOBase.readinto."""
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)


def why_unreachable(host: str, port: int) -> str | None:
    """Try to connect, for ANSWER_SECONDS at most; returns why it can't be done, or None if a server takes it."""
    try:
        socket.create_connection((host, port), timeout=ANSWER_SECONDS).close()
    except TimeoutError:
        return f"no answer within {ANSWER_SECONDS:.0f} s"
    except (OSError, UnicodeError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


def first_that_answers(addresses: Sequence[tuple[str, int]], what: str) -> tuple[str, int]:
    """Return the first (host, port) that takes a connection; each is given ANSWER_SECONDS, and asked once a process.

    Raises:
        ConnectionError: none does; `what` begins the message.
    """
    reasons = []
    for host, port in addresses:
        if (os.getpid(), host, port) in _answered:
            return host, port
        reason = why_unreachable(host, port)
        if reason is None:
            _answered.add((os.getpid(), host, port))
            return host, port
        reasons.append(f"{host}:{port} ({reason})")
    raise ConnectionError(f"{what} at {', '.join(reasons)}. Check the address, and that the server runs.")


def check_first_answer(ask: Callable[[], object], uri: str, kind: str, hint: str) -> None:
    """Call `ask` once: what listens at the address may be no server of this kind, and never answer.

    Raises:
        ConnectionError: it has not answered within FIRST_ANSWER_SECONDS, or what `ask` has raised.
    """
    problems: list[ConnectionError] = []

    def call() -> None:
        try:
            ask()
        except ConnectionError as error:
            problems.append(error)
        except (OSError, UsageError):
            pass  # a refusal is an answer too

    asking = threading.Thread(target=call, daemon=True)
    asking.start()
    asking.join(FIRST_ANSWER_SECONDS)
    if asking.is_alive():
        raise ConnectionError(
            f"{uri} can't be opened: what listens there has not answered as {kind} within "
            f"{FIRST_ANSWER_SECONDS:.0f} s. Check the address. {hint}."
        )
    if problems:
        raise problems[0]


def split_host_port(authority: str, default_port: int, uri: str) -> tuple[str, int]:
    """Return (host, port) of HOST, HOST:PORT or [IPV6]:PORT.

    Raises:
        UsageError: the port is not a number of a port.
    """
    host, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        return authority.strip("[]"), default_port
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise UsageError(f"{uri} has the port {port!r}. Expected a number, e.g. hdfs://namenode:8020/folder.")
    return host.strip("[]"), int(port)
