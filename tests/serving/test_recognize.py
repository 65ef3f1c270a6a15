from __future__ import annotations

import concurrent.futures
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from manyeyes.imaging.decode import decode
from manyeyes.recognition.bundle import Bundle
from manyeyes.recognition.predictor import Predictor
from manyeyes.recognition.saliency import overlay
from manyeyes.serving.settings import ServeSettings


@pytest.fixture(scope="module")
def predictor(evaluated_bundle: str) -> Predictor:
    return Predictor.load(evaluated_bundle)


def _bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header promises gigapixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "content_type", ["image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", None]
)
def test_the_answer_over_http_is_the_predictors(
    client: Any, predictor: Predictor, content_type: str | None, images: dict[str, bytes]
) -> None:
    for encoded in images.values():
        headers = {"Content-Type": content_type} if content_type else {}
        response = client.post("/v1/recognize?top_k=2", content=encoded, headers=headers)
        assert response.status_code == 200, response.text
        (wanted,) = predictor.predict([encoded], top_k=2)
        answer = response.json()
        found = [(each["label"], each["class_name"]) for each in answer["predictions"]]
        assert found == [(each.label, each.class_name) for each in wanted.top_k]
        for got, expected in zip(answer["predictions"], wanted.top_k, strict=True):
            assert got["probability"] == pytest.approx(expected.probability, abs=1e-5)
        info = predictor.bundle.info
        assert answer["model"] == {"name": info.name, "version": info.fingerprint}
        assert set(answer["timings_ms"]) == {"queue", "decode", "predict"}


def test_healthz_says_which_model_is_ready(client: Any, evaluated_bundle: str) -> None:
    health = client.get("/healthz").json()
    assert health["status"] == "ok"
    assert health["model"]["version"] == Bundle.load(evaluated_bundle).info.fingerprint


def test_an_answer_that_should_not_be_relied_on_says_so(
    client: Any, predictor: Predictor, images: dict[str, bytes], red_jpeg: Path
) -> None:
    wanted = {red_jpeg.read_bytes(): False, images[".png"]: True}
    for content, abstain in wanted.items():
        assert predictor.predict([content])[0].abstain is abstain
        assert client.post("/v1/recognize", content=content).json()["abstain"] is abstain
    results = client.post("/v1/recognize", files=[("image", content) for content in wanted]).json()["results"]
    assert [result["abstain"] for result in results] == [False, True]
    (model,) = client.get("/v1/models").json()["models"]
    assert model["versions"][0]["threshold"] == 0.95


def test_the_page_is_one_file_that_may_load_nothing_from_elsewhere(client: Any) -> None:
    response = client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert 'src="http' not in response.text
    assert 'href="http' not in response.text
    assert "<style>" in response.text
    assert re.findall(r'<script src|rel="stylesheet"', response.text) == [], "written as several files, sent as one"


def test_the_legend_of_the_page_has_the_colours_of_the_overlay(client: Any) -> None:
    (gradient,) = re.findall(r"linear-gradient\(90deg, (#[^)]+)\)", client.get("/").text)
    stops = np.array([list(bytes.fromhex(stop[1:])) for stop in gradient.split(", ")])
    shown = overlay(np.zeros((224, 256, 1), np.uint8), np.tile(np.linspace(0, 1, 256, dtype=np.float32), (224, 1)), 1)
    places = np.linspace(0, 255, len(stops)).round().astype(int)
    np.testing.assert_allclose(decode(shown)[0, places], stops, atol=3)


@pytest.mark.parametrize(
    "content, status, reason",
    [(b"", 400, "empty"), (b"not an image at all", 415, "not_an_image"), (b"\xff\xd8\xff" + bytes(99), 422, None)],
)
def test_what_is_no_image_is_the_clients_mistake(client: Any, content: bytes, status: int, reason: str | None) -> None:
    response = client.post("/v1/recognize", content=content)
    assert response.status_code == status
    assert set(response.json()) == {"error", "reason", "detail"}
    if reason:
        assert response.json()["reason"] == reason


@pytest.mark.parametrize("top_k", ["0", "-1", "many", "1.5", "", "٣", "9" * 50])
def test_a_senseless_top_k_is_refused(client: Any, top_k: str, images: dict[str, bytes]) -> None:
    response = client.post("/v1/recognize", params={"top_k": top_k}, content=images[".png"])
    assert (response.status_code, response.json()["reason"]) == (400, "bad_request")


def test_other_paths_and_methods_answer_in_the_same_form(client: Any) -> None:
    for response, status in ((client.get("/nowhere"), 404), (client.get("/v1/recognize"), 405)):
        assert response.status_code == status
        assert set(response.json()) == {"error", "reason", "detail"}


def test_a_body_that_says_it_is_huge_is_refused_unread(server: Any) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        length = ServeSettings().max_body_bytes + 1
        connection.sendall(f"POST /v1/recognize HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode())
        assert b" 413 " in connection.recv(4096).split(b"\r\n")[0]


def test_a_body_that_does_not_say_its_length_is_cut_off_at_the_limit(client: Any) -> None:
    sent = 0

    def endless() -> Any:
        nonlocal sent
        while sent < 20 * ServeSettings().max_body_bytes:
            sent += 1 << 20
            yield bytes(1 << 20)

    try:
        response = client.post("/v1/recognize", content=endless())
        assert response.status_code == 413
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        pass  # the server closed the connection while we were still sending
    assert sent < 8 * ServeSettings().max_body_bytes
    assert client.get("/healthz").status_code == 200


def test_a_pixel_bomb_is_refused_before_it_is_decoded(client: Any) -> None:
    for encoded in (_bomb(), _bomb(2**31 - 1, 2**31 - 1), _bomb(0, 5)):
        response = client.post("/v1/recognize", content=encoded)
        assert 400 <= response.status_code < 500
    assert client.post("/v1/recognize", content=_bomb()).json()["reason"] == "too_many_pixels"


def test_a_thousand_mutated_images_give_no_server_error(client: Any, images: dict[str, bytes]) -> None:
    draw = np.random.default_rng(11)
    originals = list(images.values())
    statuses = set()
    for index in range(1000):
        content = bytearray(originals[index % len(originals)])
        for _ in range(int(draw.integers(1, 9))):
            kind, place = int(draw.integers(4)), int(draw.integers(len(content)))
            if kind == 0:
                content[place] = int(draw.integers(256))
            elif kind == 1:
                content[place:] = b""
            elif kind == 2:
                content[place:place] = draw.bytes(int(draw.integers(1, 50)))
            else:
                content[place : place + int(draw.integers(1, 50))] = b""
            if not content:
                break
        statuses.add(client.post("/v1/recognize", content=bytes(content)).status_code)
    assert 200 in statuses
    assert statuses <= {200, 400, 413, 415, 422}
    assert client.get("/healthz").status_code == 200


def test_the_server_answers_others_while_it_recognises(server: Any) -> None:
    large = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (2500, 2500, 3), dtype=np.uint8))[
        1
    ].tobytes()
    with httpx.Client(base_url=server.url, timeout=60) as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
        slow = [pool.submit(httpx.post, f"{server.url}/v1/recognize", content=large, timeout=60) for _ in range(4)]
        num_answers = 0
        while not all(future.done() for future in slow):
            assert client.get("/healthz").status_code == 200
            num_answers += not all(future.done() for future in slow)
        assert num_answers > 0
        assert [future.result().status_code for future in slow] == [200] * 4


def test_a_client_that_leaves_in_mid_request_does_no_harm(server: Any, client: Any, images: dict[str, bytes]) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(b"POST /v1/recognize HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nhalf of")
    assert client.post("/v1/recognize", content=images[".png"]).status_code == 200
    assert "Traceback" not in "".join(server.lines)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_the_requests_under_way(
    start_server: Any, signum: int, images: dict[str, bytes]
) -> None:
    running = start_server()
    host, port = running.url.removeprefix("http://").split(":")
    encoded = images[".png"]
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = (
            f"POST /v1/recognize HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(encoded)}\r\n\r\n"
        )
        connection.sendall(head.encode())
        assert b"100 Continue" in connection.recv(4096)
        running.process.send_signal(signum)
        connection.sendall(encoded)
        assert b" 200 " in connection.recv(65536).split(b"\r\n")[0]
    assert running.wait() == 0
    assert "Traceback" not in "".join(running.lines)


def test_a_busy_port_or_an_impossible_address_is_one_clear_line(small_bundle: str, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, words in (
            (["--port", port], "Address already in use"),
            (["--host", "203.0.113.7", "--port", "0"], "Can't serve on 203.0.113.7:0"),
        ):
            command = [sys.executable, "-m", "manyeyes.cli.main", "serve", small_bundle, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert done.returncode == 2
            assert words in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1
