"""One connection of HTTP/1.1: what it reads (see reading) is answered.

One request of a connection is answered at a time; what a client sends ahead waits.
"""

from __future__ import annotations

import asyncio
import http
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

from manyeyes.serving.messages import Request, Response, header_lines
from manyeyes.serving.reading import RequestReader

if TYPE_CHECKING:
    from manyeyes.serving.http import HttpServer

_log = logging.getLogger(__name__)
_STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in http.HTTPStatus}
# No browser shall take an answer for something else than it says.
_HEAD = (
    b"%scontent-type: %s\r\ncontent-length: %d\r\nx-request-id: %s\r\ndate: %s\r\n"
    b"x-content-type-options: nosniff\r\n%s%s\r\n"
)
_NEVER = float("inf")
# After an answer to a request that was not read to its end, for the client to see the answer before the reset.
_LINGER_SECONDS = 2.0
# After a client has closed its side: what nothing has begun with by then is given up.
_GONE_SECONDS = 1.0


class Connection(RequestReader):
    """One connection: reads, and answers one request after the other."""

    def __init__(self, server: HttpServer) -> None:
        super().__init__(server)
        self._last_request = False
        self._at_end = False
        # Of an answer, when it was last looked at.
        self._unsent_bytes = 0

    # --- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = transport
        self.deadline = self._server.now() + self._settings.header_timeout_seconds
        connections = self._server.connections
        connections.add(self)
        if not self._server.is_tls and len(connections) > self._settings.max_connections:
            self._refuse(503, "overloaded", "there are too many connections")

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._server.connections.discard(self)
        self._discarding = True
        self._keep_unread(b"")
        request, self.active = self.active, None
        for each in (request, self._reading, *self._ahead):
            if each is not None:
                self._release(each)
        self._reading = None
        self._ahead.clear()
        if request is not None and request.on_gone is not None:
            request.on_gone(True)
            request.on_gone = None
        if not self._server.connections:
            self._server.all_closed()

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
        self._expect_to_be_read()

    def resume_writing(self) -> None:
        """See asyncio.Protocol."""
        self._may_write = True
        self._unsent_bytes = 0
        self.deadline = self._server.now() + self._settings.idle_timeout_seconds
        if self.active is None:
            self._next()

    # --- answers

    def respond(self, request: Request, status: int, body: bytes, content_type: bytes, extra: bytes) -> None:
        """See messages.Connection."""
        if self.active is not request:
            return
        close = self._last_request or not request.keep_alive or self._server.is_draining
        head = _HEAD % (
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
        # Its jobs hold the request, too: a cycle would keep the image until the garbage collector comes by.
        request.on_gone = None
        self._release(request)
        self._application.answered(request, status, len(body))
        if close:
            self._close_gently()
            return
        if self._may_write:
            self.deadline = self._server.now() + self._settings.idle_timeout_seconds
            if self._ahead:
                self._next()

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
            if self._transport.get_write_buffer_size() < self._unsent_bytes:
                self._expect_to_be_read()
            else:
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
        # Not at once: a client that sends a thousand requests ahead shall not fill the stack.
        self.active = request = self._ahead.popleft()
        self._server.loop.call_soon(self._start_next, request)
        if not self._ahead:
            self._read_on()

    def _start_next(self, request: Request) -> None:
        if self.active is request:
            self._start(request)

    def _stop_reading(self, request: Request) -> None:
        """See RequestReader."""
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
        """See RequestReader."""
        request = self._reading or Request(self, b"GET", b"", {})
        request.refusal = self._application.refusal(status, reason, detail)
        self._stop_reading(request)

    def _end_after_answers(self) -> None:
        """See RequestReader."""
        self._last_request = self._discarding = True
        if self.active is None and not self._ahead:
            self._close_gently()

    def _expect_to_be_read(self) -> None:
        """The client must take some of what is unsent until the deadline."""
        self._unsent_bytes = self._transport.get_write_buffer_size()
        self.deadline = self._server.now() + self._settings.write_timeout_seconds

    def _release(self, request: Request) -> None:
        request.body = b""
        request.chunks = []
        request.let_go()

    def _close_gently(self) -> None:
        # Bytes that nobody has read turn a close into a reset, which may overtake the answer.
        if not self._discarding or self._server.is_tls or self._transport.is_closing():
            self._discarding = True
            self._expect_to_be_read()
            self._transport.close()
            return
        self.deadline = self._server.now() + _LINGER_SECONDS
        self._transport.write_eof()
