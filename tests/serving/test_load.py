"""What waits is bounded in pixels and bytes, and what nobody waits for any more is let go."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest


@pytest.fixture(scope="module")
def single(start_server: Callable[..., Any]) -> Any:
    """A server that decodes one image at a time."""
    return start_server("--threads", "1")


@pytest.fixture
def client(single: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=single.url, timeout=60) as client:
        yield client
        # Each test leaves the server idle.
        deadline = time.monotonic() + 60
        while _metric(client, "manyeyes_queue_depth") or _metric(client, "manyeyes_body_bytes"):
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.fixture(scope="module")
def large() -> bytes:
    """A small file of 49 million pixels; about half a second of work."""
    return cv2.imencode(".png", np.zeros((7000, 7000), np.uint8))[1].tobytes()


def _metric(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def _send(server: Any, body: bytes, content_type: str = "image/png") -> socket.socket:
    connection = server.connect()
    lines = ["POST /v1/recognize HTTP/1.1", "Host: x", f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    connection.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
    return connection


def _form(images: list[bytes]) -> bytes:
    part = b'--B\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%s\r\n'
    return b"".join(part % image for image in images) + b"--B--\r\n"


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _resident_bytes(server: Any) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def test_a_request_of_more_pixels_than_the_limit_is_refused_before_any_is_decoded(
    client: httpx.Client, large: bytes
) -> None:
    before = _metric(client, "manyeyes_decode_seconds_count")
    refused = client.post("/v1/recognize", files=[("image", large)] * 5)
    assert (refused.status_code, refused.json()["reason"]) == (413, "too_many_pixels")
    assert "245000000 pixels together" in refused.json()["detail"]
    assert _metric(client, "manyeyes_decode_seconds_count") == before


def test_more_pixels_than_may_wait_get_503_and_who_has_left_is_not_worked_for(
    single: Any, client: httpx.Client, large: bytes, images: dict[str, bytes]
) -> None:
    before = _metric(client, "manyeyes_images_total")
    waiting = [_send(single, large) for _ in range(16)]
    refused = []
    for connection in list(waiting):
        connection.settimeout(0.05)
        try:
            answer = connection.recv(65536)
        except TimeoutError:
            continue
        waiting.remove(connection)
        refused.append(answer)
        connection.close()
    # 8 x 49 million pixels are within 400 million.
    assert sum(answer.startswith(b"HTTP/1.1 503 ") for answer in refused) >= 5
    # All close their side. One of them still reads: it is told, for nobody knows who has left.
    *leaving, last = waiting
    for connection in leaving:
        connection.close()
    last.shutdown(socket.SHUT_WR)
    last.settimeout(30)
    answer = last.recv(65536)
    last.close()
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 1" in answer
    assert client.post("/v1/recognize", content=images[".png"]).status_code == 200
    assert _metric(client, "manyeyes_images_total") - before - 1 < len(leaving)


def test_the_images_of_a_form_are_not_worked_on_when_its_client_has_left(
    single: Any, client: httpx.Client, large: bytes, images: dict[str, bytes]
) -> None:
    before = _metric(client, "manyeyes_images_total")
    connection = _send(single, _form([large] * 4), "multipart/form-data; boundary=B")
    while not _metric(client, "manyeyes_body_bytes"):
        time.sleep(0.01)
    _reset(connection)
    assert client.post("/v1/recognize", content=images[".png"]).status_code == 200
    assert _metric(client, "manyeyes_images_total") - before - 1 <= 2
    # So does an inference of encoded images.
    before = _metric(client, "manyeyes_images_total")
    tensor = {
        "name": "encoded",
        "datatype": "BYTES",
        "shape": [4],
        "parameters": {"binary_data_size": 4 * len(large) + 16},
    }
    head = json.dumps({"inputs": [tensor]}).encode()
    body = head + 4 * (struct.pack("<I", len(large)) + large)
    connection = single.connect()
    lines = ["POST /v2/models/cnn/infer HTTP/1.1", "Host: x", f"Inference-Header-Content-Length: {len(head)}"]
    connection.sendall("\r\n".join([*lines, f"Content-Length: {len(body)}"]).encode() + b"\r\n\r\n" + body)
    while not _metric(client, "manyeyes_body_bytes"):
        time.sleep(0.01)
    _reset(connection)
    assert client.post("/v1/recognize", content=images[".png"]).status_code == 200
    assert _metric(client, "manyeyes_images_total") - before - 1 <= 2


def test_bodies_whose_clients_have_left_do_not_fill_the_memory(
    single: Any, client: httpx.Client, large: bytes, images: dict[str, bytes]
) -> None:
    before = _resident_bytes(single)
    padded = images[".png"] + bytes(25_000_000)
    for _ in range(3):  # until the server has more to do than sending takes
        busy = [_send(single, _form([large] * 4), "multipart/form-data; boundary=B") for _ in range(2)]
        for _ in range(24):
            _reset(_send(single, padded))
        grown = _resident_bytes(single) - before
        is_waiting = _metric(client, "manyeyes_queue_depth") > 0
        for connection in busy:
            connection.close()
        if is_waiting:
            break
    assert is_waiting, "nothing waits: this shows nothing"
    # 600 MB were sent; decoding one of the large images takes 200 MB.
    assert grown < 350_000_000
