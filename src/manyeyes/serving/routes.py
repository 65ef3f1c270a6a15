"""The one table of routes: what the server answers, and what its description says of it."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from typing import Any

_IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp", "image/tiff", "image/gif")
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORM_SCHEMA = {
    "type": "object",
    "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}, "minItems": 1}},
    "required": ["image"],
}
IMAGE_BODY = dict.fromkeys((*_IMAGE_TYPES, "application/octet-stream"), _BINARY)
IMAGE_OR_FORM_BODY = {**IMAGE_BODY, "multipart/form-data": {"schema": _FORM_SCHEMA}}


@dataclass(frozen=True)
class Parameter:
    """A parameter of a query."""

    name: str
    schema: dict[str, Any]
    description: str


@dataclass(frozen=True)
class Route:
    """One operation.

    Attributes:
        handler: name of the method of the application, or of Recognition or V2Handlers, that answers.
        open: answers without a token (probes, the page, the documentation).
        parameters: of the query; those of the path stand in the path.
        body: media types of the request.
        answer: name of the schema of a 200, or None.
        answer_types: media types of a 200.
        statuses: that it may answer besides 200.
        early: answers also while models are loaded.
    """

    method: str
    path: str
    handler: str
    summary: str
    tag: str = "operations"
    open: bool = False
    parameters: tuple[Parameter, ...] = ()
    body: dict[str, Any] | None = None
    answer: str | None = None
    answer_types: tuple[str, ...] = ("application/json",)
    statuses: tuple[int, ...] = ()
    early: bool = False


_TOP_K = Parameter("top_k", {"type": "integer", "minimum": 1, "maximum": 999_999}, "Classes in the answer.")
_MODEL = Parameter("model", {"type": "string"}, "Name of the model; needed if there are several and no default.")
_VERSION = Parameter("version", {"type": "string"}, "Version of the model; default: as the traffic is split.")
_LABEL = Parameter(
    "label", {"type": "integer", "minimum": 0, "maximum": 999_999}, "The class to explain; default: the likeliest."
)
_FORMAT = Parameter("format", {"type": "string", "enum": ["json", "png"]}, "A grid of numbers, or a picture.")
_OF_IMAGES = (400, 404, 408, 413, 415, 422, 500, 502, 503)
_V2_MODEL = "/v2/models/{model}"
_V2_VERSION = "/v2/models/{model}/versions/{version}"

ROUTES = (
    Route(
        "POST",
        "/v1/recognize",
        "recognize",
        "Recognise an image (its bytes are the body), or several (as a form)",
        tag="recognition",
        parameters=(_TOP_K, _MODEL, _VERSION),
        body=IMAGE_OR_FORM_BODY,
        answer="Recognition",
        statuses=_OF_IMAGES,
    ),
    Route(
        "POST",
        "/v1/saliency",
        "saliency",
        "Which pixels of an image decided",
        tag="recognition",
        parameters=(_LABEL, _FORMAT, _MODEL, _VERSION),
        body=IMAGE_BODY,
        answer="Saliency",
        answer_types=("application/json", "image/png"),
        statuses=_OF_IMAGES,
    ),
    Route("GET", "/v1/models", "list_models", "The models that are served", tag="recognition", answer="Models"),
    Route("GET", "/healthz", "healthz", "Is the process alive?", open=True, answer="Health", early=True),
    Route("GET", "/readyz", "readyz", "May requests come?", open=True, answer="Status", statuses=(503,), early=True),
    Route("GET", "/metrics", "read_metrics", "Counters for Prometheus", answer_types=("text/plain",), early=True),
    Route("GET", "/openapi.json", "openapi", "This description", open=True, answer="Any", early=True),
    Route("GET", "/docs", "docs", "This description, to read", open=True, answer_types=("text/html",), early=True),
    Route("GET", "/", "page", "A page to try it", open=True, answer_types=("text/html",), early=True),
    Route("GET", "/v2", "v2_server", "The server (Open Inference Protocol)", tag="v2", answer="V2Server", early=True),
    Route(
        "GET",
        "/v2/health/live",
        "v2_live",
        "Is the process alive?",
        tag="v2",
        open=True,
        answer="V2Live",
        early=True,
    ),
    Route(
        "GET",
        "/v2/health/ready",
        "v2_ready",
        "May requests come?",
        tag="v2",
        open=True,
        answer="V2Ready",
        statuses=(503,),
        early=True,
    ),
    *(
        route
        for path in (_V2_MODEL, _V2_VERSION)
        for route in (
            Route(
                "GET", path, "v2_model", "Inputs and outputs of a model", tag="v2", answer="V2Model", statuses=(404,)
            ),
            Route(
                "GET",
                f"{path}/ready",
                "v2_model_ready",
                "May requests to a model come?",
                tag="v2",
                answer="V2ModelReady",
                statuses=(404,),
            ),
            Route(
                "POST",
                f"{path}/infer",
                "v2_infer",
                "Recognise images or model inputs",
                tag="v2",
                body={"application/json": {"schema": {"$ref": "#/components/schemas/V2Request"}}},
                answer="V2Answer",
                statuses=_OF_IMAGES,
            ),
        )
    ),
)


class Router:
    """Finds the route of a method and a path."""

    def __init__(self, routes: tuple[Route, ...] = ROUTES) -> None:
        self._exact: dict[bytes, dict[bytes, Route]] = {}
        self._patterns: list[tuple[re.Pattern[str], dict[bytes, Route]]] = []
        by_path: dict[str, dict[bytes, Route]] = {}
        for route in routes:
            by_path.setdefault(route.path, {})[route.method.encode()] = route
        for path, methods in by_path.items():
            if "{" in path:
                self._patterns.append((re.compile(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", path)), methods))
            else:
                self._exact[path.encode()] = methods

    def find(self, path: bytes) -> tuple[dict[bytes, Route], dict[str, str]] | None:
        """Return the routes of `path` by method, and what its parts are; None if there is no such path."""
        methods = self._exact.get(path)
        if methods is not None:
            return methods, {}
        text = path.decode("latin-1")
        for pattern, methods in self._patterns:
            match = pattern.fullmatch(text)
            if match:
                return methods, {name: urllib.parse.unquote(part) for name, part in match.groupdict().items()}
        return None
