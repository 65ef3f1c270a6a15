"""The server's life: bind, load and warm the models, answer, drain, end."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import socket
import ssl
import threading
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from manyeyes.errors import ManyeyesError, MissingExtraError, UsageError
from manyeyes.serving.settings import ServeSettings

try:
    import httptools  # noqa: F401
    import multipart  # noqa: F401
    import orjson  # noqa: F401
    import uvloop
except ImportError:
    raise MissingExtraError("Serving", "serve") from None

from manyeyes.serving.app import App
from manyeyes.serving.catalog import Catalog
from manyeyes.serving.http import HttpServer
from manyeyes.serving.jobs import Job
from manyeyes.serving.metrics import Metrics
from manyeyes.serving.models import LocalModel, Model, ModelCard
from manyeyes.serving.workers import WorkerPool

_log = logging.getLogger(__name__)
# When requests have ended or were cut off, their models have so long to let go.
_CLOSE_SECONDS = 1.0
# With that and the end of the worker processes; what is left then will not end by itself.
_END_SECONDS = 4.0


@dataclass(frozen=True)
class Started:
    """What is told when a server is ready.

    Attributes:
        url: at which it answers.
        cards: of every version that is served.
    """

    url: str
    cards: tuple[ModelCard, ...]


def serve(
    models: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    settings: ServeSettings | None = None,
    traffic: Mapping[str, Mapping[str, object]] | None = None,
    on_start: Callable[[Started], None] | None = None,
) -> None:
    """Serve what lies at the URI `models` until SIGINT or SIGTERM; requests under way are finished first.

    Args:
        models: a bundle, or a folder NAME/VERSION of bundles, which may hold a serving.toml.
        port: 0 takes a free one.
        traffic: by name of a model, settings of folder.Traffic that go over those of serving.toml.
        on_start: called when the models are loaded and warm.

    Raises:
        UsageError: the address, the certificate or the settings can't be used.
        BundleError: see Predictor.load.
    """
    settings = settings or ServeSettings()
    tls = _load_tls(settings)
    listener = _bind(host, port)
    shown = f"[{host}]" if ":" in host else host
    url = f"{'https' if tls else 'http'}://{shown}:{listener.getsockname()[1]}"
    # A thread that is stuck in native code or in a read is ended by nothing but the end of its process.
    cut_off = threading.Timer(settings.drain_delay_seconds + settings.drain_timeout_seconds + _END_SECONDS, _cut_off)
    cut_off.daemon = True
    try:
        with listener, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(models, listener, url, settings, tls, traffic or {}, on_start, cut_off.start))
    finally:
        cut_off.cancel()


async def _run(
    uri: str,
    listener: socket.socket,
    url: str,
    settings: ServeSettings,
    tls: ssl.SSLContext | None,
    traffic: Mapping[str, Mapping[str, object]],
    on_start: Callable[[Started], None] | None,
    on_end: Callable[[], None],
) -> None:
    loop = asyncio.get_running_loop()
    counters = Metrics()

    async def load(bundle: str, name: str | None, version: str | None) -> Model:
        if pool is not None:
            return await pool.load(bundle, name, version)
        return await asyncio.to_thread(LocalModel.load, bundle, name, version, settings, deliver_from_thread)

    def deliver_from_thread(model: Model, jobs: list[Job]) -> None:
        loop.call_soon_threadsafe(app.deliver, model, jobs)

    def deliver(model: Model, jobs: list[Job]) -> None:
        app.deliver(model, jobs)

    pool = WorkerPool(settings, deliver, counters) if settings.num_workers > 1 else None
    catalog = Catalog(uri, load, counters, keep_versions=settings.keep_versions, traffic=traffic)
    app = App(catalog, counters, settings, has_workers=lambda: pool is None or pool.num_ready > 0)
    server = HttpServer(app, settings, tls)
    counters.add_gauge("manyeyes_connections", "Open connections.", (), lambda: {(): server.num_connections})
    counters.add_gauge("manyeyes_body_bytes", "Bodies in memory.", (), lambda: {(): server.bodies_bytes})
    ended = asyncio.Event()

    def end() -> None:
        if not ended.is_set():
            ended.set()
            on_end()

    _on_signals(loop, end)
    # Probes are answered from the first moment; everything else when the models are there.
    await server.start(listener)
    try:
        if pool is not None:
            await pool.start()
        if not await _unless(ended, catalog.refresh()):
            return
        if on_start is not None:
            cards = tuple(model.card for versions in catalog.models.values() for model in versions.values())
            on_start(Started(url, cards))
        polling = asyncio.create_task(_poll(catalog, settings.poll_seconds))
        await ended.wait()
        _log.info("Ending: no new requests, those under way are finished")
        app.is_draining = True
        await asyncio.sleep(settings.drain_delay_seconds)
        polling.cancel()
        await asyncio.gather(polling, return_exceptions=True)
    finally:
        await server.drain(settings.drain_timeout_seconds)
        await catalog.close(_CLOSE_SECONDS)
        if pool is not None:
            await pool.close()


async def _unless(ended: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Do `work`, unless the end comes first; True if it was done."""
    doing = asyncio.create_task(work)
    waiting = asyncio.create_task(ended.wait())
    await asyncio.wait({doing, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if doing.done():
        doing.result()
        return True
    doing.cancel()
    await asyncio.gather(doing, return_exceptions=True)
    return False


async def _poll(catalog: Catalog, seconds: float) -> None:
    while True:
        await asyncio.sleep(seconds)
        try:
            await catalog.refresh()
        except (ManyeyesError, OSError) as error:
            _log.error("The models can't be looked at, those that are loaded go on", extra={"why": str(error)})
        except Exception:
            _log.exception("The models can't be looked at, those that are loaded go on")


def _cut_off() -> None:
    _log.warning("Something that is under way does not end in time, and is cut off")
    os._exit(0)


def _on_signals(loop: asyncio.AbstractEventLoop, end: Callable[[], None]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        try:
            loop.add_signal_handler(number, end)
        except (ValueError, RuntimeError):  # not in the main thread: no signals come here
            return


def _load_tls(settings: ServeSettings) -> ssl.SSLContext | None:
    if settings.tls_cert is None and settings.tls_key is None:
        return None
    if settings.tls_cert is None or settings.tls_key is None:
        raise UsageError("TLS needs both a certificate and its key. Give --tls-cert and --tls-key.")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=functools.partial(_no_password))
    except (OSError, ssl.SSLError, ValueError) as error:
        raise UsageError(
            f"The certificate {settings.tls_cert} or its key {settings.tls_key} can't be used: {error}."
        ) from None
    context.set_alpn_protocols(["http/1.1"])
    return context


def _no_password() -> str:
    # Without this OpenSSL would ask on the terminal, and a service would hang.
    raise ValueError("the key is locked by a password; give one without")


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, OverflowError, UnicodeError) as error:
        raise UsageError(
            f"Can't serve on {host}:{port}: {error}. Use --host 127.0.0.1 or an address of this machine."
        ) from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        listener.close()
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"Can't serve on {host}:{port}: {why}. Choose another --port; --port 0 takes a free one."
        ) from None
    return listener
