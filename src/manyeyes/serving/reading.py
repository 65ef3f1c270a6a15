"""Reads the requests of one connection by llhttp (httptools), and holds them to their limits."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING, Any

import httptools

from manyeyes.serving.messages import Request, Response

if TYPE_CHECKING:
    from manyeyes.serving.http import HttpServer

_log = logging.getLogger(__name__)
_MAX_HEAD_BYTES = 32 * 1024
_MAX_HEADERS = 100
# What is parsed at a time, unless it is a body: requests that were sent ahead stay unparsed bytes, not objects.
_PIECE_BYTES = 4 * 1024
_MAX_DISCARDED_BYTES = 8 * 1024 * 1024
# So that a body that has just made progress is not taken for one that stands.
_SLACK_BYTES = 64 * 1024


class RequestReader(asyncio.Protocol, ABC):
    """The half of a connection that reads."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._settings = server.settings
        self._application = server.application
        self._transport: Any = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self.active: Request | None = None
        self.deadline = 0.0
        self._reading: Request | None = None
        self._ahead: deque[Request] = deque()
        # Received, but not parsed while others wait for their answers; reading is paused meanwhile.
        self._unread = b""
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._num_headers = self._num_hosts = 0
        self._head_bytes = 0
        # Of a head or of trailers that are not complete yet: what came since the last byte of a body.
        self._other_bytes = 0
        self._known_body_bytes = 0
        self._num_begun = 0
        self._in_message = False
        self._wants_upgrade = False
        self._discarding = False
        self._discarded_bytes = 0
        self._may_write = True
        # A body must come on by so many bytes within each body timeout.
        self._window_bytes = int(self._settings.body_timeout_seconds * self._settings.min_body_bytes_per_second)
        self._window_started = 0.0
        self._window_begin = 0

    @abstractmethod
    def respond(self, request: Request, status: int, body: bytes, content_type: bytes, extra: bytes) -> None:
        """See messages.Connection."""

    @abstractmethod
    def _start(self, request: Request) -> None:
        """Let a request be answered."""

    @abstractmethod
    def _refuse(self, status: int, reason: str, detail: str) -> None:
        """Answer what is no request that could be handled, and close."""

    @abstractmethod
    def _stop_reading(self, request: Request) -> None:
        """Answer with the refusal of `request`, whose rest will not be read, so that the connection can't go on."""

    @abstractmethod
    def _end_after_answers(self) -> None:
        """What follows is no HTTP: close when everything is answered."""

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._discarding:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > _MAX_DISCARDED_BYTES:
                self._transport.pause_reading()
        elif self._unread:
            self._keep_unread(self._unread + data)
        elif len(data) <= _PIECE_BYTES:
            self._parse(data)
        else:
            self._parse_in_pieces(data)

    def slowness(self, now: float) -> float:
        """How little comes for the memory that it holds: byte-seconds for each byte that came lately; -1: no body."""
        reading = self._reading
        if reading is None:
            return -1.0
        came = reading.size_bytes - self._window_begin + _SLACK_BYTES
        return reading.size_bytes * (now - self._window_started) / came

    def drop_slow_body(self) -> None:
        """Others need the memory that a body takes which comes too slowly."""
        self._refuse(408, "timeout", "the body came too slowly for the memory that it takes")

    def _read_on(self) -> None:
        """Parse what is unread; read what comes when nothing waits any more."""
        data = self._unread
        self._keep_unread(b"")
        if data:
            self._parse_in_pieces(data)
        if not self._ahead:
            self._transport.resume_reading()

    def _keep_unread(self, data: bytes) -> None:
        self._server.bodies_bytes += len(data) - len(self._unread)
        self._unread = data

    def _parse_in_pieces(self, data: bytes) -> None:
        view, position = memoryview(data), 0
        while position < len(data) and not self._discarding:
            if self._ahead:
                self._keep_unread(data[position:])
                return
            reading = self._reading
            left = reading.length - reading.size_bytes if reading is not None else 0
            end = position + max(_PIECE_BYTES, left)
            self._parse(view[position:end])
            position = end

    def _parse(self, data: bytes | memoryview) -> None:
        is_between = not self._in_message
        self._num_begun = 0
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._wants_upgrade and not self._discarding:
                self._go_on_without_upgrade()
                self._parse(data[upgrade.args[0] :])
            elif not self._discarding:  # CONNECT
                self._end_after_answers()
            return
        except httptools.HttpParserCallbackError:
            _log.exception("A request failed")
            self._refuse(500, "internal", "see the server's log")
            return
        except httptools.HttpParserError as error:
            if not self._discarding:
                self._refuse(400, "bad_request", f"this is not HTTP/1.1: {error}"[:200])
            return
        if self._in_message and not self._discarding:
            self._bound_what_is_no_body(len(data), is_between)

    def _bound_what_is_no_body(self, num_bytes: int, is_between: bool) -> None:
        # The parser keeps what it has of a header; it tells a header when all of it is there.
        size_bytes = 0 if self._reading is None else self._reading.size_bytes
        if size_bytes != self._known_body_bytes:
            self._known_body_bytes = size_bytes
            self._other_bytes = 0
        elif self._num_begun == 0 or (is_between and self._num_begun == 1):
            self._other_bytes += num_bytes
            if self._other_bytes > _MAX_HEAD_BYTES:
                self._refuse(431, "too_many_bytes", f"the head of the request is longer than {_MAX_HEAD_BYTES} bytes")

    def _go_on_without_upgrade(self) -> None:
        """We speak nothing but HTTP/1.1. The parser takes what follows for another protocol; so a new one reads on."""
        self._wants_upgrade = False
        self._parser = httptools.HttpRequestParser(self)
        lines = [
            b"%s: %s\r\n" % (name, self._headers[name])
            for name in (b"content-length", b"transfer-encoding")
            if name in self._headers
        ]
        self._parse(b"POST / HTTP/1.1\r\n%s\r\n" % b"".join(lines))

    # --- the parser's side. What comes while a request is read, except for its body, changes nothing: trailers, and the
    # head that a parser is told again after an Upgrade.

    def on_message_begin(self) -> None:
        """A request begins."""
        if self._reading is not None:
            return
        self._in_message = True
        self._num_begun += 1
        self._url = b""
        self._headers = {}
        self._num_headers = self._num_hosts = self._head_bytes = self._other_bytes = self._known_body_bytes = 0
        if self.active is None and not self._discarding:
            self.deadline = self._server.now() + self._settings.header_timeout_seconds

    def on_url(self, url: bytes) -> None:
        """Part of the target."""
        if self._reading is None:
            self._url += url
            self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        if self._reading is not None:
            return
        name = name.lower()
        self._num_headers += 1
        if name == b"host":
            self._num_hosts += 1
        if self._num_headers <= _MAX_HEADERS:
            self._headers[name] = value
        self._head_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        """The head is there: decide whether the body is wanted."""
        if self._discarding or self._reading is not None:
            return
        self._other_bytes = 0
        if self._head_bytes > _MAX_HEAD_BYTES or self._num_headers > _MAX_HEADERS:
            self._refuse(431, "too_many_bytes", "the request has too many or too long headers")
            return
        version = self._parser.get_http_version()
        if version != "1.1" and version != "1.0":
            self._refuse(400, "bad_request", f"this is HTTP/{version}; speak HTTP/1.1")
            return
        if self._num_hosts != 1 and (self._num_hosts or version == "1.1"):
            self._refuse(400, "bad_request", f"there are {self._num_hosts} headers Host, expected one")
            return
        if not self._url.startswith(b"/") and self._url != b"*":
            try:
                url = httptools.parse_url(self._url)
                self._url = (url.path or b"/") + (b"?" + url.query if url.query else b"")
            except httptools.HttpParserInvalidURLError:
                self._refuse(400, "bad_request", "the target of the request is no URL")
                return
        request = Request(self, self._parser.get_method(), self._url, self._headers)
        request.keep_alive = self._parser.should_keep_alive()
        self._reading = request
        request.refusal = self._application.open(request)
        length = self._headers.get(b"content-length")
        if length is not None:
            request.length = int(length)
            if request.refusal is None and request.length > self._settings.max_body_bytes:
                request.refusal = self._too_long()
        if request.refusal is not None and self._has_body():
            self._stop_reading(request)
            return
        self._wants_upgrade = b"upgrade" in self._headers and self._parser.should_upgrade()
        self._begin_window(0)
        if self.active is None and self._headers.get(b"expect", b"").lower() == b"100-continue":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, chunk: bytes) -> None:
        """Part of the body."""
        request = self._reading
        if request is None or self._discarding:
            return
        size_bytes = len(chunk)
        request.size_bytes += size_bytes
        request.chunks.append(chunk)
        server = self._server
        server.bodies_bytes += size_bytes
        if request.size_bytes > self._settings.max_body_bytes:
            request.refusal = self._too_long()
        elif server.bodies_bytes > self._settings.max_bodies_bytes and not server.make_room(self):
            request.refusal = self._application.refusal(503, "overloaded", "too many requests are being read")
        else:
            if request.size_bytes - self._window_begin >= self._window_bytes:
                self._begin_window(request.size_bytes)
            return
        self._stop_reading(request)

    def on_message_complete(self) -> None:
        """The request is there."""
        if self._wants_upgrade:  # so says a parser that does not look for the body
            return
        request, self._reading = self._reading, None
        self._in_message = False
        if request is None or self._discarding:
            return
        chunks = request.chunks
        request.body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        request.chunks = []
        if self.active is None and self._may_write:
            self._start(request)
        else:
            self._ahead.append(request)
            self._transport.pause_reading()

    def account(self, request: Request, num_bytes: int) -> None:
        """See messages.Connection."""
        request.size_bytes += num_bytes
        self._server.bodies_bytes += num_bytes

    def _begin_window(self, size_bytes: int) -> None:
        self._window_started = self._server.now()
        self._window_begin = size_bytes
        if self.active is None:
            self.deadline = self._window_started + self._settings.body_timeout_seconds

    def _has_body(self) -> bool:
        return b"transfer-encoding" in self._headers or self._headers.get(b"content-length", b"0") != b"0"

    def _too_long(self) -> Response:
        return self._application.refusal(
            413, "too_many_bytes", f"the body is longer than {self._settings.max_body_bytes} bytes"
        )
