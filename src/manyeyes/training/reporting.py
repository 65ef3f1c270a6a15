"""What workers of a gang and the driver tell each other while a training runs: lines of JSON over one socket a worker.

    worker → driver   {"token", "rank"}                               first
                      {"event": "Progress", …}                        from the chief: what people watch
                      {"sign": {"phase", "step"}}                     every second: a sign of life
    driver → worker   {"stop": signal number}

Nothing in it is needed for the result: a worker that can't reach the driver trains all the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import signal
import socket
import socketserver
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from manyeyes import config
from manyeyes.training import events
from manyeyes.training.events import Event, OnEvent
from manyeyes.training.interrupts import StopWish

SECONDS_BETWEEN_SIGNS = 1.0
# A worker that was silent for so long when its gang failed was not running any more.
SILENCE_SECONDS = 5.0
# The exit code of a worker that gave up waiting (EX_TEMPFAIL).
EXIT_HANGS = 75
_CONNECT_SECONDS = 10.0
# How long a step waits for a driver that reads nothing; then the worker says no more.
_SEND_SECONDS = 5.0
_LAST_WORDS_SECONDS = 2.0
_EVENTS: dict[str, Any] = {
    cls.__name__: cls for cls in (events.Started, events.Notice, events.Progress, events.EpochEnd, events.Saved)
}


@dataclass(frozen=True)
class Desk:
    """Where workers report to, as it travels to them: host:port, and a secret that only they know."""

    address: str
    token: str


@dataclass
class Life:
    """What a worker is at.

    Attributes:
        phase: "start", "input", "compute", "exchange", "evaluation" or "end".
        step: global steps done.
        beat_at: time.monotonic() of the last step's end.
    """

    phase: str = "start"
    step: int = 0
    beat_at: float = dataclasses.field(default_factory=time.monotonic)

    def beat(self, phase: str, step: int | None = None) -> None:
        """Enter a phase."""
        self.phase, self.beat_at = phase, time.monotonic()
        if step is not None:
            self.step = step


class FrontDesk:
    """The driver's side: takes reports while its block runs.

    Args:
        notify: called with the chief's events, from another thread.
        wish: passed on to all workers as soon as it is set.
        host: under which workers reach this process.
    """

    def __init__(self, notify: OnEvent, wish: StopWish, host: str = "127.0.0.1") -> None:
        self._notify = notify
        self._wish = wish
        self._token = secrets.token_hex(16)
        self._signs: dict[int, tuple[dict[str, Any], float]] = {}
        self._files: list[Any] = []
        self._num_open = 0
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._is_closed = threading.Event()
        desk = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError, ValueError):
                    desk._serve(self)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET

        self._server = Server((host if _is_loopback(host) else "", 0), Handler)
        self.desk = Desk(f"{host}:{self._server.server_address[1]}", self._token)

    def __enter__(self) -> FrontDesk:
        threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True).start()
        threading.Thread(target=self._pass_on_wish, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._is_closed.set()
        self._server.shutdown()
        self._server.server_close()

    def explain(self) -> str:
        """Which workers were silent, or what all were at, when no step ended any more; empty when nothing is known."""
        # Counted from the last sign of any worker: ending a gang takes a while.
        signs = dict(self._signs)
        newest = max((at for _, at in signs.values()), default=0.0)
        silent = {rank: (sign, newest - at) for rank, (sign, at) in signs.items() if newest - at > SILENCE_SECONDS}
        if silent:
            return " ".join(
                f"Worker {rank} gave no sign of life for {seconds:.0f} s (last: {sign['phase']}, step {sign['step']})."
                for rank, (sign, seconds) in sorted(silent.items())
            )
        waiting = {rank: sign for rank, (sign, _) in signs.items()}
        stuck = [rank for rank, sign in waiting.items() if sign["phase"] != "exchange"]
        if len(stuck) == 1 < len(waiting):
            return f"Worker {stuck[0]} was in {waiting[stuck[0]]['phase']}, the others waited for it."
        return ""

    def finish(self) -> None:
        """Wait a little for what workers that are done said last; raise what `notify` raised."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        while self._num_open and time.monotonic() < deadline:
            time.sleep(0.01)
        if self._error is not None:
            raise self._error

    def forget(self) -> None:
        """Forget the workers of a gang that is over."""
        self._signs.clear()

    def _serve(self, handler: socketserver.StreamRequestHandler) -> None:
        first = json.loads(handler.rfile.readline())
        if not secrets.compare_digest(str(first.get("token")), self._token):
            return
        rank = int(first["rank"])
        with self._lock:
            self._files.append(handler.wfile)
            self._num_open += 1
        try:
            for line in handler.rfile:
                message = json.loads(line)
                if "sign" in message:
                    self._signs[rank] = message["sign"], time.monotonic()
                else:
                    self._pass_on(config.from_dict(_EVENTS[message.pop("event")], message))
        finally:
            with self._lock:
                self._num_open -= 1

    def _pass_on(self, event: Event) -> None:
        try:
            self._notify(event)
        except Exception as error:
            # As in the driver's own process: it ends the training, and is raised there.
            self._error = self._error or error
            self._wish.signal_number = self._wish.signal_number or signal.SIGINT

    def _pass_on_wish(self) -> None:
        while not self._is_closed.wait(0.1):
            if not self._wish:
                continue
            line = json.dumps({"stop": self._wish.signal_number}).encode() + b"\n"
            with self._lock:
                files, self._files = self._files, []
            for file in files:
                with contextlib.suppress(OSError, ValueError):
                    file.write(line)


@contextlib.contextmanager
def reporting(desk: Desk, rank: int, life: Life, timeout_seconds: float) -> Iterator[tuple[OnEvent, StopWish]]:
    """A worker's side: yields what takes events, and the wish that the driver sends.

    While the block runs, a thread says what the worker is at, and the process ends when no step has ended for
    `timeout_seconds`: a worker whose peer hangs waits in an exchange that nothing else can end. 0 waits for ever.
    """
    wish = StopWish()
    connection = _connect(desk)
    lock, is_over = threading.Lock(), threading.Event()

    is_mute = threading.Event()

    def send(message: dict[str, Any]) -> None:
        if connection is not None and not is_mute.is_set():
            with lock:
                try:
                    connection.sendall(json.dumps(message).encode() + b"\n")
                except OSError:
                    is_mute.set()  # half a line may be on its way

    def listen() -> None:
        said = b""
        while connection is not None and not is_over.is_set():
            try:
                part = connection.recv(4096)
            except TimeoutError:
                continue
            except OSError:
                return
            said += part
            if said.endswith(b"\n"):
                wish.signal_number = json.loads(said)["stop"]
            if not part or said.endswith(b"\n"):
                return

    def give_signs() -> None:
        while not is_over.wait(SECONDS_BETWEEN_SIGNS):
            send({"sign": {"phase": life.phase, "step": life.step}})

    send({"token": desk.token, "rank": rank})
    for target in (listen, give_signs):
        threading.Thread(target=target, daemon=True).start()
    try:
        with ends_when_it_hangs(life, timeout_seconds):
            yield (lambda event: send({"event": type(event).__name__, **config.to_dict(event)})), wish
    finally:
        is_over.set()
        if connection is not None:
            connection.close()


@contextlib.contextmanager
def ends_when_it_hangs(life: Life, timeout_seconds: float) -> Iterator[None]:
    """End the process when there is no beat for so long while the block runs; 0 waits for ever."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(min(1.0, timeout_seconds / 4)):
            if time.monotonic() - life.beat_at > timeout_seconds:
                os._exit(EXIT_HANGS)

    if timeout_seconds > 0:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        is_over.set()


def _connect(desk: Desk) -> socket.socket | None:
    host, _, port = desk.address.rpartition(":")
    try:
        connection = socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS)
    except OSError:
        return None
    connection.settimeout(_SEND_SECONDS)
    return connection


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")
