"""HTTP itself: what clients may send, how long they may take, who may ask."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def strict(start_server: Callable[..., Any]) -> Any:
    """A server with small limits."""
    return start_server(
        "--timeout", "1", "--max-body-mb", "0.2", "--max-megapixels", "0.01", "--max-connections", "8", "--access-log"
    )


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", key, "-out", certificate, "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, capture_output=True)
    return str(certificate), str(key)


@pytest.fixture(scope="module")
def guarded(start_server: Callable[..., Any], certificate: tuple[str, str], tmp_path_factory: Any) -> Any:
    """A server with TLS, a token, CORS and a JSON log."""
    token_file = tmp_path_factory.mktemp("token") / "token"
    token_file.write_text(f"{TOKEN}\n")
    return start_server(
        *("--tls-cert", certificate[0], "--tls-key", certificate[1], "--token-file", str(token_file)),
        *("--cors-origin", "https://example.org", "--log-format", "json", "--access-log"),
    )


@pytest.fixture
def guarded_client(guarded: Any, certificate: tuple[str, str]) -> Iterator[httpx.Client]:
    context = ssl.create_default_context(cafile=certificate[0])
    with httpx.Client(base_url=guarded.url, verify=context, timeout=60) as client:
        yield client


def _ask(server: Any, request: bytes) -> bytes:
    """Send bytes, and read until the server closes."""
    with server.connect() as connection:
        connection.sendall(request)
        return _read_all(connection)


def _read_all(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def _post(body: bytes, *headers: str, target: str = "/v1/recognize") -> bytes:
    lines = [f"POST {target} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


# --- requests


def test_requests_that_are_sent_ahead_are_answered_in_their_order(server: Any, images: dict[str, bytes]) -> None:
    ahead = b"".join(_post(images[".png"], f"X-Request-Id: number-{index}") for index in range(20))
    answers = _ask(server, ahead + _post(b"", "X-Request-Id: last", "Connection: close")).decode("latin-1")
    found = [line.rpartition(" ")[2] for line in answers.split("\r\n") if line.startswith("x-request-id")]
    assert found == [f"number-{index}" for index in range(20)] + ["last"]
    assert answers.count("HTTP/1.1 200 OK") == 20
    assert answers.count("HTTP/1.1 400 ") == 1


def test_a_request_in_pieces_of_a_byte_is_answered(server: Any, images: dict[str, bytes]) -> None:
    small = images[".jpg"]
    with server.connect() as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in _post(small, "Connection: close"):
            connection.send(bytes([byte]))
        assert _read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_a_chunked_body_and_a_head_without_a_body_are_answered(server: Any, images: dict[str, bytes]) -> None:
    content = images[".png"]
    half = len(content) // 2
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (content[:half], content[half:])) + b"0\r\n\r\n"
    head = b"POST /v1/recognize HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert _ask(server, head + body).startswith(b"HTTP/1.1 200 ")
    answer = _ask(server, b"HEAD /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert answer.endswith(b"\r\n\r\n")


def test_a_client_of_http_1_0_and_one_that_closes_its_side_get_their_answer(
    server: Any, images: dict[str, bytes]
) -> None:
    old = _post(images[".png"]).replace(b"HTTP/1.1", b"HTTP/1.0")
    assert _ask(server, old).startswith(b"HTTP/1.1 200 ")
    with server.connect() as connection:
        connection.sendall(_post(images[".png"]))
        connection.shutdown(socket.SHUT_WR)
        assert _read_all(connection).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    "request_bytes, status",
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),  # TLS on a port without
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"POST /v1/recognize HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v1/recognize HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", 400),
        (b"POST /v1/recognize HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
        (b"POST /v1/recognize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET http://[ HTTP/1.1\r\n\r\n", 400),
        (b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 40_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n", 431),
        (b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 404),
        (b"GET http://example.org/healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 200),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n\r\n", 200),
        (b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 400),
        (b"GET /healthz\r\n\r\n", 400),  # HTTP/0.9
        (b"GET /healthz HTTP/2.0\r\nHost: x\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    ],
)
def test_what_is_not_http_is_refused_and_the_connection_closed(server: Any, request_bytes: bytes, status: int) -> None:
    answer = _ask(server, request_bytes)
    assert answer.startswith(b"HTTP/1.1 %d " % status), answer[:200]
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_path_never_reaches_the_file_system(server: Any, tmp_path: Path) -> None:
    for path in (
        "/../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/v2/models/..%2f..%2fetc/ready",
        "/v2/models/%00/ready",
        "/v1/models/../../bundle.json",
        "/page/index.html",
        "/bundle.json",
    ):
        answer = _ask(server, f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        assert answer.startswith(b"HTTP/1.1 404 "), path
        assert b"root:" not in answer
    for query in ("model=../../etc", "model=cnn&version=../..", "model=%2fetc"):
        answer = _ask(server, _post(b"x", "Connection: close", target=f"/v1/recognize?{query}"))
        assert answer.startswith(b"HTTP/1.1 404 "), query


def test_a_request_id_is_echoed_if_it_is_sane_and_made_otherwise(client: Any) -> None:
    assert client.get("/healthz", headers={"X-Request-Id": "abc-1.2:3/4"}).headers["x-request-id"] == "abc-1.2:3/4"
    made = {
        client.get("/healthz", headers={"X-Request-Id": bad}).headers["x-request-id"]
        for bad in ("two words", "x" * 200, "a\tb", "")
    }
    assert len(made) == 4
    assert all(len(each) == 16 for each in made)


# --- limits


def test_slow_clients_are_told_and_let_go(strict: Any, images: dict[str, bytes]) -> None:
    started = time.monotonic()
    with strict.connect() as silent, strict.connect() as in_head, strict.connect() as in_body:
        in_head.sendall(b"POST /v1/recognize HTTP/1.1\r\nHost:")
        in_body.sendall(_post(images[".png"])[:-10])
        assert _read_all(silent) == b""
        assert _read_all(in_head).startswith(b"HTTP/1.1 408 ")
        assert _read_all(in_body).startswith(b"HTTP/1.1 408 ")
    assert 0.9 < time.monotonic() - started < 10
    # One that drips a byte now and then is no better.
    with strict.connect() as dripping:
        dripping.settimeout(0.2)
        dripping.sendall(b"GET /healthz HTTP/1.1\r\n")
        received = b""
        while not received:
            dripping.sendall(b"X")
            try:
                received = dripping.recv(100)
            except TimeoutError:
                assert time.monotonic() - started < 20
        assert received.startswith(b"HTTP/1.1 408 ")


def test_bodies_and_images_above_the_limits_are_refused(strict: Any) -> None:
    with httpx.Client(base_url=strict.url, timeout=60) as client:
        large = client.post("/v1/recognize", content=bytes(300_000))
        assert (large.status_code, large.json()["reason"]) == (413, "too_many_bytes")
        import cv2
        import numpy as np

        wide = cv2.imencode(".png", np.zeros((101, 100, 3), np.uint8))[1].tobytes()
        refused = client.post("/v1/recognize", content=wide)
        assert (refused.status_code, refused.json()["reason"]) == (413, "too_many_pixels")


def test_more_connections_than_allowed_are_refused_and_the_others_go_on(strict: Any) -> None:
    held = [strict.connect() for _ in range(8)]
    try:
        assert _read_all(strict.connect()).startswith(b"HTTP/1.1 503 ")
        held[0].sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert held[0].recv(100).startswith(b"HTTP/1.1 200 ")
    finally:
        for connection in held:
            connection.close()


def test_a_line_of_the_log_stays_a_line_whatever_the_path(strict: Any) -> None:
    _ask(strict, b"GET /a\x1b[31m\x80\xff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    _ask(strict, b"GET /a%0ab HTTP/1.1\r\nHost: x\r\nX-Request-Id: findme\r\nConnection: close\r\n\r\n")
    deadline = time.monotonic() + 10
    while not any("findme" in line for line in strict.lines) and time.monotonic() < deadline:
        time.sleep(0.02)
    (line,) = [line for line in strict.lines if "findme" in line]
    assert "path=/a%0ab" in line
    assert "status=404" in line
    assert not any("\x1b" in line for line in strict.lines)


# --- security


def test_without_the_token_only_probes_and_pages_answer(guarded_client: Any, images: dict[str, bytes]) -> None:
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/", "/docs", "/openapi.json"):
        assert guarded_client.get(path).status_code == 200, path
    for method, path in (
        ("POST", "/v1/recognize"),
        ("POST", "/v1/saliency"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/v2"),
        ("GET", "/v2/models/cnn"),
        ("POST", "/v2/models/cnn/infer"),
    ):
        for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer"}):
            answer = guarded_client.request(method, path, headers=header)
            assert answer.status_code == 401, (path, header)
            assert answer.headers["www-authenticate"] == "Bearer"
    authorization = {"Authorization": f"Bearer {TOKEN}"}
    assert guarded_client.post("/v1/recognize", content=images[".png"], headers=authorization).status_code == 200


def test_only_pages_from_allowed_origins_may_read_answers(guarded_client: Any, client: Any) -> None:
    friend = guarded_client.get("/healthz", headers={"Origin": "https://example.org"})
    assert friend.headers["access-control-allow-origin"] == "https://example.org"
    stranger = guarded_client.get("/healthz", headers={"Origin": "https://example.com"})
    assert "access-control-allow-origin" not in stranger.headers
    asked = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST"}
    preflight = guarded_client.options("/v1/recognize", headers=asked)
    assert preflight.status_code == 200
    assert "POST" in preflight.headers["access-control-allow-methods"]
    for header in ("authorization", "inference-header-content-length"):
        assert header in preflight.headers["access-control-allow-headers"]
    for header in ("retry-after", "inference-header-content-length", "x-request-id"):
        assert header in friend.headers["access-control-expose-headers"]
    # No browser guesses what an answer may be.
    for answer in (friend, stranger, client.get("/"), client.get("/nowhere")):
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"]
    # Off by default.
    default = client.options("/v1/recognize", headers=asked)
    assert default.status_code == 405
    assert not [name for name in default.headers if name.startswith("access-control")]


def test_the_json_log_has_one_object_a_line_with_the_id_and_never_the_token(guarded: Any, guarded_client: Any) -> None:
    guarded_client.get("/v1/models", headers={"X-Request-Id": "in-the-log", "Authorization": f"Bearer {TOKEN}"})
    deadline = time.monotonic() + 10
    while not any("in-the-log" in line for line in guarded.lines) and time.monotonic() < deadline:
        time.sleep(0.02)
    events = [json.loads(line) for line in guarded.lines if line.startswith("{")]
    (event,) = [event for event in events if event.get("request_id") == "in-the-log"]
    assert (event["status"], event["path"], event["level"]) == (200, "/v1/models", "info")
    assert TOKEN not in "".join(guarded.lines)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--tls-cert", "nothing.pem"], "both a certificate and its key"),
        (["--tls-cert", "nothing.pem", "--tls-key", "nothing.pem"], "can't be used"),
        (["--token-file", "nothing"], "can't be read"),
        (["--canary", "cats=7:2"], "MODEL=VERSION:WEIGHT"),
        (["--shadow", "cats"], "MODEL=VERSION"),
        (["--log-format", "xml"], "not text or json"),
    ],
)
def test_settings_that_can_not_be_are_one_clear_line(
    small_bundle: str, arguments: list[str], words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from manyeyes.cli.serve import command
    from manyeyes.errors import UsageError

    options = {
        name.removeprefix("--").replace("-", "_"): value
        for name, value in zip(arguments[::2], arguments[1::2], strict=True)
    }
    for name in ("canary", "shadow"):
        if name in options:
            options[name] = [options[name]]
    with pytest.raises(UsageError, match=words) as raised:
        command(small_bundle, port=0, **options)
    assert "\n" not in str(raised.value)
