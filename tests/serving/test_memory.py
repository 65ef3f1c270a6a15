"""What a request leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

DRIVER = """
import gc, os, signal, sys, threading
import httpx
from manyeyes.serving.messages import Request
from manyeyes.serving.server import serve

def ask(started):
    with httpx.Client(base_url=started.url) as client:
        image = open(sys.argv[2], "rb").read()
        client.post("/v1/recognize", content=image)
        gc.collect()
        gc.disable()
        for _ in range(20):
            assert client.post("/v1/recognize", content=image).status_code == 200
            assert client.post("/v1/recognize", files={"image": image}).status_code == 200
        alive = sum(isinstance(each, Request) for each in gc.get_objects())
    print("alive", alive, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)

serve(sys.argv[1], port=0, on_start=lambda started: threading.Thread(target=ask, args=(started,)).start())
"""


def test_an_answered_request_is_freed_without_the_garbage_collector(small_bundle: str, red_jpeg: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, small_bundle, str(red_jpeg)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    # The last one may be held by a local variable.
    assert int(done.stdout.split()[1]) <= 2, done.stdout
