"""The application: which handler answers a request, whether it may come at all, and the routes of operations."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from manyeyes.serving import docs_page, metrics, openapi
from manyeyes.serving.answers import Refusals, in_json
from manyeyes.serving.catalog import Catalog
from manyeyes.serving.jobs import Failure, Job
from manyeyes.serving.limits import cors_headers, has_token
from manyeyes.serving.messages import Application, Request, Response, header_lines
from manyeyes.serving.metrics import Metrics
from manyeyes.serving.models import Model
from manyeyes.serving.page import read_page
from manyeyes.serving.recognition import Recognition
from manyeyes.serving.routes import ROUTES, Route, Router
from manyeyes.serving.settings import ServeSettings
from manyeyes.serving.v2_handlers import V2Handlers

_log = logging.getLogger(__name__)
# A page is one file without outside parts, and the browser is told to hold it to that.
_PAGE_HEADERS = (
    (
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; "
        "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("referrer-policy", "no-referrer"),
)
_HTML = b"text/html; charset=utf-8"
# A body that says it is something else than an image. (What curl says of --data-binary unless told is let pass.)
_REFUSED_CONTENT_TYPES = (b"application/json", b"text/", b"multipart/")


class App(Application):
    """Answers requests with the models of a catalog."""

    def __init__(
        self, catalog: Catalog, counters: Metrics, settings: ServeSettings, has_workers: Callable[[], bool]
    ) -> None:
        self.catalog = catalog
        self.metrics = counters
        self.settings = settings
        self.is_draining = False
        self._has_workers = has_workers
        self._router = Router()
        self._token = settings.token.encode() if settings.token else None
        self._page = read_page()
        self._status_texts: dict[int, str] = {}
        self._refusals = Refusals(counters)
        recognition = Recognition(catalog, counters, settings, self._refusals)
        v2 = V2Handlers(catalog, settings, self._refusals, lambda: self.is_ready, recognition.run_all)
        self._handlers = {
            name: next(getattr(part, name) for part in (self, recognition, v2) if hasattr(part, name))
            for name in {route.handler for route in ROUTES}
        }
        counters.add_gauge(
            "manyeyes_queue_depth",
            "Images that wait for a model.",
            ("model", "version"),
            lambda: {(model.card.name, model.card.version): model.num_waiting for model in self._all_models()},
        )
        counters.add_gauge("manyeyes_ready", "1 where requests may come.", (), lambda: {(): float(self.is_ready)})

    @property
    def is_ready(self) -> bool:
        """Whether requests may come."""
        return bool(self.catalog.models) and not self.is_draining and self._has_workers()

    # --- what the server asks (see messages.Application)

    def open(self, request: Request) -> Response | None:
        """See Application."""
        found = self._router.find(request.path)
        if found is None:
            request.label = "other"
            return self.refusal(404, "not_found", "there is nothing at this path; GET /docs says what there is")
        methods, request.path_parameters = found
        any_route = next(iter(methods.values()))
        request.label = any_route.path
        origin = request.headers.get(b"origin")
        if origin is not None and self.settings.cors_origins:
            request.extra = header_lines(cors_headers(origin.decode("latin-1"), self.settings.cors_origins))
            if request.extra and request.method == b"OPTIONS":
                return _preflight(methods)
        route = methods.get(b"GET" if request.method == b"HEAD" else request.method)
        if route is None:
            allowed = ", ".join(sorted(name.decode() for name in methods) + (["HEAD"] if b"GET" in methods else []))
            refusal = self.refusal(405, "method_not_allowed", f"this path takes {allowed}")
            return Response(refusal.status, refusal.body, headers=(("allow", allowed),))
        if (
            self._token is not None
            and not route.open
            and not has_token(request.headers.get(b"authorization", b""), self._token)
        ):
            refusal = self.refusal(401, "unauthorized", "send the header Authorization: Bearer TOKEN")
            return Response(401, refusal.body, headers=(("www-authenticate", "Bearer"),))
        if not self.catalog.models and not route.early:
            return self._refusals.answer(Failure(503, "The server is not ready", "loading", "models are being loaded"))
        request.handler = self._handlers[route.handler]
        return self._check_body_type(request, route) if route.body else None

    def handle(self, request: Request) -> Response | Coroutine[Any, Any, Response] | None:
        """See Application."""
        return request.handler(request)

    def refusal(self, status: int, reason: str, detail: str) -> Response:
        """See Application."""
        return self._refusals.refuse(status, reason, detail)

    def answered(self, request: Request, status: int, size_bytes: int) -> None:
        """See Application."""
        text = self._status_texts.get(status)
        if text is None:
            text = self._status_texts[status] = str(status)
        label = request.label or "none"
        seconds = time.perf_counter() - request.started
        self.metrics.requests.add((label, text))
        self.metrics.total.observe((label,), seconds)
        if self.settings.access_log or (status >= 500 and status != 503):
            _log.log(
                logging.ERROR if status >= 500 else logging.INFO,
                "request",
                extra={
                    "request_id": request.id.decode(),
                    "method": request.method.decode("latin-1"),
                    "path": request.path.decode("latin-1"),
                    "status": status,
                    "bytes": size_bytes,
                    "milliseconds": round(1e3 * seconds, 3),
                },
            )

    def deliver(self, model: Model, jobs: list[Job]) -> None:
        """Hand out jobs that a model has finished; in the event loop."""
        card, counters = model.card, self.metrics
        key = (card.name, card.version)
        num_answered = 0
        for job in jobs:
            if job.failure is None and job.batch_size:
                num_answered += 1
                counters.queue.observe(key, job.queue_seconds)
                counters.decode.observe(key, job.decode_seconds)
                counters.brightness.observe(key, job.brightness)
                counters.predictions.add((*key, card.class_names[job.label]))
                last = job
        if num_answered:
            counters.images.add(key, num_answered)
            counters.predict.observe(key, last.predict_seconds)
            counters.batch_size.observe(key, last.batch_size)
        for job in jobs:
            job.done(job)

    def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        return in_json(
            {
                "models": [
                    {
                        "name": name,
                        "default": name == self.catalog.default_name,
                        "default_version": self.catalog.default_version(name),
                        "canary_version": self.catalog.traffic(name).canary,
                        "canary_weight": self.catalog.traffic(name).canary_weight,
                        "shadow_version": self.catalog.traffic(name).shadow,
                        "versions": [openapi.card_to_dict(model.card) for model in versions.values()],
                    }
                    for name, versions in self.catalog.models.items()
                ]
            }
        )

    # --- operations

    def healthz(self, request: Request) -> Response:
        """GET /healthz: alive, and the model of requests that name none."""
        content: dict[str, Any] = {"status": "ok", "ready": self.is_ready}
        name = self.catalog.default_name
        if name is not None:
            card = self.catalog.models[name][self.catalog.default_version(name)].card
            content |= {
                "model": {"name": card.name, "version": card.version},
                "num_classes": len(card.class_names),
                "input_shape": list(card.input_shape),
                "backend": card.backend,
                "precision": card.precision,
            }
        return in_json(content)

    def readyz(self, request: Request) -> Response:
        """GET /readyz."""
        status = "draining" if self.is_draining else "ready" if self.is_ready else "loading"
        return in_json({"status": status}, 200 if status == "ready" else 503)

    def read_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(200, self.metrics.to_text(), metrics.CONTENT_TYPE)

    def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return in_json(openapi.describe(self.settings))

    def docs(self, request: Request) -> Response:
        """GET /docs."""
        return Response(200, docs_page.to_html(openapi.describe(self.settings)), _HTML, _PAGE_HEADERS)

    def page(self, request: Request) -> Response:
        """GET /."""
        return Response(200, self._page, _HTML, _PAGE_HEADERS)

    def _check_body_type(self, request: Request, route: Route) -> Response | None:
        headers = request.headers
        if b"content-encoding" in headers and headers[b"content-encoding"].lower() != b"identity":
            return self.refusal(415, "unsupported_format", "send the body without Content-Encoding")
        assert route.body is not None
        if "application/json" in route.body:
            return None
        content_type = headers.get(b"content-type", b"").lower()
        is_form = content_type.startswith(b"multipart/form-data") and "multipart/form-data" in route.body
        if content_type.startswith(_REFUSED_CONTENT_TYPES) and not is_form:
            shown = content_type[:60].decode("latin-1")
            return self.refusal(415, "unsupported_format", f"the body is {shown}; send the bytes of the image alone")
        return None

    def _all_models(self) -> list[Model]:
        return [model for versions in self.catalog.models.values() for model in versions.values()]


def _preflight(methods: dict[bytes, Route]) -> Response:
    return Response(
        200,
        headers=(
            ("access-control-allow-methods", ", ".join(name.decode() for name in methods)),
            (
                "access-control-allow-headers",
                "authorization, content-type, inference-header-content-length, x-request-id",
            ),
            ("access-control-max-age", "600"),
        ),
    )
