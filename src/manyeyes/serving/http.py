"""HTTP/1.1 on asyncio. Why not an ASGI server: docs/decisions/0110-serving.md.

Timeouts cost nothing per request: each connection has a deadline, and one timer looks at them all.
"""

from __future__ import annotations

import asyncio
import email.utils
import logging
import ssl
from collections.abc import Coroutine
from typing import Any

from manyeyes.serving.connection import Connection
from manyeyes.serving.messages import Application
from manyeyes.serving.settings import ServeSettings

_log = logging.getLogger(__name__)
_SWEEP_SECONDS = 0.5


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
        self._tasks: set[asyncio.Task[None]] = set()
        self._no_connections = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.now = self.loop.time

    async def start(self, listener: Any) -> None:
        """Take connections from a bound socket."""
        self._sweep()
        self._server = await self.loop.create_server(
            lambda: Connection(self),
            sock=listener,
            backlog=1024,
            ssl=self._tls,
            ssl_handshake_timeout=self.settings.header_timeout_seconds if self._tls else None,
        )

    async def drain(self, timeout_seconds: float) -> None:
        """Take no more connections, finish the requests under way, and close; abort what is left after the timeout."""
        self._server.close()
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

    def all_closed(self) -> None:
        """The last connection was closed."""
        self._no_connections.set()

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` beside, and keep it from being collected."""
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _sweep(self) -> None:
        self.date = email.utils.formatdate(usegmt=True).encode()
        now = self.now()
        for connection in list(self.connections):
            connection.sweep(now)
        self._timer = self.loop.call_later(_SWEEP_SECONDS, self._sweep)
