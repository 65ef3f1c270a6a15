"""Requests, responses, and what the HTTP server asks of an application."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

_SANE_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
# Ids that are made here: drawn for the process, then counted.
_ID_PREFIX = os.urandom(4).hex().encode()
_ids = itertools.count()
JSON = b"application/json"


class Connection(Protocol):
    """Where a request came from and its answer goes."""

    active: Request | None

    def account(self, request: Request, num_bytes: int) -> None:
        """Count bytes in memory for a request, or less than before."""

    def respond(self, request: Request, status: int, body: bytes, content_type: bytes, extra: bytes) -> None:
        """Write the answer to the active request; a client that has left gets none."""


@dataclass(frozen=True)
class Response:
    """What goes back."""

    status: int
    body: bytes = b""
    content_type: bytes = JSON
    headers: tuple[tuple[str, str], ...] = ()


class Request:
    """A request whose head has been read.

    Attributes:
        method, path, query: as sent; the path without the query, still percent-encoded.
        headers: by lower-case name.
        body: complete when the handler is called.
        size_bytes: that are in memory for it.
        length: of the body, as its head says; 0 if it does not.
        id: X-Request-Id if it was a sane one, else made here; `has_own_id` says which.
        label: of the route, for metrics; set by the application.
        extra: header lines of the answer; set by the application.
        gone: the client has left.
        on_gone: called with True when the client leaves before it is answered; with False when it has closed its side
            and may have left: it says whether the request was given up, because nothing had begun with it.
        num_holders: the connection, and whatever else still needs the memory of the request.
        started: time.perf_counter() when its head was read.
    """

    __slots__ = (
        "body",
        "chunks",
        "connection",
        "extra",
        "handler",
        "has_own_id",
        "headers",
        "id",
        "keep_alive",
        "label",
        "length",
        "method",
        "num_holders",
        "on_gone",
        "path",
        "path_parameters",
        "query",
        "refusal",
        "size_bytes",
        "started",
    )

    def __init__(self, connection: Connection, method: bytes, target: bytes, headers: dict[bytes, bytes]) -> None:
        self.connection = connection
        self.method = method
        self.path, _, self.query = target.partition(b"?")
        self.headers = headers
        self.chunks: list[bytes] = []
        self.size_bytes = 0
        self.length = 0
        self.body = b""
        self.keep_alive = True
        self.refusal: Response | None = None
        self.handler: Any = None
        self.path_parameters: dict[str, str] = {}
        self.label = ""
        self.extra = b""
        self.on_gone: Callable[[bool], bool] | None = None
        self.num_holders = 1
        self.started = time.perf_counter()
        given = headers.get(b"x-request-id")
        self.has_own_id = given is not None and _SANE_ID.fullmatch(given) is not None
        self.id = given if given is not None and self.has_own_id else b"%s%08x" % (_ID_PREFIX, next(_ids))

    @property
    def gone(self) -> bool:
        """The client has left."""
        return self.connection.active is not self

    def account(self, num_bytes: int) -> None:
        """Count so many bytes more in memory for it (or less)."""
        self.connection.account(self, num_bytes)

    def hold(self) -> None:
        """Its memory is needed, also when it is answered; call `let_go` as often."""
        self.num_holders += 1

    def let_go(self) -> None:
        """The inverse of `hold`; after the last one its bytes are no longer counted."""
        self.num_holders -= 1
        if not self.num_holders:
            self.connection.account(self, -self.size_bytes)

    def query_parameters(self) -> dict[str, list[str]]:
        """The query, decoded."""
        return urllib.parse.parse_qs(self.query.decode("latin-1"), keep_blank_values=True)

    def header(self, name: bytes) -> str:
        """A header as text, "" if it is not there."""
        return self.headers.get(name, b"").decode("latin-1")

    def respond(self, status: int, body: bytes, content_type: bytes = JSON, extra: bytes = b"") -> None:
        """Send the answer; `extra` are header lines."""
        self.connection.respond(self, status, body, content_type, extra)


@contextlib.contextmanager
def copied(request: Request) -> Iterator[None]:
    """Within, the body is copied in parts: both are counted; afterwards only the parts are there."""
    num_bytes = len(request.body)
    request.account(num_bytes)
    try:
        yield
    finally:
        request.body = b""
        request.account(-num_bytes)


def header_lines(headers: Iterable[tuple[str, str]]) -> bytes:
    """Headers as they are sent."""
    return "".join(f"{name}: {value}\r\n" for name, value in headers).encode("latin-1")


class Application:
    """What the server asks of the application; all is called in the event loop."""

    def open(self, request: Request) -> Response | None:
        """Called when the head was read: find the handler; a Response refuses the request before its body is read."""
        raise NotImplementedError

    def handle(self, request: Request) -> Response | Coroutine[Any, Any, Response] | None:
        """Answer; None: it will call `request.respond` later."""
        raise NotImplementedError

    def refusal(self, status: int, reason: str, detail: str) -> Response:
        """The answer to what is no request or breaks a limit of HTTP."""
        raise NotImplementedError

    def answered(self, request: Request, status: int, size_bytes: int) -> None:
        """Called after each answer."""
