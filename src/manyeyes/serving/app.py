"""A bundle behind HTTP: raw image bytes in, the likeliest classes out as JSON, and a page to try it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.resources
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np

from manyeyes.engines.base import available_cores
from manyeyes.errors import ImageError, MissingExtraError, Reason, UsageError
from manyeyes.imaging.decode import DecodeLimits
from manyeyes.recognition.bundle import BackendName
from manyeyes.recognition.predictor import Prediction, Predictor

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import HTMLResponse, JSONResponse, Response
    from starlette.routing import Route
except ImportError:
    raise MissingExtraError("Serving", "serve") from None

# The page is one file without outside parts, and the browser is told to hold it to that.
_PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_STATUS_OF_REASON = {
    Reason.EMPTY: 400,
    Reason.TOO_MANY_BYTES: 413,
    Reason.TOO_MANY_PIXELS: 413,
    Reason.NOT_AN_IMAGE: 415,
    Reason.UNSUPPORTED_FORMAT: 415,
}
_UNDECODABLE = 422
# A body that says it is something else than an image. (What curl says of --data-binary unless told is let pass.)
_REFUSED_CONTENT_TYPES = ("multipart/", "application/json", "text/")


@dataclass(frozen=True)
class ServeSettings:
    """What a request may be.

    Attributes:
        default_top_k: classes in an answer when the request does not say.
        max_body_bytes: of one request; more is refused while it is read.
        max_pixels: of one image, as its header says; more is refused before it is decoded.
    """

    default_top_k: int = 5
    max_body_bytes: int = 32 * 1024 * 1024
    max_pixels: int = 50_000_000


@dataclass(frozen=True)
class Answer:
    """A prediction, and how long its parts took in milliseconds."""

    prediction: Prediction
    decode_ms: float
    predict_ms: float


class RequestError(Exception):
    """A request that can't be answered; becomes a response with `status` and {error, reason, detail}."""

    def __init__(self, status: int, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.reason = reason
        self.detail = detail


class Recognizer:
    """Answers requests on threads of its own, so that the event loop only ever moves bytes."""

    def __init__(self, predictor: Predictor, settings: ServeSettings) -> None:
        self.predictor = predictor
        self._limits = DecodeLimits(max_pixels=settings.max_pixels, max_bytes=settings.max_body_bytes)
        num_threads = max(2, available_cores())
        self._pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="recognize")
        # The first prediction on a thread is many times slower than the next; no request shall wait for it.
        all_started = threading.Barrier(num_threads)
        list(self._pool.map(self._warm_up, [all_started] * num_threads))

    async def recognize(self, encoded: bytes, top_k: int) -> Answer:
        """Decode one image and predict. Raises ImageError."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._answer, encoded, top_k)

    def close(self) -> None:
        """Finish what is under way and end the threads."""
        self._pool.shutdown()

    def _warm_up(self, all_started: threading.Barrier) -> None:
        all_started.wait(timeout=60)
        self.predictor.predict_pixels(np.zeros((1, *self.predictor.bundle.info.input_shape), np.uint8))

    def _answer(self, encoded: bytes, top_k: int) -> Answer:
        started = time.perf_counter()
        pixels = self.predictor.preprocess(encoded, self._limits)
        decoded = time.perf_counter()
        (prediction,) = self.predictor.predict_pixels(pixels[None], top_k)
        ended = time.perf_counter()
        return Answer(prediction, 1e3 * (decoded - started), 1e3 * (ended - decoded))


def create_app(predictor: Predictor, settings: ServeSettings | None = None) -> Starlette:
    """Return the ASGI application that serves `predictor`.

    POST /v1/recognize?top_k=5 takes the bytes of an image; GET /healthz says that the model is ready; GET / is a page.
    """
    settings = settings or ServeSettings()
    recognizer = Recognizer(predictor, settings)
    info = predictor.bundle.info
    model = {"name": info.name, "version": info.fingerprint}
    health = {
        "status": "ok",
        "model": model,
        "num_classes": len(info.class_names),
        "input_shape": list(info.input_shape),
        "backend": predictor.backend.name,
        "precision": predictor.backend.precision,
    }
    page = importlib.resources.files("manyeyes.serving").joinpath("page", "index.html").read_text(encoding="utf-8")

    async def recognize(request: Request) -> Response:
        top_k = _read_top_k(request, settings.default_top_k)
        encoded = await _read_body(request, settings.max_body_bytes)
        answer = await recognizer.recognize(encoded, top_k)
        predictions = [dataclasses.asdict(candidate) for candidate in answer.prediction.top_k]
        timings = {"decode": round(answer.decode_ms, 3), "predict": round(answer.predict_ms, 3)}
        return JSONResponse({"predictions": predictions, "model": model, "timings_ms": timings})

    async def healthz(request: Request) -> Response:
        return JSONResponse(health)

    async def index(request: Request) -> Response:
        return HTMLResponse(
            page, headers={"Content-Security-Policy": _PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        recognizer.close()

    return Starlette(
        routes=[
            Route("/v1/recognize", recognize, methods=["POST"]),
            Route("/healthz", healthz),
            Route("/", index),
        ],
        exception_handlers={
            ImageError: _on_image_error,
            RequestError: _on_request_error,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_disconnect,
            Exception: _on_unexpected,
        },
        lifespan=lifespan,
    )


def serve(
    bundle: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    backend: BackendName | None = None,
    settings: ServeSettings | None = None,
    on_start: Callable[[str, Predictor], None] | None = None,
) -> None:
    """Serve the bundle at the URI `bundle` until SIGINT or SIGTERM; requests under way are finished first.

    Args:
        port: 0 takes a free one.
        on_start: called with the URL and the predictor as soon as connections are taken.

    Raises:
        UsageError: the address can't be used.
        BundleError: see Predictor.load.
    """
    listener = _bind(host, port)
    try:
        predictor = Predictor.load(bundle, backend)
        application = create_app(predictor, settings)
        listener.listen(1024)
        if on_start is not None:
            shown = f"[{host}]" if ":" in host else host
            on_start(f"http://{shown}:{listener.getsockname()[1]}", predictor)
        server = uvicorn.Server(
            uvicorn.Config(
                application, log_level="warning", access_log=False, timeout_graceful_shutdown=10, server_header=False
            )
        )
        with _end_quietly():
            server.run(sockets=[listener])
    finally:
        listener.close()


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


@contextlib.contextmanager
def _end_quietly() -> Any:
    # uvicorn raises the signal that ended it once more, after it has closed everything: for us that is a normal end.
    def leave(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread: no signals come here
        yield
        return
    try:
        with contextlib.suppress(KeyboardInterrupt):
            yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _read_top_k(request: Request, default: int) -> int:
    text = request.query_params.get("top_k")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 6 and int(text) >= 1):
        raise RequestError(400, "bad_request", f"top_k={text[:40]!r} is not a number of at least 1")
    return int(text)


async def _read_body(request: Request, max_bytes: int) -> bytes:
    content_type = request.headers.get("content-type", "").lower()
    if content_type.startswith(_REFUSED_CONTENT_TYPES):
        raise RequestError(
            415, "unsupported_format", f"the body is {content_type[:60]}; send the bytes of the image alone"
        )
    too_long = RequestError(413, Reason.TOO_MANY_BYTES.value, f"the body is longer than {max_bytes} bytes")
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdigit() and int(length) > max_bytes:
        raise too_long
    chunks = []
    size_bytes = 0
    async for chunk in request.stream():
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise too_long
        chunks.append(chunk)
    return b"".join(chunks)


def _error(status: int, error: str, reason: str, detail: str) -> JSONResponse:
    # The rest of a body that is too long is not read, so the connection can't be used again.
    headers = {"Connection": "close"} if status == 413 else None
    return JSONResponse({"error": error, "reason": reason, "detail": detail}, status_code=status, headers=headers)


async def _on_image_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ImageError)
    return _error(
        _STATUS_OF_REASON.get(error.reason, _UNDECODABLE), "The image can't be used", error.reason.value, error.detail
    )


async def _on_request_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return _error(error.status, "The request can't be answered", error.reason, error.detail)


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reason = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad_request")
    response = _error(error.status_code, "The request can't be answered", reason, error.detail)
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(request: Request, error: Exception) -> Response:
    # Nobody is there to read it; the status is for middleware and logs.
    return Response(status_code=400)


async def _on_unexpected(request: Request, error: Exception) -> Response:
    return _error(500, "The server failed", "internal", type(error).__name__)
