"""The description of the server, held against the server."""

from __future__ import annotations

import copy
import json
import math
import re
from typing import Any

import cv2
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from manyeyes.serving.openapi import describe
from manyeyes.serving.routes import ROUTES
from manyeyes.serving.settings import ServeSettings

_PIXELS = np.random.default_rng(5).integers(0, 255, (40, 50, 3), dtype=np.uint8)
_SUFFIXES = {"jpeg": ".jpg", "png": ".png", "webp": ".webp", "bmp": ".bmp", "tiff": ".tiff", "gif": ".gif"}
# Half of the bodies are images, the other half is what the schema allows: any bytes.
for _name, _suffix in _SUFFIXES.items():
    _image = cv2.imencode(_suffix, _PIXELS)[1].tobytes()
    schemathesis.openapi.media_type(f"image/{_name}", st.just(_image) | st.binary(max_size=200))

# The document does not depend on a running server; the requests go to one.
_DOCUMENT = describe(ServeSettings())


def _with_real_names(document: dict[str, Any]) -> dict[str, Any]:
    """The document with the name of the model that is served, which no draw would ever hit."""
    document = copy.deepcopy(document)
    for methods in document["paths"].values():
        for operation in methods.values():
            for parameter in operation.get("parameters", []):
                if parameter["name"] == "model":
                    parameter["schema"] = {"enum": ["cnn"]}
            operation["parameters"] = [
                parameter
                for parameter in operation.get("parameters", [])
                if (parameter["name"], parameter["in"]) != ("version", "query")
            ]
    return document


_SCHEMA = schemathesis.openapi.from_dict(_with_real_names(_DOCUMENT))
_CHECKS = (
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
)


@pytest.fixture(scope="module")
def base_url(server: Any) -> str:
    return server.url


@_SCHEMA.parametrize()
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_the_server_does_what_its_description_says(case: Any, base_url: str) -> None:
    # Whatever stands in a part of a form is bytes, so that nothing in it can be of a wrong type; and a form with a bad
    # image is answered, the image by its error.
    is_form = case.media_type == "multipart/form-data"
    checks = [check for check in _CHECKS if not (is_form and check is negative_data_rejection)]
    case.call_and_validate(base_url=base_url, checks=checks)


def _good_requests(image: bytes, shape: list[int]) -> dict[tuple[str, str], dict[str, Any]]:
    """(method, path) -> what makes a request that is answered; nothing for those that take no body."""
    pixels = {"name": "image", "shape": [1, *shape], "datatype": "UINT8", "data": [0] * math.prod(shape)}
    infer = {"body": {"inputs": [pixels]}, "media_type": "application/json"}
    one = {"body": image, "media_type": "image/png"}
    return {
        ("POST", "/v1/recognize"): one,
        ("POST", "/v1/saliency"): one,
        ("POST", "/v2/models/{model}/infer"): infer,
        ("POST", "/v2/models/{model}/versions/{version}/infer"): infer,
    }


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_a_good_request_is_answered_as_described(route: Any, base_url: str, client: Any) -> None:
    """The draws above may all be bad ones: whether any is good depends on the machine."""
    model = client.get("/v2/models/cnn").json()
    image = cv2.imencode(".png", _PIXELS)[1].tobytes()
    request = _good_requests(image, model["inputs"][0]["shape"][1:]).get((route.method, route.path), {})
    values = {"model": "cnn", "version": model["versions"][0]}
    names = {name: values[name] for name in re.findall(r"{(\w+)}", route.path)}
    case = _SCHEMA[route.path][route.method].Case(path_parameters=names, **request)
    assert case.call_and_validate(base_url=base_url, checks=list(_CHECKS)).status_code == 200


def test_the_description_is_complete_and_served(client: Any) -> None:
    assert client.get("/openapi.json").json() == json.loads(json.dumps(_DOCUMENT))
    operations = {(method.upper(), path) for path, methods in _DOCUMENT["paths"].items() for method in methods}
    assert operations == {(route.method, route.path) for route in ROUTES}


def test_the_page_of_the_description_loads_nothing_from_elsewhere(client: Any) -> None:
    answer = client.get("/docs")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "<script" not in answer.text
    assert 'src="' not in answer.text
    for route in ROUTES:
        assert route.path in answer.text
