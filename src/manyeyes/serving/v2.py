"""The Open Inference Protocol, version 2: tensors as JSON, or as bytes behind it (the binary tensor extension).

A model takes one of two inputs:  image: UINT8 [n, height, width, channels], pixels as the model wants them;
                                  encoded: BYTES [n], image files (in JSON: base64).
It gives  logits, probabilities: FP32 [n, classes];  label: INT64 [n];  and for an output with the parameter
`classification: k` the k likeliest as BYTES [n, k], "probability:label:class name" (the classification extension).
"""

from __future__ import annotations

import base64
import binascii
import itertools
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson

from manyeyes.recognition.predictor import softmax, top_labels
from manyeyes.serving.jobs import Failure
from manyeyes.serving.messages import Response
from manyeyes.serving.models import ModelCard
from manyeyes.serving.settings import ServeSettings

EXTENSIONS = ["binary_tensor_data", "classification"]
_PLATFORM = "manyeyes_onnx"
_MAX_JSON_BYTES = 4 * 1024 * 1024
# Nobody else is answered while these are made, on whatever thread: 0.1 s of it at most.
_MAX_JSON_VALUES = 1_000_000
_MAX_JSON_LISTS = 100_000
_MAX_CLASSIFICATIONS = 25_600
# What is read or written in less than a millisecond is not worth a thread.
_SMALL_JSON_BYTES = 64 * 1024
_FEW_VALUES = 10_000
_OUTPUTS = ("logits", "probabilities", "label")


class RequestError(Exception):
    """A request that can't be answered."""

    def __init__(self, detail: str, status: int = 400, reason: str = "bad_request") -> None:
        super().__init__(detail)
        self.failure = Failure(status, "The request can't be answered", reason, detail)


@dataclass(frozen=True)
class WantedOutput:
    """One output that a request asks for."""

    name: str
    binary: bool
    num_classes: int


@dataclass(frozen=True)
class InferRequest:
    """What a request asks.

    Attributes:
        images: encoded images, or model inputs as uint8 (height, width, channels).
    """

    id: str | None
    images: list[Any]
    outputs: tuple[WantedOutput, ...]


def metadata(card: ModelCard, versions: list[str]) -> dict[str, Any]:
    """The answer to GET /v2/models/NAME."""
    classes = len(card.class_names)
    return {
        "name": card.name,
        "versions": versions,
        "platform": _PLATFORM,
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [-1, *card.input_shape]},
            {"name": "encoded", "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, classes]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, classes]},
            {"name": "label", "datatype": "INT64", "shape": [-1]},
        ],
    }


def read_request(body: bytes, header_length: str, card: ModelCard, settings: ServeSettings) -> InferRequest:
    """Read the body of an inference request.

    Args:
        header_length: of the JSON part, where bytes follow it; "" if it is all JSON.

    Raises:
        RequestError: it can't be understood.
    """
    size = len(body)
    if header_length:
        is_number = header_length.isascii() and header_length.isdigit() and len(header_length) <= 12
        if not is_number or int(header_length) > len(body):
            raise RequestError("Inference-Header-Content-Length is not a length within the body")
        size = int(header_length)
    text = body[:size]
    num_lists = text.count(b"[") + text.count(b"{")
    if size > _MAX_JSON_BYTES or num_lists > _MAX_JSON_LISTS or text.count(b",") > _MAX_JSON_VALUES:
        raise RequestError(
            f"the JSON has {size} bytes, up to {_MAX_JSON_BYTES} with {_MAX_JSON_VALUES} values in {_MAX_JSON_LISTS} "
            "lists are read; send tensors as bytes (binary_data_size)",
            413,
            "too_many_bytes",
        )
    try:
        content = orjson.loads(text)
    except ValueError:
        raise RequestError("the body is not JSON") from None
    if not isinstance(content, dict):
        raise RequestError("the body is not a JSON object")
    inputs = content.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise RequestError("inputs must be a list of one tensor: image or encoded")
    tensor = inputs[0]
    name, datatype, shape = tensor.get("name"), tensor.get("datatype"), tensor.get("shape")
    parameters = _parameters_of(tensor)
    # bool is an int for Python, but no dimension.
    if not isinstance(shape, list) or not all(type(side) is int and side >= 0 for side in shape):
        raise RequestError("shape must be a list of numbers of at least 0")
    raw = None
    binary_size = parameters.get("binary_data_size")
    if binary_size is not None:
        if type(binary_size) is not int or not 0 <= binary_size == len(body) - size:
            raise RequestError(f"binary_data_size must be the {len(body) - size} bytes that follow the JSON")
        raw = body[size:]
    elif size != len(body):
        raise RequestError("bytes follow the JSON, but no input has binary_data_size")
    if not shape or shape[0] > settings.max_images:
        raise (
            RequestError(
                f"shape {shape[:8]}; the first side is the number of images, up to {settings.max_images}",
                413,
                "too_many_images",
            )
            if shape
            else RequestError("shape is empty")
        )
    images: list[Any]
    if name == "image":
        images = _read_pixels(tensor, raw, datatype, shape, card)
    elif name == "encoded":
        images = _read_encoded(tensor, raw, datatype, shape)
    else:
        raise RequestError(f"there is no input {str(name)[:40]!r}; give image or encoded")
    given = content.get("id")
    if given is not None and not isinstance(given, str):
        raise RequestError("id must be a string")
    outputs = _read_outputs(content, len(card.class_names))
    if len(images) * sum(output.num_classes for output in outputs) > _MAX_CLASSIFICATIONS:
        raise RequestError(
            f"classification: up to {_MAX_CLASSIFICATIONS} classes of all images are told; ask for probabilities"
        )
    return InferRequest(given, images, outputs)


def is_small(body: bytes, header_length: str) -> bool:
    """Whether `read_request` takes so little that it may be called in the event loop."""
    size = int(header_length) if header_length.isdigit() and len(header_length) <= 12 else len(body)
    return size <= _SMALL_JSON_BYTES


def is_few(request: InferRequest, card: ModelCard) -> bool:
    """Whether `answer` takes so little that it may be called in the event loop."""
    return len(request.images) * len(card.class_names) <= _FEW_VALUES


def answer(request: InferRequest, card: ModelCard, payloads: list[bytes]) -> Response:
    """Make the response of the float32 logits of each image."""
    logits = np.frombuffer(b"".join(payloads), np.float32).reshape(len(payloads), len(card.class_names))
    probabilities = softmax(logits, card.temperature).astype(np.float32) if len(payloads) else logits
    tensors: list[dict[str, Any]] = []
    binaries: list[bytes] = []
    for output in request.outputs:
        values: np.ndarray = logits if output.name == "logits" else probabilities
        datatype = "FP32"
        if output.name == "label":
            values, datatype = probabilities.argmax(axis=1).astype(np.int64), "INT64"
        elif output.num_classes:
            values, datatype = _classification(values, card.class_names, output.num_classes), "BYTES"
        tensor: dict[str, Any] = {"name": output.name, "datatype": datatype, "shape": list(values.shape)}
        if output.binary:
            binaries.append(_to_bytes(values))
            tensor["parameters"] = {"binary_data_size": len(binaries[-1])}
        else:
            flat = values.reshape(-1)
            tensor["data"] = [each.decode() for each in flat] if datatype == "BYTES" else flat
        tensors.append(tensor)
    content = {"model_name": card.name, "model_version": card.version, "outputs": tensors}
    if request.id is not None:
        content["id"] = request.id
    head = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    if not binaries:
        return Response(200, head)
    return Response(
        200,
        head + b"".join(binaries),
        b"application/octet-stream",
        (("inference-header-content-length", str(len(head))),),
    )


def to_response(failure: Failure) -> Response:
    """A failure as the protocol wants it: one text as `error`."""
    content = failure.to_dict() | {"error": f"{failure.error}: {failure.reason}: {failure.detail}"}
    return Response(
        failure.status,
        orjson.dumps(content),
        headers=(("retry-after", "1"),) if failure.status == 503 else (),
    )


def _read_pixels(
    tensor: dict[str, Any], raw: bytes | None, datatype: object, shape: list[int], card: ModelCard
) -> list[np.ndarray]:
    wanted = f"UINT8 [n, {', '.join(map(str, card.input_shape))}]"
    if datatype != "UINT8" or tuple(shape[1:]) != card.input_shape:
        raise RequestError(f"image is {str(datatype)[:20]} {shape[:8]}, expected {wanted}")
    if raw is None:
        try:
            # float64 first: NumPy would wrap what is no byte around without a word.
            numbers = np.array(_flatten(tensor.get("data")), np.float64)
        except (TypeError, OverflowError):
            raise RequestError("the data of image are not numbers") from None
        if not ((numbers >= 0) & (numbers <= 255) & (numbers == np.floor(numbers))).all():
            raise RequestError("the data of image are not whole numbers in [0, 255]")
        pixels = numbers.astype(np.uint8)
    else:
        pixels = np.frombuffer(raw, np.uint8)
    if pixels.size != np.prod(shape):
        raise RequestError(f"image has {pixels.size} values, the shape {shape} says {int(np.prod(shape))}")
    return list(pixels.reshape(shape))


def _flatten(data: object) -> list[int | float]:
    """Numbers in lists of lists, as one list; TypeError if there is anything else. NumPy would take strings too."""
    while isinstance(data, list) and data and isinstance(data[0], list):
        data = list(itertools.chain.from_iterable(data))
    if not isinstance(data, list) or not {int, float}.issuperset(map(type, data)):
        raise TypeError
    return data


def _read_encoded(tensor: dict[str, Any], raw: bytes | None, datatype: object, shape: list[int]) -> list[bytes]:
    if datatype != "BYTES" or len(shape) != 1:
        raise RequestError(f"encoded is {str(datatype)[:20]} {shape[:8]}, expected BYTES [n]")
    images: list[bytes] = []
    if raw is not None:
        position = 0
        while position < len(raw):
            if position + 4 > len(raw):
                raise RequestError("the bytes of encoded end within a length")
            (length,) = struct.unpack_from("<I", raw, position)
            if position + 4 + length > len(raw):
                raise RequestError("the bytes of encoded end within an image")
            images.append(raw[position + 4 : position + 4 + length])
            position += 4 + length
            if len(images) > shape[0]:
                break
    else:
        data = tensor.get("data")
        if not isinstance(data, list) or not all(isinstance(each, str) for each in data):
            raise RequestError("the data of encoded are not a list of base64 strings")
        try:
            images = [base64.b64decode(each, validate=True) for each in data]
        except (binascii.Error, ValueError):
            raise RequestError("the data of encoded are not base64") from None
    if len(images) != shape[0]:
        raise RequestError(f"encoded has {len(images)} images, the shape says {shape[0]}")
    return images


def _read_outputs(content: dict[str, Any], num_classes: int) -> tuple[WantedOutput, ...]:
    everything_binary = _parameters_of(content).get("binary_data_output") is True
    outputs = content.get("outputs")
    if outputs is None:
        return tuple(WantedOutput(name, everything_binary, 0) for name in _OUTPUTS)
    if not isinstance(outputs, list):
        raise RequestError("outputs must be a list")
    wanted = []
    for output in outputs[: len(_OUTPUTS)]:
        if not isinstance(output, dict) or output.get("name") not in _OUTPUTS:
            raise RequestError(f"outputs must be among {', '.join(_OUTPUTS)}")
        parameters = _parameters_of(output)
        k = parameters.get("classification", 0)
        if type(k) is not int or k < 0:
            raise RequestError("classification must be a number of classes")
        wanted.append(
            WantedOutput(output["name"], parameters.get("binary_data", everything_binary) is True, min(k, num_classes))
        )
    if not outputs or len(outputs) > len(_OUTPUTS):
        raise RequestError(f"ask for one to {len(_OUTPUTS)} outputs")
    return tuple(wanted)


def _parameters_of(content: dict[str, Any]) -> dict[str, Any]:
    parameters = content.get("parameters", {})
    if not isinstance(parameters, dict):
        raise RequestError("parameters must be an object")
    return parameters


def _classification(values: np.ndarray, class_names: tuple[str, ...], k: int) -> np.ndarray:
    rows = [
        [f"{value:f}:{label}:{class_names[label]}".encode() for label, value in zip(labels, highest, strict=True)]
        for labels, highest in zip(*(array.tolist() for array in top_labels(values, k)), strict=True)
    ]
    found = np.empty((len(values), k), object)
    for index, row in enumerate(rows):
        found[index] = row
    return found


def _to_bytes(values: np.ndarray) -> bytes:
    if values.dtype != object:
        return np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False).tobytes()
    return b"".join(struct.pack("<I", len(each)) + each for each in values.reshape(-1))
