"""Watch the memory of `manyeyes serve` under load: python scripts/soak_serve.py BUNDLE [--minutes 10] [--workers 2].

Images of all formats, damaged ones, bodies that are none, saliency and metrics are asked for by some clients at once.
Prints the resident memory of all processes of the server every ten seconds, and fails if it grows by more than the
bound after the first minute, if anything is answered by a 5xx, or if the server does not end well.
"""

from __future__ import annotations

import argparse
import http.client
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

MAX_GROWTH_BYTES = 16 * 1024 * 1024


def resident_bytes(pid: int) -> int:
    """Of a process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    total = 0
    for each in (pid, *children):
        status = Path(f"/proc/{each}/status").read_text()
        total += int(status.partition("VmRSS:")[2].split()[0]) * 1024
    return total


def requests() -> list[tuple[str, str, bytes]]:
    """Method, path and body: images of all formats and sizes, what is none, a map of saliency, and the metrics."""
    draw = np.random.default_rng(0)
    bodies = [b"no image", bytes(100_000), b""]
    for side in (28, 200, 900):
        pixels = cv2.resize(draw.integers(0, 255, (7, 7, 3), dtype=np.uint8), (side, side))
        for suffix in (".png", ".jpg", ".webp", ".bmp", ".tiff", ".gif"):
            encoded = cv2.imencode(suffix, pixels)[1].tobytes()
            bodies += [encoded, encoded[: len(encoded) // 2]]
    return [
        *(("POST", "/v1/recognize", body) for body in bodies),
        ("POST", "/v1/saliency", bodies[3]),
        ("GET", "/metrics", b""),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--clients", type=int, default=8)
    options = parser.parse_args()
    command = [sys.executable, "-m", "manyeyes.cli.main", "serve", options.bundle, "--port", "0"]
    server = subprocess.Popen([*command, "--workers", str(options.workers)], stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    line = next(line for line in server.stderr if " at http" in line)
    threading.Thread(target=lambda: list(server.stderr or []), daemon=True).start()
    host, port = line.rsplit("//", 1)[1].strip().split(":")
    sent, stop = requests(), threading.Event()
    statuses: Counter[int] = Counter()

    def ask(client: int) -> None:
        connection = http.client.HTTPConnection(host, int(port), timeout=60)
        index = 7 * client
        while not stop.is_set():
            method, path, body = sent[index % len(sent)]
            # There is one map at a time; to others the server says that it is busy.
            connection.request(method, "/v1/recognize" if client and path == "/v1/saliency" else path, body)
            response = connection.getresponse()
            response.read()
            statuses[response.status] += 1
            index += 1

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(options.clients)]
    for thread in threads:
        thread.start()
    started = time.monotonic()
    settled: list[tuple[float, int]] = []  # minutes and bytes
    try:
        while (passed := time.monotonic() - started) < 60 * options.minutes:
            time.sleep(min(10.0, 60 * options.minutes / 6))
            resident = resident_bytes(server.pid)
            if passed >= min(60.0, 6 * options.minutes):
                settled.append((passed / 60, resident))
            print(f"{passed:5.0f} s  {sum(statuses.values()):9,} requests  {resident / 2**20:8.1f} MiB", flush=True)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        server.terminate()
    growth = settled[-1][1] - settled[0][1]
    minutes, resident_sizes = np.array(settled).T
    slope = np.polyfit(minutes, resident_sizes, 1)[0]
    code = server.wait(timeout=60)
    print(
        f"{dict(sorted(statuses.items()))}; growth {growth / 2**20:.1f} MiB, allowed "
        f"{MAX_GROWTH_BYTES / 2**20:.0f} MiB; slope {slope / 2**20:.2f} MiB a minute"
    )
    good = growth <= MAX_GROWTH_BYTES and code == 0 and not [status for status in statuses if status >= 500]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
