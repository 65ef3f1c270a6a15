"""A page that shows what `watch` sees and says, live: the standard library's HTTP server in a thread."""

from __future__ import annotations

import ipaddress
import json
import threading
from dataclasses import asdict
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import cv2
import numpy as np

from manyeyes.errors import UsageError
from manyeyes.imaging.decode import decode
from manyeyes.recognition.stream import StreamResult, StreamStatistics
from manyeyes.recognition.stream_sources import Frame

_MAX_SIDE = 640
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src 'self'; connect-src 'self'"
)
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Manyeyes: watching</title>
<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark"><style>
body{font:16px system-ui,sans-serif;max-width:42rem;margin:1rem auto;padding:0 1rem}
img{max-width:100%;min-height:6rem;display:block;background:#8884}meter{width:100%;height:1rem}
li{display:grid;grid-template-columns:1fr auto;margin:.3rem 0}meter{grid-column:1/3}ol{padding:0}
</style><h1>Watching</h1><img id="frame" alt="the newest frame">
<p id="line" aria-live="polite">Waiting for a frame …</p>
<ol id="classes"></ol><p id="statistics"></p><script>
const by = id => document.getElementById(id); let shown = -1;
async function look() {
  try {
    const state = await (await fetch("state")).json();
    by("statistics").textContent = state.statistics;
    if (state.count !== shown && state.result) {
      shown = state.count; const result = state.result;
      if (!result.reason) by("frame").src = "frame.jpg?" + shown;
      const first = result.top_k[0];
      by("line").textContent = result.reason ? `frame ${result.frame}: ${result.reason}: ${result.detail}`
        : `frame ${result.frame}: ${first.class_name}, ${(100 * first.probability).toFixed(1)} %`;
      if (!result.reason) by("classes").replaceChildren(...result.top_k.map(each => {
        const row = document.createElement("li"), name = document.createElement("span");
        const share = document.createElement("span"), bar = document.createElement("meter");
        name.textContent = each.class_name; share.textContent = (100 * each.probability).toFixed(1) + " %";
        bar.value = each.probability; bar.setAttribute("aria-label", each.class_name);
        row.append(name, share, bar); return row;
      }));
    }
  } catch { by("statistics").textContent = "The stream has ended."; }
  setTimeout(look, 100);
}
look();
</script></html>"""


class Preview:
    """Serves the newest frame and its answer while its block runs.

    Args:
        port: 0 takes a free one.
        host: the address to listen on; others than this machine can look on where it is not a loopback address.

    Raises:
        UsageError: the address can't be used.
    """

    def __init__(self, port: int, statistics: StreamStatistics, host: str = "127.0.0.1") -> None:
        self._statistics = statistics
        self._lock = threading.Lock()
        self._newest: tuple[int, StreamResult | None, Frame | None] = (0, None, None)
        try:
            self._server = ThreadingHTTPServer((host, port), self._handler())
        except (OSError, OverflowError) as error:
            raise UsageError(f"The preview can't be served on {host}:{port}: {error}. Choose another port.") from None
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_address[1]}/"

    def __enter__(self) -> Preview:
        threading.Thread(target=self._server.serve_forever, name="manyeyes-preview", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def show(self, result: StreamResult, frame: Frame) -> None:
        """Make this what the page shows. Costs nothing until somebody looks."""
        with self._lock:
            kept = self._newest[2] if result.reason else frame
            self._newest = (self._newest[0] + 1, result, kept)

    def _state(self) -> bytes:
        with self._lock:
            count, result, _ = self._newest
        told = self._statistics.told(now=True)
        return json.dumps({"count": count, "result": asdict(result) if result else None, "statistics": told}).encode()

    def _jpeg(self) -> bytes | None:
        with self._lock:
            frame = self._newest[2]
        if frame is None:
            return None
        image = decode(frame.image) if isinstance(frame.image, bytes) else frame.image
        assert isinstance(image, np.ndarray)
        scale = _MAX_SIDE / max(image.shape[:2])
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        return cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))[1].tobytes()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        preview = self

        class Handler(BaseHTTPRequestHandler):
            server_version, sys_version = "manyeyes", ""
            timeout = 10

            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                content: bytes | None = None
                kind = "text/plain; charset=utf-8"
                if not _may_ask(self.headers.get("Host", "")):
                    self._answer(HTTPStatus.FORBIDDEN, kind, b"Use the address that watch has printed.\n")
                    return
                if path == "/":
                    content, kind = _PAGE.encode(), "text/html; charset=utf-8"
                elif path == "/state":
                    content, kind = preview._state(), "application/json"
                elif path == "/frame.jpg":
                    content, kind = preview._jpeg(), "image/jpeg"
                if content is None:
                    self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"There is nothing here.\n")
                else:
                    self._answer(HTTPStatus.OK, kind, content)

            def _answer(self, status: HTTPStatus, kind: str, content: bytes) -> None:
                self.send_response(status)
                for name, value in (
                    ("Content-Type", kind),
                    ("Content-Length", str(len(content))),
                    ("Content-Security-Policy", _POLICY),
                    ("X-Content-Type-Options", "nosniff"),
                    ("Cache-Control", "no-store"),
                ):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        return Handler


def _may_ask(host: str) -> bool:
    """Whether a Host header names an address: a page of elsewhere can point a name at 127.0.0.1 and read a camera."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True
