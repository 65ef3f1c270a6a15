"""One connection of HTTP/1.1: llhttp (by httptools) reads, this file holds every request to its limits and answers.

One request of a connection is answered at a time; what a client sends ahead waits.
"""

from __future__ import annotations

import asyncio
import http
import logging
from collections import deque
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import httptools

from manyeyes.serving.messages import Request, Response, header_lines

if TYPE_CHECKING:
    from manyeyes.serving.http import HttpServer

_log = logging.getLogger(__name__)
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
_MAX_HEAD_BYTES = 32 * 1024
_MAX_HEADERS = 100
_NEVER = float("inf")
# After an answer to a request that was not read to its end, for the client to see the answer before the reset.
_LINGER_SECONDS = 2.0
# After a client has closed its side: what nothing has begun with by then is given up.
_GONE_SECONDS = 1.0
_MAX_DISCARDED_BYTES = 8 * 1024 * 1024


class Connection(asyncio.Protocol):
    """One connection: parses, enforces limits, and answers one request after the other."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._settings = server.settings
        self._application = server.application
        self.active: Request | None = None
        self._reading: Request | None = None
        self._ahead: deque[Request] = deque()
        self._transport: Any = None
        self._parser: Any = None
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._num_headers = 0
        self._head_bytes = 0
        self._in_message = False
        self._discarding = False
        self._discarded_bytes = 0
        self._last_request = False
        self._at_end = False
        self._may_write = True
        self.deadline = 0.0
        self._body_started = 0.0

    # --- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        self.deadline = self._server.now() + self._settings.header_timeout_seconds
        connections = self._server.connections
        connections.add(self)
        if len(connections) > self._settings.max_connections:
            self._refuse(503, "overloaded", "there are too many connections")

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._server.connections.discard(self)
        self._discarding = True
        request, self.active = self.active, None
        for each in (request, self._reading, *self._ahead):
            if each is not None:
                self._release(each)
        self._reading = None
        self._ahead.clear()
        if request is not None and request.on_gone is not None:
            request.on_gone(True)
        if not self._server.connections:
            self._server.all_closed()

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if self._discarding:
            self._discarded_bytes += len(data)
            if self._discarded_bytes > _MAX_DISCARDED_BYTES:
                self._transport.pause_reading()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # We speak nothing else; the request itself was read and is answered.
            self._last_request = self._discarding = True
            if self.active is None and not self._ahead:
                self._close_gently()
            return
        except httptools.HttpParserCallbackError:
            _log.exception("A request failed")
            self._refuse(500, "internal", "see the server's log")
            return
        except httptools.HttpParserError as error:
            if not self._discarding:
                self._refuse(400, "bad_request", f"this is not HTTP/1.1: {error}"[:200])
            return
        if self._in_message and self._reading is None and not self._discarding:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._refuse(431, "too_many_bytes", f"the head of the request is longer than {_MAX_HEAD_BYTES} bytes")

    def eof_received(self) -> bool:
        """See asyncio.Protocol.

        A client may close its side and still read the answer, or it has left: nobody can know before something is
        written. So a request that nothing has begun with a second later is answered with 503.
        """
        if self.active is None and not self._ahead:
            return False
        self._last_request = self._at_end = True
        self.deadline = self._server.now() + _GONE_SECONDS
        return not self._server.is_tls

    def pause_writing(self) -> None:
        """See asyncio.Protocol."""
        self._may_write = False
        self.deadline = self._server.now() + self._settings.write_timeout_seconds

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._may_write = True
        self.deadline = self._server.now() + self._settings.idle_timeout_seconds
        if self.active is None:
            self._next()

    # --- the parser's side

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_message = True
        self._url = b""
        self._headers = {}
        self._num_headers = self._head_bytes = 0
        if self.active is None and not self._discarding:
            self.deadline = self._server.now() + self._settings.header_timeout_seconds

    def on_url(self, url: bytes) -> None:
        """Part of the target."""
        self._url += url
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header."""
        if self._reading is not None:  # after the body: nothing that was checked may change
            return
        self._num_headers += 1
        if self._num_headers <= _MAX_HEADERS:
            self._headers[name.lower()] = value
        self._head_bytes += len(name) + len(value)

    def on_headers_complete(self) -> None:
        """The head is there: decide whether the body is wanted."""
        if self._discarding:
            return
        if self._head_bytes > _MAX_HEAD_BYTES or self._num_headers > _MAX_HEADERS:
            self._refuse(431, "too_many_bytes", "the request has too many or too long headers")
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
        if request.refusal is None:
            length = self._headers.get(b"content-length")
            if length is not None and int(length) > self._settings.max_body_bytes:
                request.refusal = self._too_long()
        if request.refusal is not None and self._has_body():
            self._stop_reading(request)
            return
        if self.active is None:
            self._body_started = self._server.now()
            self.deadline = self._body_started + self._settings.body_timeout_seconds
            if self._headers.get(b"expect", b"").lower() == b"100-continue":
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
        elif server.bodies_bytes > self._settings.max_bodies_bytes:
            request.refusal = self._application.refusal(503, "overloaded", "too many requests are being read")
        else:
            if self.active is None:
                self.deadline = (
                    self._body_started
                    + self._settings.body_timeout_seconds
                    + request.size_bytes / self._settings.min_body_bytes_per_second
                )
            return
        self._stop_reading(request)

    def on_message_complete(self) -> None:
        """The request is there."""
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

    # --- answers

    def respond(self, request: Request, status: int, body: bytes, content_type: bytes, extra: bytes) -> None:
        """Write the answer to the active request; a client that has left gets none."""
        if self.active is not request:
            return
        close = self._last_request or not request.keep_alive or self._server.is_draining
        head = b"%scontent-type: %s\r\ncontent-length: %d\r\nx-request-id: %s\r\ndate: %s\r\n%s%s\r\n" % (
            _STATUS_LINES[status],
            content_type,
            len(body),
            request.id,
            self._server.date,
            extra or request.extra,
            b"connection: close\r\n" if close else b"",
        )
        self._transport.write(head if request.method == b"HEAD" else head + body)
        self.active = None
        self._release(request)
        self._application.answered(request, status, len(body))
        if close:
            self._close_gently()
            return
        if self._may_write:
            self.deadline = self._server.now() + self._settings.idle_timeout_seconds
            if self._ahead:
                self._next()

    def account(self, request: Request, num_bytes: int) -> None:
        """See messages.Connection."""
        request.size_bytes += num_bytes
        self._server.bodies_bytes += num_bytes

    def sweep(self, now: float) -> None:
        """Called now and then: end what takes too long."""
        if now < self.deadline:
            return
        if self._at_end and self.active is not None:
            request = self.active
            if request.on_gone is None:
                self.deadline = now + _GONE_SECONDS
            elif request.on_gone(False):
                self._send(request, self._application.refusal(503, "overloaded", "nothing has begun with it yet"))
            else:
                self.deadline = _NEVER
            return
        if self._discarding or not self._may_write or self._transport.is_closing():
            self._transport.abort()
        elif not self._in_message:
            self._transport.close()
        elif self.active is None:
            self._refuse(408, "timeout", "the request was not sent in time")

    def drain(self) -> None:
        """The server ends: close now if nothing is under way, else after the answer."""
        if self.active is None and not self._in_message and not self._ahead and not self._discarding:
            self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._transport.abort()

    def _start(self, request: Request) -> None:
        self.active = request
        self.deadline = self._server.now() + _GONE_SECONDS if self._at_end else _NEVER
        if request.refusal is not None:
            self._send(request, request.refusal)
            return
        try:
            answer = self._application.handle(request)
        except Exception:
            _log.exception("A request failed")
            self._send(request, self._application.refusal(500, "internal", "see the server's log"))
            return
        if answer is None:
            return
        if isinstance(answer, Response):
            self._send(request, answer)
        else:
            self._server.run(self._finish(request, answer))

    async def _finish(self, request: Request, answer: Coroutine[Any, Any, Response]) -> None:
        request.hold()
        try:
            response = await answer
        except Exception:
            _log.exception("A request failed")
            response = self._application.refusal(500, "internal", "see the server's log")
        finally:
            request.let_go()
        self._send(request, response)

    def _send(self, request: Request, response: Response) -> None:
        self.respond(
            request,
            response.status,
            response.body,
            response.content_type,
            header_lines(response.headers) + request.extra,
        )

    def _next(self) -> None:
        """Go on with what the client has sent ahead."""
        if not self._ahead or self._transport.is_closing():
            return
        request = self._ahead.popleft()
        if not self._ahead:
            self._transport.resume_reading()
        # Not at once: a client that sends a thousand requests ahead shall not fill the stack.
        self.active = request
        self._server.loop.call_soon(self._start_next, request)

    def _start_next(self, request: Request) -> None:
        if self.active is request:
            self._start(request)

    def _has_body(self) -> bool:
        return b"transfer-encoding" in self._headers or self._headers.get(b"content-length", b"0") != b"0"

    def _too_long(self) -> Response:
        return self._application.refusal(
            413, "too_many_bytes", f"the body is longer than {self._settings.max_body_bytes} bytes"
        )

    def _stop_reading(self, request: Request) -> None:
        """Answer with the refusal of `request`, whose rest will not be read, so that the connection can't go on."""
        self._discarding = True
        self._last_request = True
        self._reading = None
        self.account(request, -request.size_bytes)
        request.chunks = []
        if self.active is None and not self._ahead:
            self._start(request)
        else:
            self._ahead.append(request)

    def _refuse(self, status: int, reason: str, detail: str) -> None:
        """Answer what is no request that could be handled, and close."""
        request = self._reading or Request(self, b"GET", b"", {})
        request.refusal = self._application.refusal(status, reason, detail)
        self._stop_reading(request)

    def _release(self, request: Request) -> None:
        request.body = b""
        request.chunks = []
        request.let_go()

    def _close_gently(self) -> None:
        # Bytes that nobody has read turn a close into a reset, which may overtake the answer.
        if not self._discarding or self._server.is_tls or self._transport.is_closing():
            self._discarding = True
            self.deadline = self._server.now() + self._settings.write_timeout_seconds
            self._transport.close()
            return
        self.deadline = self._server.now() + _LINGER_SECONDS
        self._transport.write_eof()
