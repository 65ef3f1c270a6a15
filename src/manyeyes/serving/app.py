"""The application: what each route of the server does."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

import manyeyes
from manyeyes.recognition.saliency import overlay
from manyeyes.serving import docs_page, metrics, openapi, v2
from manyeyes.serving.catalog import Catalog, Choice
from manyeyes.serving.forms import read_form
from manyeyes.serving.jobs import OVERLOADED, Failure, Job
from manyeyes.serving.limits import check_image, cors_headers, has_token
from manyeyes.serving.messages import Application, Request, Response, header_lines
from manyeyes.serving.metrics import Metrics
from manyeyes.serving.models import Model
from manyeyes.serving.page import read_page
from manyeyes.serving.parameters import Parameters, read_parameters
from manyeyes.serving.routes import Route, Router
from manyeyes.serving.settings import ServeSettings

_log = logging.getLogger(__name__)
# A page is one file without outside parts, and the browser is told to hold it to that.
_PAGE_HEADERS = (
    (
        "content-security-policy",
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src blob: data:; "
        "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
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
        self._explaining = asyncio.Lock()
        self.read_query = functools.lru_cache(maxsize=256)(
            functools.partial(read_parameters, default_top_k=settings.default_top_k)
        )
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

    # --- what the server asks (see http.Application)

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
            return self._to_response(Failure(503, "The server is not ready", "loading", "models are being loaded"))
        request.handler = getattr(self, route.handler)
        return self._check_body_type(request, route) if route.body else None

    def handle(self, request: Request) -> Response | Coroutine[Any, Any, Response] | None:
        """See Application."""
        return request.handler(request)

    def refusal(self, status: int, reason: str, detail: str) -> Response:
        """See Application."""
        error = "The server failed" if status >= 500 and status != 503 else "The request can't be answered"
        return self._to_response(Failure(status, error, reason, detail))

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

    # --- recognition

    def recognize(self, request: Request) -> Response | Coroutine[Any, Any, Response] | None:
        """POST /v1/recognize."""
        asked = self._read_choice(request)
        if isinstance(asked, Failure):
            return self._to_response(asked)
        parameters, choice = asked
        if request.headers.get(b"content-type", b"")[:10].lower() == b"multipart/":
            return self._recognize_form(request, parameters)
        encoded = request.body
        failure = self.check_image(encoded)
        if failure is not None:
            return self._to_response(failure)
        job = Job(encoded, parameters.top_k, functools.partial(self._answer, request, choice, encoded))
        request.on_gone = functools.partial(setattr, job, "gone", True)
        if not choice.model.submit(job):
            return self._to_response(OVERLOADED)
        return None

    def _answer(self, request: Request, choice: Choice, encoded: bytes, job: Job) -> None:
        failure = job.failure
        if failure is not None:
            response = self._to_response(failure)
            request.respond(response.status, response.body, extra=header_lines(response.headers) + request.extra)
            return
        card = choice.model.card
        request.respond(
            200,
            b'{"predictions":%s,"model":%s,"timings_ms":%s}'
            % (job.payload, _model_json(card.name, card.version), job.timings_json()),
        )
        if choice.shadow is not None:
            self._ask_shadow(choice.shadow, encoded, job.label)

    async def _recognize_form(self, request: Request, parameters: Parameters) -> Response:
        images = await asyncio.to_thread(read_form, request.header(b"content-type"), request.body, self.settings)
        if isinstance(images, Failure):
            return self._to_response(images)
        choice = self.choose(request, parameters)
        if isinstance(choice, Failure):
            return self._to_response(choice)
        jobs = await self.run_all(choice.model, list(images), parameters.top_k)
        if isinstance(jobs, Failure):
            return self._to_response(jobs)
        results = [
            json.dumps(job.failure.to_dict(), ensure_ascii=False).encode()
            if job.failure
            else b'{"predictions":%s,"timings_ms":%s}' % (job.payload, job.timings_json())
            for job in jobs
        ]
        card = choice.model.card
        if choice.shadow is not None:
            for encoded, job in zip(images, jobs, strict=True):
                if job.failure is None:
                    self._ask_shadow(choice.shadow, encoded, job.label)
        return Response(
            200, b'{"results":[%s],"model":%s}' % (b",".join(results), _model_json(card.name, card.version))
        )

    async def run_all(self, model: Model, contents: list[Any], top_k: int) -> list[Job] | Failure:
        """Run several images of one request through a model; a bad one fails alone.

        Args:
            contents: encoded images, or model inputs.
            top_k: 0 asks for the logits.

        Returns:
            A finished job for each, in order; or why none was taken.
        """
        finished = asyncio.Event()
        left = len(contents)

        def done(job: Job) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                finished.set()

        jobs = [Job(content, top_k, done) for content in contents]
        wanted = []
        for job in jobs:
            failure = self.check_image(job.content) if isinstance(job.content, bytes) else None
            if failure is None:
                wanted.append(job)
            else:
                job.failure = failure
                left -= 1
        if not model.has_room_for(len(wanted)):
            return self.count(OVERLOADED)
        for job in wanted:
            if not model.submit(job):
                job.failure = OVERLOADED
                left -= 1
        if left:
            await finished.wait()
        for job in jobs:
            if job.failure is not None:
                self.count(job.failure)
        return jobs

    def _ask_shadow(self, shadow: Model, encoded: bytes, label: int) -> None:
        def compare(job: Job) -> None:
            outcome = "failed" if job.failure else "true" if job.label == label else "false"
            self.metrics.shadow.add((shadow.card.name, shadow.card.version, outcome))

        # What answers goes first: a shadow that can't follow sees fewer images.
        if shadow.num_waiting * 4 > self.settings.max_queue or not shadow.submit(Job(encoded, 1, compare)):
            self.metrics.shadow.add((shadow.card.name, shadow.card.version, "dropped"))

    async def saliency(self, request: Request) -> Response:
        """POST /v1/saliency."""
        asked = self._read_choice(request)
        if isinstance(asked, Failure):
            return self._to_response(asked)
        parameters, choice = asked
        failure = self.check_image(request.body)
        if failure is not None:
            return self._to_response(failure)
        card = choice.model.card
        if parameters.label is not None and parameters.label >= len(card.class_names):
            return self.refusal(400, "bad_request", f"label={parameters.label}, there are {len(card.class_names)}")
        # It costs as much as hundreds of predictions, so that there is one at a time.
        if self._explaining.locked():
            return self._to_response(OVERLOADED)
        async with self._explaining:
            explanation = await choice.model.explain(request.body, parameters.label)
        if isinstance(explanation, Failure):
            return self._to_response(explanation)
        if parameters.format == "png":
            return Response(200, overlay(explanation.pixels, explanation.saliency), b"image/png")
        return _json(
            {
                "label": explanation.label,
                "class_name": card.class_names[explanation.label],
                "saliency": [[round(value, 4) for value in row] for row in explanation.saliency.tolist()],
                "model": {"name": card.name, "version": card.version},
            }
        )

    def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _json(
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
        return _json(content)

    def readyz(self, request: Request) -> Response:
        """GET /readyz."""
        status = "draining" if self.is_draining else "ready" if self.is_ready else "loading"
        return _json({"status": status}, 200 if status == "ready" else 503)

    def read_metrics(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(200, self.metrics.to_text(), metrics.CONTENT_TYPE)

    def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return _json(openapi.describe(self.settings))

    def docs(self, request: Request) -> Response:
        """GET /docs."""
        return Response(200, docs_page.to_html(openapi.describe(self.settings)), _HTML, _PAGE_HEADERS)

    def page(self, request: Request) -> Response:
        """GET /."""
        return Response(200, self._page, _HTML, _PAGE_HEADERS)

    # --- the Open Inference Protocol

    def v2_server(self, request: Request) -> Response:
        """GET /v2."""
        return _json({"name": "manyeyes", "version": manyeyes.__version__, "extensions": v2.EXTENSIONS})

    def v2_live(self, request: Request) -> Response:
        """GET /v2/health/live."""
        return _json({"live": True})

    def v2_ready(self, request: Request) -> Response:
        """GET /v2/health/ready."""
        return _json({"ready": self.is_ready}, 200 if self.is_ready else 503)

    def v2_model(self, request: Request) -> Response:
        """GET /v2/models/{model}."""
        return self._of_v2_model(
            request, lambda model: v2.metadata(model.card, list(self.catalog.models[model.card.name]))
        )

    def v2_model_ready(self, request: Request) -> Response:
        """GET /v2/models/{model}/ready."""
        return self._of_v2_model(request, lambda model: {"name": model.card.name, "ready": True})

    async def v2_infer(self, request: Request) -> Response:
        """POST /v2/models/{model}/infer."""
        choice = self._choose_v2(request)
        if isinstance(choice, Failure):
            return v2.to_response(self.count(choice))
        card = choice.model.card
        try:
            asked = v2.read_request(
                request.body, request.header(b"inference-header-content-length"), card, self.settings
            )
        except v2.RequestError as error:
            return v2.to_response(self.count(error.failure))
        jobs = await self.run_all(choice.model, asked.images, 0)
        if isinstance(jobs, Failure):
            return v2.to_response(jobs)
        for job in jobs:
            # A tensor has no place for the error of one image.
            if job.failure is not None:
                return v2.to_response(job.failure)
        return v2.answer(asked, card, [job.payload for job in jobs])

    def _of_v2_model(self, request: Request, tell: Callable[[Model], dict[str, Any]]) -> Response:
        choice = self._choose_v2(request)
        return v2.to_response(self.count(choice)) if isinstance(choice, Failure) else _json(tell(choice.model))

    def _choose_v2(self, request: Request) -> Choice | Failure:
        names = request.path_parameters
        return self.catalog.choose(names["model"], names.get("version"), request.id if request.has_own_id else None)

    # --- shared

    def _read_choice(self, request: Request) -> tuple[Parameters, Choice] | Failure:
        """What the query asks for, and the version that answers it."""
        parameters = self.read_query(request.query)
        if isinstance(parameters, Failure):
            return parameters
        choice = self.choose(request, parameters)
        return choice if isinstance(choice, Failure) else (parameters, choice)

    def choose(self, request: Request, parameters: Parameters) -> Choice | Failure:
        """The version that answers a request."""
        return self.catalog.choose(parameters.model, parameters.version, request.id if request.has_own_id else None)

    def check_image(self, encoded: bytes) -> Failure | None:
        """Look at an image's header, and count its size."""
        info = check_image(encoded, self.settings)
        if isinstance(info, Failure):
            return info
        self.metrics.pixels.observe((), info.width * info.height)
        self.metrics.bytes.observe((), len(encoded))
        return None

    def count(self, failure: Failure) -> Failure:
        """Count a failure by its reason."""
        self.metrics.errors.add((failure.reason,))
        return failure

    def _to_response(self, failure: Failure) -> Response:
        self.count(failure)
        return _json(failure.to_dict(), failure.status, (("retry-after", "1"),) if failure.status == 503 else ())

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
            ("access-control-allow-headers", "authorization, content-type, x-request-id"),
            ("access-control-max-age", "600"),
        ),
    )


@functools.lru_cache(maxsize=256)
def _model_json(name: str, version: str) -> bytes:
    return json.dumps({"name": name, "version": version}, separators=(",", ":")).encode()


def _json(content: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    return Response(status, json.dumps(content, ensure_ascii=False).encode(), headers=headers)
