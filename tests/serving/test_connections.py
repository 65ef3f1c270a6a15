"""What one connection may cost: heads, requests sent ahead, bodies that stand still, slow readers, handshakes."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import resource
import socket
import ssl
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from manyeyes.serving.http import HttpServer
from manyeyes.serving.messages import Application, Request, Response
from manyeyes.serving.settings import ServeSettings


class Echo(Application):
    """Answers with so many bytes as the path says, else with the number of bytes of the body."""

    def open(self, request: Request) -> Response | None:
        return None

    def handle(self, request: Request) -> Response:
        size = request.path[1:]
        return Response(200, bytes(int(size)) if size else b"%d" % len(request.body))

    def refusal(self, status: int, reason: str, detail: str) -> Response:
        return Response(status, detail.encode())

    def answered(self, request: Request, status: int, size_bytes: int) -> None:
        pass


def _with_server(client: Callable[[int, HttpServer], None], tls: ssl.SSLContext | None = None, **settings: Any) -> None:
    """Run `client` on a thread with the port of a server that is the HTTP of `manyeyes serve`."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            server = HttpServer(Echo(), dataclasses.replace(ServeSettings(), **settings), tls)
            await server.start(listener)
            await asyncio.to_thread(client, listener.getsockname()[1], server)
            await server.drain(0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=30)


def _post(body: bytes, *headers: str, length: int | None = None) -> bytes:
    lines = ["POST / HTTP/1.1", "Host: x", f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _read_all(connection: socket.socket) -> bytes:
    received = bytearray()
    while chunk := connection.recv(1 << 20):
        received += chunk
    return bytes(received)


# --- requests


def test_a_request_that_offers_another_protocol_keeps_its_body_and_its_connection(
    server: Any, images: dict[str, bytes]
) -> None:
    content = images[".png"]
    offer = b"POST /v1/recognize HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    offer += b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
    whole = offer + b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    chunked = offer + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(content), content)
    get = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"
    last = b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    with server.connect() as connection:
        connection.sendall(whole + chunked + get + whole[:300])
        time.sleep(0.05)
        connection.sendall(whole[300:] + last)
        answers = _read_all(connection)
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 5, answers
    assert answers.count(b'"predictions"') == 3


@pytest.mark.parametrize("length, status", [(17_000, 200), (40_000, 431)])
def test_a_long_head_is_measured_once_however_it_comes(server: Any, length: int, status: int) -> None:
    with server.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"a" * length + b"\r\n")
        time.sleep(0.1)
        try:
            connection.sendall(b"Connection: close\r\n\r\n")
        finally:
            assert _read_all(connection).startswith(b"HTTP/1.1 %d " % status)


def test_a_body_in_front_of_a_head_is_no_part_of_it(server: Any) -> None:
    refused = _post(b"b" * 40_000).replace(b"POST / ", b"POST /v1/recognize ")
    with server.connect() as connection:
        connection.sendall(refused + b"GET /healthz HTT")
        time.sleep(0.1)
        connection.sendall(b"P/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answers = _read_all(connection)
    assert answers.startswith(b"HTTP/1.1 415 ")
    assert answers.count(b"HTTP/1.1 200 OK\r\n") == 1


def test_trailers_without_an_end_are_refused() -> None:
    def client(port: int, server: HttpServer) -> None:
        with _connect(port) as connection:
            connection.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\nX: ")
            answer = b""
            connection.settimeout(0.01)
            for _ in range(100):
                connection.sendall(b"a" * 4000)
                try:
                    answer = connection.recv(100)
                    break
                except TimeoutError:
                    continue
            assert answer.startswith(b"HTTP/1.1 431 ")

    _with_server(client)


def test_of_requests_that_are_sent_ahead_only_their_bytes_are_kept(server: Any) -> None:
    def resident_bytes() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    with server.connect() as connection:
        request = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        connection.sendall(request * 999 + request.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert _read_all(connection).count(b"HTTP/1.1 200 OK\r\n") == 1000
    before = resident_bytes()
    connections = [server.connect() for _ in range(20)]
    try:
        for connection in connections:
            connection.setblocking(False)
            connection.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 25_000)
        time.sleep(0.5)
        assert resident_bytes() - before < 25_000_000
    finally:
        for connection in connections:
            connection.close()


# --- bodies


def test_a_body_that_stands_still_is_given_up_whatever_has_come_of_it() -> None:
    def client(port: int, server: HttpServer) -> None:
        with _connect(port) as standing, _connect(port) as slow:
            standing.sendall(_post(bytes(8_000_000), length=8_000_001))
            started = time.monotonic()
            # 100 kB a second is more than 32 kB a second.
            slow.sendall(_post(b"", length=300_000))
            for _ in range(20):
                slow.sendall(bytes(15_000))
                time.sleep(0.1)
            assert slow.recv(1000).endswith(b"300000")
            assert _read_all(standing).startswith(b"HTTP/1.1 408 ")
            assert time.monotonic() - started < 5

    _with_server(client, body_timeout_seconds=1.0)


def test_bodies_that_stand_still_make_room_for_those_that_come() -> None:
    def client(port: int, server: HttpServer) -> None:
        standing = [_connect(port) for _ in range(5)]
        for connection in standing:
            connection.sendall(_post(bytes(900_000), length=1_000_000))
        time.sleep(0.5)
        with _connect(port) as quick:
            quick.sendall(_post(bytes(950_000)))
            assert quick.recv(1000).endswith(b"950000")
        dropped = 0
        for connection in standing:
            connection.settimeout(0.2)
            try:
                dropped += connection.recv(1000).startswith(b"HTTP/1.1 408 ")
            except TimeoutError:
                connection.sendall(bytes(100_000))
                connection.settimeout(30)
                assert connection.recv(1000).endswith(b"1000000")
            connection.close()
        assert dropped == 1

    _with_server(client, max_bodies_bytes=5_000_000)


# --- answers


def test_a_client_that_reads_slowly_but_steadily_gets_all_of_its_answer_and_one_that_stops_is_let_go() -> None:
    size = 16_000_000

    def client(port: int, server: HttpServer) -> None:
        with socket.socket() as slow, socket.socket() as stopped:
            for connection in (slow, stopped):
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
                connection.settimeout(30)
                connection.connect(("127.0.0.1", port))
                connection.sendall(b"GET /%d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % size)
            received = 0
            started = time.monotonic()
            while chunk := slow.recv(200_000):
                received += len(chunk)
                time.sleep(0.03)
            assert received > size
            assert time.monotonic() - started > 2, "it was too quick to show anything"
            with contextlib.suppress(ConnectionResetError):
                assert len(_read_all(stopped)) < size

    _with_server(client, write_timeout_seconds=0.8)


# --- connections


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> ssl.SSLContext:
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", folder / "key.pem", "-out", folder / "certificate.pem", "-days", "2", "-subj", "/CN=x"]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    return context


def test_connections_that_never_shake_hands_count_as_connections_and_are_let_go(tls: ssl.SSLContext) -> None:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE

    def ask(port: int) -> bytes:
        with context.wrap_socket(_connect(port)) as connection:
            connection.sendall(_post(b"12345", "Connection: close"))
            return _read_all(connection)

    def client(port: int, server: HttpServer) -> None:
        assert ask(port).endswith(b"5")
        silent = [_connect(port) for _ in range(4)]
        with _connect(port) as one_too_many:
            assert one_too_many.recv(10) == b""
        assert server.num_connections == 4
        for connection in silent:
            assert connection.recv(10) == b""
        while server.num_connections:
            time.sleep(0.01)
        with _connect(port) as no_tls:
            no_tls.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert not no_tls.recv(1000).startswith(b"HTTP")
        assert ask(port).endswith(b"5")

    _with_server(client, tls, max_connections=4, header_timeout_seconds=1.0)


def test_as_many_files_may_be_open_as_connections_are_allowed() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        _with_server(lambda port, server: _connect(port).close(), max_connections=300)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
