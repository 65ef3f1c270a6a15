"""HTTP/1.1 on asyncio. Why not an ASGI server: docs/decisions/0110-serving.md.

Timeouts cost nothing per request: each connection has a deadline, and one timer looks at them all.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import resource
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import Any

from manyeyes.serving.connection import Connection
from manyeyes.serving.messages import Application
from manyeyes.serving.reading import RequestReader
from manyeyes.serving.settings import ServeSettings

_log = logging.getLogger(__name__)
_SWEEP_SECONDS = 0.5
_BACKLOG = 1024
# Besides those of connections: files of models, pipes of workers, libraries.
_OTHER_DESCRIPTORS = 512
# After a connection could not be taken, because no descriptor was free.
_PAUSE_SECONDS = 0.1


class HttpServer:
    """Listens, keeps the connections, and drains them."""

    def __init__(self, application: Application, settings: ServeSettings, tls: ssl.SSLContext | None = None) -> None:
        self.application = application
        self.settings = settings
        self.is_tls = tls is not None
        self.connections: set[Connection] = set()
        self.bodies_bytes = 0
        self.is_draining = False
        self.date = b""
        self._tls = tls
        self._num_handshakes = 0
        self._stop_listening: Callable[[], object]
        self._tasks: set[asyncio.Task[None]] = set()
        self._no_connections = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time

    async def start(self, listener: socket.socket) -> None:
        """Take connections from a bound socket."""
        _allow_descriptors(self.settings.max_connections + _OTHER_DESCRIPTORS)
        self._sweep()
        if self._tls is None:
            server = await self.loop.create_server(lambda: Connection(self), sock=listener, backlog=_BACKLOG)
            self._stop_listening = server.close
        else:
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            self._stop_listening = self.run(self._accept(listener)).cancel

    @property
    def num_connections(self) -> int:
        """Open connections, with those that have not shaken hands yet."""
        return len(self.connections) + self._num_handshakes

    async def drain(self, timeout_seconds: float) -> None:
        """Take no more connections, finish the requests under way, and close; abort what is left after the timeout."""
        self._stop_listening()
        self.is_draining = True
        for connection in list(self.connections):
            connection.drain()
        if self.connections:
            self._no_connections.clear()
            try:
                await asyncio.wait_for(self._no_connections.wait(), timeout_seconds)
            except TimeoutError:
                _log.warning("%d requests did not end in time and are cut off", len(self.connections))
                for connection in list(self.connections):
                    connection.abort()
        self._timer.cancel()

    def make_room(self, newcomer: RequestReader) -> bool:
        """Drop the bodies that come slowest for the memory that they hold; False if the newcomer is the next one."""
        now = self.now()
        while self.bodies_bytes > self.settings.max_bodies_bytes:
            slowest: RequestReader = max(self.connections, key=lambda each: each.slowness(now))
            if slowest is newcomer or slowest.slowness(now) <= 0:
                return False
            slowest.drop_slow_body()
        return True

    def all_closed(self) -> None:
        """The last connection was closed."""
        self._no_connections.set()

    def run(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run `work` beside, and keep it from being collected."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _accept(self, listener: socket.socket) -> None:
        """Take connections for TLS: asyncio's own server would tell of them after their handshakes, uncounted."""
        while True:
            try:
                accepted, _ = await self.loop.sock_accept(listener)
            except OSError as error:
                _log.error("A connection can't be taken", extra={"why": str(error)})
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            if self.num_connections >= self.settings.max_connections:
                accepted.close()
            else:
                self._num_handshakes += 1
                self.run(self._shake_hands(accepted))

    async def _shake_hands(self, accepted: socket.socket) -> None:
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        timeout = self.settings.header_timeout_seconds
        try:
            await self.loop.connect_accepted_socket(
                lambda: Connection(self), accepted, ssl=self._tls, ssl_handshake_timeout=timeout
            )
        except OSError:  # no TLS, another version of it, silence, or gone
            accepted.close()
        finally:
            self._num_handshakes -= 1

    def _sweep(self) -> None:
        self.date = email.utils.formatdate(usegmt=True).encode()
        now = self.now()
        for connection in list(self.connections):
            connection.sweep(now)
        self._timer = self.loop.call_later(_SWEEP_SECONDS, self._sweep)


def _allow_descriptors(wanted: int) -> None:
    """Raise this process's limit of open files as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, allowed), hard))
    if allowed < wanted:
        _log.warning("Connections may be refused: %d files may be open, %d are wanted (ulimit -n)", allowed, wanted)
