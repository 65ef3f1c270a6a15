"""The description of the server (OpenAPI 3.1), made of the table of routes."""

from __future__ import annotations

import dataclasses
from typing import Any

import manyeyes
from manyeyes.serving.models import ModelCard
from manyeyes.serving.routes import ROUTES, Route
from manyeyes.serving.settings import ServeSettings

_TEXT: dict[str, Any] = {"type": "string"}
_NUMBER: dict[str, Any] = {"type": "number"}
_COUNT: dict[str, Any] = {"type": "integer", "minimum": 0}
_FREE: dict[str, Any] = {"type": "object", "additionalProperties": True}
_TEXT_OR_NONE: dict[str, Any] = {"type": ["string", "null"]}
_SHARE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
_SHARE_OR_NONE: dict[str, Any] = {"type": ["number", "null"], "minimum": 0, "maximum": 1}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


_MODEL = _object({"name": _TEXT, "version": _TEXT})
_TENSOR = _object({"name": _TEXT, "datatype": _TEXT, "shape": _list({"type": "integer"})})
_ABSTAIN: dict[str, Any] = {
    "abstain": {
        "type": "boolean",
        "description": "Whether the likeliest class is too unlikely to rely on; told if the model has a threshold.",
    }
}
_SCHEMAS: dict[str, Any] = {
    "Any": _FREE,
    "Error": _object({"error": _TEXT, "reason": _TEXT, "detail": _TEXT}),
    "Candidate": _object({"label": _COUNT, "class_name": _TEXT, "probability": _NUMBER}),
    "Timings": _object({"queue": _NUMBER, "decode": _NUMBER, "predict": _NUMBER}),
    "Prediction": _object({"predictions": _list(_ref("Candidate")), "timings_ms": _ref("Timings")}, _ABSTAIN),
    "Recognition": {
        "anyOf": [
            _object(
                {"predictions": _list(_ref("Candidate")), "model": _MODEL, "timings_ms": _ref("Timings")},
                _ABSTAIN,
            ),
            _object(
                {"results": _list({"anyOf": [_ref("Prediction"), _ref("Error")]}), "model": _MODEL},
            ),
        ]
    },
    "Saliency": _object({"label": _COUNT, "class_name": _TEXT, "saliency": _list(_list(_NUMBER)), "model": _MODEL}),
    "Version": _object(
        {
            "name": _TEXT,
            "version": _TEXT,
            "fingerprint": _TEXT,
            "class_names": _list(_TEXT),
            "preprocessing": _FREE,
            "input_shape": _list(_COUNT),
            "backend": _TEXT,
            "precision": _TEXT,
            "threshold": _SHARE_OR_NONE,
            "max_batch_size": _COUNT,
            "latency_ms_by_batch_size": _FREE,
            "parity": _FREE,
            "evaluation": {"anyOf": [_ref("Evaluation"), {"type": "null"}]},
            "provenance": _FREE,
        }
    ),
    "Evaluation": _object(
        {
            "dataset": _TEXT,
            "dataset_fingerprint": _TEXT,
            "split": _TEXT,
            "num_examples": _COUNT,
            "confidence": _SHARE,
            "accuracy": _SHARE,
            "accuracy_interval": {**_list(_SHARE), "minItems": 2, "maxItems": 2},
            "top_k_accuracy": {"type": "object", "additionalProperties": _SHARE},
            "macro_f1": _SHARE,
            # By label.
            "precision": _list(_SHARE_OR_NONE),
            "recall": _list(_SHARE_OR_NONE),
            "f1": _list(_SHARE_OR_NONE),
            "support": _list(_COUNT),
        }
    ),
    "Models": _object(
        {
            "models": _list(
                _object(
                    {
                        "name": _TEXT,
                        "default": {"type": "boolean"},
                        "default_version": _TEXT,
                        "canary_version": _TEXT_OR_NONE,
                        "canary_weight": _NUMBER,
                        "shadow_version": _TEXT_OR_NONE,
                        "versions": _list(_ref("Version")),
                    }
                )
            )
        }
    ),
    "Health": _object({"status": _TEXT, "ready": {"type": "boolean"}}, {"model": _MODEL}),
    "Status": _object({"status": _TEXT}),
    "V2Server": _object({"name": _TEXT, "version": _TEXT, "extensions": _list(_TEXT)}),
    "V2Live": _object({"live": {"type": "boolean"}}),
    "V2Ready": _object({"ready": {"type": "boolean"}}),
    "V2Model": _object(
        {
            "name": _TEXT,
            "versions": _list(_TEXT),
            "platform": _TEXT,
            "inputs": _list(_TENSOR),
            "outputs": _list(_TENSOR),
        }
    ),
    "V2ModelReady": _object({"name": _TEXT, "ready": {"type": "boolean"}}),
    "V2Request": _object(
        {
            "inputs": {
                "type": "array",
                "minItems": 1,
                "maxItems": 1,
                "items": _object(
                    {
                        "name": {"type": "string", "enum": ["image", "encoded"]},
                        "datatype": {"type": "string", "enum": ["UINT8", "BYTES"]},
                        "shape": _list(_COUNT),
                    },
                    {"data": {"type": "array"}, "parameters": _FREE},
                ),
            }
        },
        {
            "id": _TEXT,
            "parameters": _FREE,
            "outputs": {
                "type": "array",
                "minItems": 1,
                "maxItems": 3,
                "items": _object(
                    {"name": {"type": "string", "enum": ["logits", "probabilities", "label"]}}, {"parameters": _FREE}
                ),
            },
        },
    ),
    "V2Answer": _object({"model_name": _TEXT, "model_version": _TEXT, "outputs": _list(_TENSOR)}, {"id": _TEXT}),
}
_MEANINGS = {
    400: "The request can't be understood, or the body is empty",
    401: "The token is missing or wrong",
    404: "There is no such model or version",
    408: "The request was not sent in time",
    413: "The body, the image or the number of images is larger than the limit",
    415: "The body is no image, or of a format that is not read",
    422: "The image is damaged",
    431: "The head of the request is longer than the limit",
    500: "The server failed; its log says why",
    502: "The process that worked on the request ended; try again",
    503: "Too much waits, or the server is starting or ending; Retry-After says when to come again",
}


def describe(settings: ServeSettings) -> dict[str, Any]:
    """The OpenAPI document."""
    paths: dict[str, Any] = {}
    for route in ROUTES:
        paths.setdefault(route.path, {})[route.method.lower()] = _operation(route, settings)
    components: dict[str, Any] = {"schemas": _SCHEMAS}
    if settings.token is not None:
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Manyeyes",
            "version": manyeyes.__version__,
            "description": "Recognises images: their bytes in, the likeliest classes out.",
        },
        "paths": paths,
        "components": components,
    }


def card_to_dict(card: ModelCard) -> dict[str, Any]:
    """A version of a model in GET /v1/models."""
    return {
        "name": card.name,
        "version": card.version,
        "fingerprint": card.fingerprint,
        "class_names": list(card.class_names),
        "preprocessing": card.preprocessing,
        "input_shape": list(card.input_shape),
        "backend": card.backend,
        "precision": card.precision,
        "threshold": card.threshold,
        "max_batch_size": card.max_batch_size,
        "latency_ms_by_batch_size": {str(size): round(1e3 * seconds, 3) for size, seconds in card.latency_curve},
        "parity": card.parity,
        "evaluation": card.evaluation and _without_places(dataclasses.asdict(card.evaluation)),
        "provenance": _without_places(card.provenance),
    }


def _without_places(value: Any) -> Any:
    """The same with only the last part of each path or URI: where it lay is no matter of those who may ask."""
    if isinstance(value, dict):
        return {key: _without_places(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_places(each) for each in value]
    if isinstance(value, str) and (value.startswith("/") or "://" in value):
        return value.rstrip("/").rpartition("/")[2]
    return value


def _operation(route: Route, settings: ServeSettings) -> dict[str, Any]:
    in_path = [part[1:-1] for part in route.path.split("/") if part.startswith("{")]
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}} for name in in_path
    ] + [
        {"name": each.name, "in": "query", "schema": each.schema, "description": each.description}
        for each in route.parameters
    ]
    schema = _ref(route.answer) if route.answer else {"type": "string"}
    content = {
        media_type: {"schema": schema if media_type == "application/json" else {"type": "string"}}
        for media_type in route.answer_types
    }
    responses: dict[str, Any] = {"200": {"description": "The answer", "content": content}}
    statuses = set(route.statuses) | {431} | (set() if route.early else {503})
    if settings.token is not None and not route.open:
        statuses.add(401)
    for status in sorted(statuses):
        # The probes answer with what they always say, only with another status.
        failed = _ref(route.answer) if status == 503 and route.open and route.answer else _ref("Error")
        responses[str(status)] = {
            "description": _MEANINGS[status],
            "content": {"application/json": {"schema": failed}},
        }
    operation: dict[str, Any] = {
        "operationId": f"{route.handler}{'_of_version' if '{version}' in route.path else ''}",
        "summary": route.summary,
        "tags": [route.tag],
        "responses": responses,
    }
    if parameters:
        operation["parameters"] = parameters
    if route.body is not None:
        operation["requestBody"] = {"required": True, "content": route.body}
    if settings.token is not None and not route.open:
        operation["security"] = [{"token": []}]
    return operation
