from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from manyeyes.evaluation.intervals import wilson_interval
from manyeyes.recognition.bundle import GOLDEN_NAME, Bundle, Evaluation, write_bundle

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--use-fake-device-for-media-stream",
)
# What a page may do wrong without a word to its user.
_COMPLAINTS = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")


class Page:
    """One tab of a headless browser, spoken to over its debugging pipe."""

    def __init__(self, send: Any, session: str, events: list[dict[str, Any]]) -> None:
        self._send = send
        self._session = session
        self._events = events

    def complaints(self) -> list[dict[str, Any]]:
        """What came to the console since the last call: errors, exceptions, violations of the security policy."""
        self.evaluate("1")  # so that what was said until now has come
        found = [event["params"] for event in self._events if event["method"] in _COMPLAINTS]
        self._events.clear()
        return found

    def requested(self) -> list[str]:
        """The URLs that were requested since the last call of this or of `complaints`."""
        self.evaluate("1")
        found = [event["params"]["request"]["url"] for event in self._events if "request" in event["params"]]
        self._events.clear()
        return found

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._send(method, params, self._session)

    def evaluate(self, expression: str) -> Any:
        answer = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until the JavaScript `condition` holds."""
        poll = f"const t = setInterval(() => {{ if ({condition}) {{ clearInterval(t); resolve(true); }} }}, 20)"
        give_up = "setTimeout(() => resolve(false), 15000)"
        assert self.evaluate(f"new Promise(resolve => {{ {poll}; {give_up}; }})"), f"never true: {condition}"

    def open(self, url: str) -> None:
        """Load a page, in the colours of a fresh browser."""
        self.call("Emulation.setEmulatedMedia", features=[])
        self.call("Page.navigate", url=url)
        self.wait_for("document.readyState === 'complete' && location.href.startsWith('http')")

    def choose(self, *paths: Path) -> None:
        """Give files to the page as by its chooser."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])

    def text(self, name: str) -> str:
        return self.evaluate(f"document.getElementById('{name}').textContent")

    def click(self, name: str) -> None:
        self.evaluate(f"document.getElementById('{name}').click()")

    def wait_visible(self, name: str) -> None:
        self.wait_for(f"!document.getElementById('{name}').hidden")

    def answer(self, path: Path) -> None:
        """Let an image be recognised."""
        self.choose(path)
        self.wait_visible("result")

    def explain(self) -> None:
        """Let the pixels be found that decided."""
        self.click("explain")
        self.wait_visible("overlay")

    def press(self, key: str) -> None:
        code = {"Tab": 9, "Enter": 13, "Space": 32}[key]
        text = {"Enter": "\r", "Space": " "}.get(key, "")
        kind = "keyDown" if text else "rawKeyDown"
        names = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type=kind, text=text, **names)
        self.call("Input.dispatchKeyEvent", type="keyUp", **names)


def _write_film(path: Path) -> Path:
    """What the browser's camera sees, again and again: a second and a half of green, then of blue."""
    frames = []
    for colour in ((40, 180, 40), (40, 40, 180)):
        planes = cv2.cvtColor(np.full((48, 64, 3), colour, np.uint8), cv2.COLOR_RGB2YUV_I420)
        frames += 15 * [b"FRAME\n" + planes.tobytes()]
    path.write_bytes(b"YUV4MPEG2 W64 H48 F10:1 Ip A1:1 C420jpeg\n" + b"".join(frames))
    return path


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        pytest.skip(
            f"no browser is installed; one of {', '.join(_BROWSERS)} is needed (Debian: apt-get install chromium)"
        )
    to_browser_read, to_browser = os.pipe()
    from_browser, from_browser_write = os.pipe()
    profile = tmp_path_factory.mktemp("profile")
    # The browser reads commands from descriptor 3 and answers on 4.
    camera = f"--use-file-for-fake-video-capture={_write_film(profile / 'film.y4m')}"
    shell = f'exec "$0" "$@" 3<&{to_browser_read} 4>&{from_browser_write}'
    process = subprocess.Popen(
        ["bash", "-c", shell, browser, *_FLAGS, camera, f"--user-data-dir={profile}"],
        pass_fds=(to_browser_read, from_browser_write),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(to_browser_read)
    os.close(from_browser_write)
    numbers = itertools.count(1)
    buffer = bytearray()
    events: list[dict[str, Any]] = []

    def send(method: str, params: dict[str, Any], session: str | None = None) -> dict[str, Any]:
        number = next(numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(to_browser, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in buffer:
                chunk = os.read(from_browser, 1 << 16)
                assert chunk, "the browser ended"
                buffer.extend(chunk)
            answer, _, rest = bytes(buffer).partition(b"\0")
            buffer[:] = rest
            content = json.loads(answer)
            if content.get("id") == number:
                assert "error" not in content, content["error"]
                return content["result"]
            if "method" in content:
                events.append(content)

    try:
        target = send("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = send("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log", "Network", "Accessibility"):
            send(f"{domain}.enable", {}, session)
        yield Page(send, session, events)
    finally:
        process.terminate()
        process.wait(timeout=60)
        os.close(to_browser)
        os.close(from_browser)


class Server:
    """`manyeyes serve` in a process of its own."""

    def __init__(self, models: str, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "manyeyes.cli.main", "serve", models, "--port", "0", *arguments],
            env={**os.environ, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if " at http" in line:
                break
        else:
            raise AssertionError("".join(self.lines))
        self.url = line.rsplit(" ", 1)[1].strip()
        self._drain = threading.Thread(target=lambda: self.lines.extend(self.process.stderr or []), daemon=True)
        self._drain.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port, for requests that no client would send."""
        host, port = self.url.rpartition("//")[2].split(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=30)

    def stop(self) -> int:
        self.process.terminate()
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(timeout=60)
        self._drain.join()
        return code


def _figures_of(num_classes: int) -> Evaluation:
    """Figures of an evaluation: label i was found in 1 of i + 1 examples, but the last class has none."""
    support = [label + 1 for label in range(num_classes - 1)]
    shares = (*(round(1 / count, 4) for count in support), None)
    return Evaluation(
        dataset="/data/photos",
        dataset_fingerprint="0123456789abcdef",
        split="test",
        num_examples=sum(support),
        confidence=0.95,
        accuracy=len(support) / sum(support),
        accuracy_interval=dataclasses.astuple(wilson_interval(len(support), sum(support))),
        top_k_accuracy={"1": len(support) / sum(support), "2": 1.0},
        macro_f1=0.5,
        precision=shares,
        recall=shares,
        f1=shares,
        support=(*support, 0),
    )


@pytest.fixture(scope="session")
def figures_of() -> Callable[[int], Evaluation]:
    return _figures_of


@pytest.fixture(scope="session")
def evaluated_bundle(small_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The small bundle with figures of an evaluation; its version is the same."""
    bundle = Bundle.load(small_bundle)
    files = {file: bundle.read_file(file) for file in bundle.info.files}
    info = dataclasses.replace(bundle.info, evaluation=_figures_of(len(bundle.class_names)))
    return write_bundle(str(tmp_path_factory.mktemp("evaluated") / "bundle"), info, files).uri


@pytest.fixture(scope="session")
def start_server(small_bundle: str) -> Iterator[Callable[..., Server]]:
    """Start `manyeyes serve` on the small bundle, or on what is given by `models`, with more arguments."""
    started: list[Server] = []

    def start(*arguments: str, models: str | Path = small_bundle, **environment: str) -> Server:
        started.append(Server(str(models), *arguments, **environment))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server], evaluated_bundle: str) -> Server:
    return start_server(models=evaluated_bundle)


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def images() -> dict[str, bytes]:
    """One image in each format."""
    pixels = np.random.default_rng(5).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    suffixes = (".png", ".jpg", ".webp", ".bmp", ".tiff", ".gif")
    return {suffix: cv2.imencode(suffix, pixels)[1].tobytes() for suffix in suffixes}


@pytest.fixture(scope="session")
def variant(small_bundle: str) -> Callable[..., Path]:
    """Write the small bundle as another model: its classes turned round, so that it answers otherwise."""

    def write(directory: Path, *, reverse: bool = False, name: str = "cnn") -> Path:
        bundle = Bundle.load(small_bundle)
        names = bundle.class_names[::-1] if reverse else bundle.class_names
        files = {file: bundle.read_file(file) for file in bundle.info.files}
        write_bundle(str(directory), dataclasses.replace(bundle.info, name=name, class_names=names), files)
        return directory

    return write


@pytest.fixture(scope="session")
def unforeseen(small_bundle: str) -> Callable[[Path], Path]:
    """Write a bundle whose checksums are right, and which fails by an exception that is none of ours."""

    def write(directory: Path) -> Path:
        bundle = Bundle.load(small_bundle)
        golden = bundle.golden_examples()
        content = dataclasses.replace(golden, names=golden.names[1:]).to_bytes()
        files = {file: bundle.read_file(file) for file in bundle.info.files} | {GOLDEN_NAME: content}
        write_bundle(str(directory), bundle.info, files)
        return directory

    return write


@pytest.fixture
def red_jpeg(tmp_path: Path) -> Path:
    pixels = np.full((60, 80, 3), (40, 40, 180), np.uint8)
    path = tmp_path / "red.jpg"
    assert cv2.imwrite(str(path), pixels)
    return path


@pytest.fixture
def colours(tmp_path: Path) -> dict[str, Path]:
    """An image of each class; PNG."""
    found = {"red": (180, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 180)}
    for name, colour in found.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((60, 80, 3), colour[::-1], np.uint8))
    return {name: tmp_path / f"{name}.png" for name in found}


@pytest.fixture
def opened(page: Page, server: Server) -> Iterator[Page]:
    """The page of the server."""
    page.complaints()
    page.open(server.url)
    page.wait_visible("about")
    yield page
    page.call("Page.navigate", url="about:blank")
