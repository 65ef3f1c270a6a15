"""A real browser for the tests of pages: one headless tab, spoken to over its debugging pipe."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

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
        self.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")

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
        code = {"Tab": 9, "Enter": 13, "Space": 32, "ArrowRight": 39, "ArrowDown": 40, "+": 187, "0": 48}[key]
        text = {"Enter": "\r", "Space": " ", "+": "+", "0": "0"}.get(key, "")
        kind = "keyDown" if text else "rawKeyDown"
        names = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type=kind, text=text, **names)
        self.call("Input.dispatchKeyEvent", type="keyUp", **names)

    def contrasts(self) -> tuple[float, list[Any]]:
        """The luminance of the ground, 0 to 1, and the texts that stand out from theirs by less than 4.5 to 1."""
        ground, weak = self.evaluate(_CONTRASTS)
        return ground, weak


_CONTRASTS = """(() => {
    const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    const parse = colour => {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        return [...context.getImageData(0, 0, 1, 1).data];
    };
    const luminance = colour => parse(colour).slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const groundOf = element => {
        while (parse(getComputedStyle(element).backgroundColor)[3] < 255) element = element.parentElement;
        return luminance(getComputedStyle(element).backgroundColor);
    };
    const isText = node => node.nodeType === 3 && node.textContent.trim();
    const shown = [...document.body.querySelectorAll('*')].filter(element =>
        element.checkVisibility() && !element.closest('script, style') && [...element.childNodes].some(isText));
    const found = shown.map(element => {
        const levels = [luminance(getComputedStyle(element).color), groundOf(element)].sort((a, b) => b - a);
        return [element.outerHTML.slice(0, 80), (levels[0] + 0.05) / (levels[1] + 0.05)];
    });
    if (found.length < 30) throw new Error('too little text was found');
    return [groundOf(document.body), found.filter(([, contrast]) => contrast < 4.5)];
})()"""


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
