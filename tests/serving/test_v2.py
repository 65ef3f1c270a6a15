"""The Open Inference Protocol, spoken by a client that is not ours."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from manyeyes.recognition.predictor import Predictor, softmax
from manyeyes.serving import v2
from manyeyes.serving.models import ModelCard
from manyeyes.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def predictor(small_bundle: str) -> Predictor:
    return Predictor.load(small_bundle)


@pytest.fixture(scope="module")
def other(server: Any) -> Iterator[Any]:
    client = triton.InferenceServerClient(server.url.removeprefix("http://"), network_timeout=60)
    yield client
    client.close()


def _pixels(num_images: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (num_images, 24, 20, 3), dtype=np.uint8)


def test_another_client_finds_a_server_and_a_model_that_are_ready(other: Any) -> None:
    assert other.is_server_live()
    assert other.is_server_ready()
    assert other.is_model_ready("cnn")
    assert not other.is_model_ready("dog")
    assert "binary_tensor_data" in other.get_server_metadata()["extensions"]
    model = other.get_model_metadata("cnn")
    assert model["inputs"][0] == {"name": "image", "datatype": "UINT8", "shape": [-1, 24, 20, 3]}
    assert other.get_model_metadata("cnn", model["versions"][0]) == model


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("num_images", [1, 5])
def test_pixels_over_the_protocol_give_the_predictors_logits(
    other: Any, predictor: Predictor, binary: bool, num_images: int
) -> None:
    pixels = _pixels(num_images)
    tensor = triton.InferInput("image", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("logits", "probabilities", "label")]
    result = other.infer("cnn", [tensor], outputs=outputs, request_id="mine")
    logits = predictor.logits(pixels)
    assert result.get_response()["id"] == "mine"
    np.testing.assert_allclose(result.as_numpy("logits"), logits, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(result.as_numpy("probabilities"), softmax(logits), atol=1e-4)
    assert result.as_numpy("label").tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("binary", [True, False])
def test_encoded_images_over_the_protocol_give_classes(
    other: Any, predictor: Predictor, images: dict[str, bytes], binary: bool
) -> None:
    encoded = list(images.values())
    tensor = triton.InferInput("encoded", [len(encoded)], "BYTES")
    # In JSON bytes are no text, so they go as base64.
    sent = encoded if binary else [base64.b64encode(each) for each in encoded]
    tensor.set_data_from_numpy(np.array(sent, dtype=object), binary_data=binary)
    output = triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)
    found = other.infer("cnn", [tensor], outputs=[output]).as_numpy("probabilities")
    for row, wanted in zip(found, predictor.predict(encoded, top_k=2), strict=True):
        for entry, candidate in zip(row, wanted.top_k, strict=True):
            probability, label, name = (entry if isinstance(entry, str) else entry.decode()).split(":")
            assert (int(label), name) == (candidate.label, candidate.class_name)
            assert float(probability) == pytest.approx(candidate.probability, abs=1e-4)


def test_what_the_protocol_can_not_take_is_told_by_its_error(other: Any) -> None:
    wrong_shape = triton.InferInput("image", [1, 8, 8, 3], "UINT8")
    wrong_shape.set_data_from_numpy(np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(InferenceServerException, match=r"expected UINT8 \[n, 24, 20, 3\]"):
        other.infer("cnn", [wrong_shape])
    no_image = triton.InferInput("encoded", [1], "BYTES")
    no_image.set_data_from_numpy(np.array([b"no image"], dtype=object))
    with pytest.raises(InferenceServerException, match="not_an_image"):
        other.infer("cnn", [no_image])
    with pytest.raises(InferenceServerException, match="no model 'dog'"):
        other.infer("dog", [no_image])
    with pytest.raises(InferenceServerException, match="no version '9'"):
        other.infer("cnn", [no_image], model_version="9")


@pytest.mark.parametrize(
    "content, words",
    [
        ([], "not a JSON object"),
        ({}, "inputs must be a list of one tensor"),
        ({"inputs": [{}, {}]}, "inputs must be a list of one tensor"),
        ({"inputs": [{"name": "image", "shape": [True]}]}, "shape must be a list of numbers"),
        ({"inputs": [{"name": "image", "shape": [-1]}]}, "shape must be a list of numbers"),
        ({"inputs": [{"name": "image", "shape": []}]}, "shape is empty"),
        ({"inputs": [{"name": "image", "shape": [10**12, 24, 20, 3], "datatype": "UINT8"}]}, "up to 256"),
        ({"inputs": [{"name": "image", "shape": [1, 24, 20, 3], "datatype": "UINT8", "data": [1]}]}, "has 1 values"),
        ({"inputs": [{"name": "image", "shape": [1, 24, 20, 3], "datatype": "UINT8", "data": [256]}]}, "whole numbers"),
        ({"inputs": [{"name": "image", "shape": [1, 24, 20, 3], "datatype": "UINT8", "data": ["a"]}]}, "not numbers"),
        ({"inputs": [{"name": "image", "shape": [1, 24, 20, 3], "datatype": "UINT8", "data": ["3"]}]}, "not numbers"),
        ({"inputs": [{"name": "image", "shape": [1, 24, 20, 3], "datatype": "UINT8", "data": [True]}]}, "not numbers"),
        ({"inputs": [{"name": "image", "shape": [1, 24, 20, 3], "datatype": "UINT8", "data": {"3": 1}}]}, "not num"),
        ({"inputs": [{"name": "encoded", "shape": [1], "datatype": "BYTES", "data": ["*"]}]}, "not base64"),
        ({"inputs": [{"name": "encoded", "shape": [2], "datatype": "BYTES", "data": [""]}]}, "the shape says 2"),
        ({"inputs": [{"name": "sound", "shape": [1]}]}, "no input 'sound'"),
        ({"inputs": [{"name": "encoded", "shape": [1], "parameters": {"binary_data_size": 5}}]}, "0 bytes that follow"),
    ],
)
def test_a_senseless_request_of_the_protocol_is_a_4xx_that_says_why(client: Any, content: Any, words: str) -> None:
    response = client.post("/v2/models/cnn/infer", content=json.dumps(content))
    assert 400 <= response.status_code < 500
    assert words in response.json()["error"]


@pytest.mark.parametrize("length", ["x", "-1", "99999999", "3", "1" * 5000])
def test_a_wrong_length_of_the_json_part_is_a_400(client: Any, length: str) -> None:
    headers = {"Inference-Header-Content-Length": length}
    assert client.post("/v2/models/cnn/infer", content=b'{"inputs": []}', headers=headers).status_code == 400


@pytest.mark.parametrize("body", [b"[" * 5_000_000, b'{"inputs":[' + b"[]," * 1_300_000 + b"1]}", b"1," * 2_000_000])
def test_tensors_that_are_too_long_as_json_are_refused_unparsed(client: Any, body: bytes) -> None:
    response = client.post("/v2/models/cnn/infer", content=body)
    assert (response.status_code, response.json()["reason"]) == (413, "too_many_bytes")
    assert "as bytes" in response.json()["detail"]


@pytest.mark.parametrize(
    "body",
    [
        rb'{"id":"\ud800","inputs":[{"name":"encoded","datatype":"BYTES","shape":[0],"data":[]}]}',
        rb'{"inputs":[{"name":"image","datatype":"\ud800","shape":[1,24,20,3],"data":[]}]}',
        rb'{"inputs":[{"name":"\udfff","datatype":"UINT8","shape":[1],"data":[]}]}',
        b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[1,24,20,3],"data":[NaN]}]}',
        b'{"inputs":[{"name":"image","datatype":"UINT8","shape":[' + b"9" * 4000 + b"]}]}",
        b'{"inputs":' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    ],
)
def test_text_that_is_no_text_is_a_400(client: Any, body: bytes) -> None:
    response = client.post("/v2/models/cnn/infer", content=body)
    assert response.status_code == 400
    assert len(response.text) < 500


def test_tensors_as_nested_lists_and_many_images_give_the_same_as_flat_ones(client: Any, predictor: Predictor) -> None:
    pixels = _pixels(40)  # 190 kB: read beside the event loop
    logits = predictor.logits(pixels)
    for data in (pixels.tolist(), pixels.reshape(-1).tolist(), pixels.reshape(40, -1).tolist()):
        tensor = {"name": "image", "datatype": "UINT8", "shape": list(pixels.shape), "data": data}
        outputs = client.post("/v2/models/cnn/infer", json={"inputs": [tensor]}).json()["outputs"]
        np.testing.assert_allclose(np.reshape(outputs[0]["data"], (40, 3)), logits, rtol=1e-4, atol=1e-4)
        assert outputs[2]["data"] == logits.argmax(axis=1).tolist()


def test_no_images_give_no_answers(client: Any) -> None:
    empty = {"inputs": [{"name": "encoded", "shape": [0], "datatype": "BYTES", "data": []}]}
    answer = client.post("/v2/models/cnn/infer", content=json.dumps(empty))
    assert answer.status_code == 200
    assert [output["shape"] for output in answer.json()["outputs"]] == [[0, 3], [0, 3], [0]]


def test_classes_by_name_are_told_for_so_many_images_as_nobody_has_to_wait_for() -> None:
    names = tuple(f"class {label}" for label in range(1000))
    card = ModelCard("wide", "1", "", names, {}, (2, 2, 1), "onnxruntime", "float32")

    def ask(num_images: int, num_classes: int) -> bytes:
        tensor = {"name": "image", "datatype": "UINT8", "shape": [num_images, 2, 2, 1], "data": [7] * 4 * num_images}
        output = {"name": "probabilities", "parameters": {"classification": num_classes}}
        return json.dumps({"inputs": [tensor], "outputs": [output]}).encode()

    asked = v2.read_request(ask(5, 9999), "", card, ServeSettings())
    payloads = [np.random.default_rng(index).normal(size=1000).astype(np.float32).tobytes() for index in range(5)]
    (output,) = json.loads(v2.answer(asked, card, payloads).body)["outputs"]
    assert output["shape"] == [5, 1000]
    with pytest.raises(v2.RequestError, match="ask for probabilities"):
        v2.read_request(ask(256, 1000), "", card, ServeSettings())
