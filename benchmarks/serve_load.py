"""Load for a server, from one core: a closed loop by wrk, an open loop by this file; run alone, how fast both are.

    python benchmarks/serve_load.py [--rate 12000]

Closed loop (how many answers a second the server can give): wrk (Debian: apt-get install wrk), the next request of a
connection when its answer is there. Open loop (how long answers take at a given rate): the moments at which requests
are due are fixed beforehand; each is sent then if a connection is free, else as soon as one is, and its latency counts
from the moment it was due, so that a server that stalls can't hide it (coordinated omission). The native tools for that
keep time by timers of a millisecond, which is more than what is measured here; this loop never sleeps, and so needs a
core for itself. What both can do at best is measured against a responder that only counts bytes. With a time to compute
for each answer that responder also says how even the answers of any server can be on this machine: one thread, no work
but to compute for so long.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import gc
import multiprocessing
import os
import random
import re
import select
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_SCRIPT = """
local file = io.open("{body}", "rb")
wrk.method = "POST"
wrk.body = file:read("*all")
wrk.headers["Content-Type"] = "{content_type}"
function done(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format("RESULT %.0f %.0f %.0f %.0f %.0f\\n", summary.requests, summary.duration,
        errors.status + errors.connect + errors.read + errors.write + errors.timeout,
        latency:percentile(50), latency:percentile(99)))
end
"""


class LoadError(Exception):
    """The server did not answer as it should."""


@dataclass(frozen=True)
class Request:
    """A POST, the same again and again."""

    path: str
    body: bytes
    content_type: str = "application/octet-stream"

    def message(self) -> bytes:
        head = f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {self.content_type}\r\n"
        return f"{head}Content-Length: {len(self.body)}\r\n\r\n".encode() + self.body


@dataclass(frozen=True)
class Load:
    """What was measured: answers, answers/s, and percentiles of the latency in seconds."""

    num: int
    rate: float
    p50: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float], rate: float) -> Load:
        percentiles = statistics.quantiles(seconds, n=100, method="inclusive")
        return cls(len(seconds), rate, percentiles[49], percentiles[98])


def cores() -> tuple[int, int]:
    """The server's and the load's; the same where there is only one."""
    available = sorted(os.sched_getaffinity(0))
    return available[0], available[-1]


def pool_on(core: int) -> ProcessPoolExecutor:
    """One fresh process on that core, without what this one has loaded."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, initializer=os.sched_setaffinity, initargs=(0, {core}))


def call_on(core: int, function: Callable[..., Any], *arguments: Any) -> Any:
    with pool_on(core) as pool:
        return pool.submit(function, *arguments).result()


def closed_loop(port: int, request: Request, connections: int, seconds: float, core: int) -> Load:
    """wrk with one thread on `core`.

    Raises:
        LoadError: an answer was no 2xx, or did not come.
    """
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed. On Debian: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        body, script = Path(folder) / "body", Path(folder) / "post.lua"
        body.write_bytes(request.body)
        script.write_text(_SCRIPT.format(body=body, content_type=request.content_type))
        # By default wrk counts what takes more than two seconds as an error.
        how = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", str(script)]
        command = ["taskset", "-c", str(core), "wrk", *how]
        output = subprocess.run(
            [*command, f"http://127.0.0.1:{port}{request.path}"], capture_output=True, text=True, timeout=seconds + 60
        )
    found = re.search(r"^RESULT (\d+) (\d+) (\d+) (\d+) (\d+)$", output.stdout, re.MULTILINE)
    if found is None:
        raise LoadError(f"wrk: {output.stderr.strip() or output.stdout.strip()}")
    num, microseconds, errors, p50, p99 = map(int, found.groups())
    if errors or not num:
        raise LoadError(f"{errors} of {num + errors} requests failed")
    return Load(num, num / microseconds * 1e6, p50 / 1e6, p99 / 1e6)


def open_loop(port: int, request: Request, rate: float, seconds: float, connections: int, poisson: bool) -> Load:
    """Send `rate` requests a second for so long, evenly or at random moments; to be run on a core of its own.

    Raises:
        LoadError: an answer was not 200, a connection was closed, or nothing came for ten seconds.
    """
    total = max(100, round(rate * seconds))
    draw = random.Random(0)
    due, moment = [], 0.0
    for _ in range(total):
        due.append(moment)
        moment += draw.expovariate(rate) if poisson else 1 / rate
    # So that random moments, too, are just so many a second.
    due = [at * total / rate / moment for at in due]
    message = request.message()
    latencies: list[float] = []
    parts: dict[int, bytes] = {}
    due_of: dict[int, float] = {}
    with contextlib.ExitStack() as stack:
        poll = stack.enter_context(select.epoll())
        open_sockets = {}
        for _ in range(connections):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # The whole request fits, so that sending never waits for the server to read.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
            connection.settimeout(None)
            open_sockets[connection.fileno()] = connection
            poll.register(connection, select.EPOLLIN)
        # In turn, so that none waits so long for a request that the server closes it.
        idle = collections.deque(open_sockets)
        gc.disable()
        sent = 0
        started = last = time.perf_counter()
        while len(latencies) < total:
            now = time.perf_counter()
            if sent < total and idle and due[sent] <= now - started:
                descriptor = idle.popleft()
                due_of[descriptor] = due[sent]
                open_sockets[descriptor].sendall(message)
                sent += 1
            for descriptor, _ in poll.poll(0):
                received = open_sockets[descriptor].recv(1 << 16)
                last = time.perf_counter()
                if not received:
                    raise LoadError("the server closed a connection")
                answer = parts.pop(descriptor, b"") + received
                if _is_complete(answer):
                    latencies.append(last - started - due_of[descriptor])
                    idle.append(descriptor)
                else:
                    parts[descriptor] = answer
            if now - last > 10 and len(idle) < connections:
                raise LoadError("no answer for ten seconds")
    return Load.of(latencies, total / (last - started))


def _is_complete(answer: bytes) -> bool:
    end = answer.find(b"\r\n\r\n")
    if end < 0:
        return False
    if not answer.startswith(b"HTTP/1.1 200"):
        raise LoadError(f"the server answered {answer[:200]!r}")
    length = _LENGTH.search(answer, 0, end + 2)
    if length is None:
        raise LoadError("the server's answer has no Content-Length")
    return len(answer) >= end + 4 + int(length[1])


class _Null(asyncio.Protocol):
    """Answers as soon as as many bytes have come as the first request of the connection had."""

    answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 350\r\n\r\n" + 350 * b" "

    def __init__(self, work_seconds: float) -> None:
        self.work_seconds = work_seconds

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.size = 0
        self.received = b""
        self.num_received = 0

    def data_received(self, data: bytes) -> None:
        self.num_received += len(data)
        if not self.size:
            self.received += data
            end = self.received.find(b"\r\n\r\n")
            length = _LENGTH.search(self.received, 0, end + 2) if end >= 0 else None
            if length is None:
                return
            self.size = end + 4 + int(length[1])
        while self.num_received >= self.size:
            self.num_received -= self.size
            end_of_work = time.thread_time() + self.work_seconds
            while time.thread_time() < end_of_work:
                pass
            self.transport.write(self.answer)


def _serve_null(core: int, listener: socket.socket, work_seconds: float) -> None:
    import uvloop

    os.sched_setaffinity(0, {core})

    async def serve() -> None:
        server = await asyncio.get_running_loop().create_server(lambda: _Null(work_seconds), sock=listener)
        await server.serve_forever()

    uvloop.run(serve())


@contextlib.contextmanager
def null_responder(core: int, work_seconds: float = 0.0) -> Iterator[int]:
    """The port of a server on `core` that does nothing but compute for so long (CPU time) and answer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = multiprocessing.get_context("spawn").Process(
            target=_serve_null, args=(core, listener, work_seconds), daemon=True
        )
        process.start()
        try:
            yield listener.getsockname()[1]
        finally:
            process.terminate()
            process.join()


def limits(request: Request, rate: float, connections: int, seconds: float) -> tuple[Load, Load]:
    """What wrk, and the open loop asked for `rate`, reach against the responder that does nothing."""
    server_core, load_core = cores()
    if server_core == load_core:
        raise SystemExit("There is one core; server and load need one each.")
    with null_responder(server_core) as port:
        closed = closed_loop(port, request, connections, seconds, load_core)
        return closed, call_on(load_core, open_loop, port, request, rate, seconds, connections, False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=12_000, help="asked of the open loop")
    parser.add_argument("--body", type=int, default=750, help="bytes")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=3)
    arguments = parser.parse_args()
    request = Request("/", os.urandom(arguments.body))
    closed, opened = limits(request, arguments.rate, arguments.connections, arguments.seconds)
    for name, load in (("closed, wrk", closed), (f"open, {arguments.rate:,.0f}/s asked", opened)):
        print(f"{name:26}{load.rate:10,.0f}/s  p50 {load.p50 * 1e3:.3f} ms  p99 {load.p99 * 1e3:.3f} ms")


if __name__ == "__main__":
    main()
