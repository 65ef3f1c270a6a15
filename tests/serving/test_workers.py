"""Several worker processes, and what becomes of requests when one is killed."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from manyeyes import config
from manyeyes.recognition.bundle import Bundle, Evaluation
from manyeyes.recognition.predictor import Predictor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, evaluated_bundle: str) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(evaluated_bundle, folder / "colours" / "1")
    return folder


@pytest.fixture(scope="module")
def pooled(start_server: Callable[..., Any], folder: Path) -> Any:
    return start_server("--workers", "2", "--threads", "1", "--poll", "0.2", models=folder)


@pytest.fixture
def client(pooled: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pooled.url, timeout=60) as client:
        yield client


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _metric(client: httpx.Client, name: str) -> float:
    found = (f"{name} ", f"{name}{{")
    return sum(
        float(line.rpartition(" ")[2]) for line in client.get("/metrics").text.splitlines() if line.startswith(found)
    )


def test_workers_tell_the_figures_of_the_models_evaluation(client: httpx.Client, evaluated_bundle: str) -> None:
    (model,) = client.get("/v1/models").json()["models"]
    figures = Bundle.load(evaluated_bundle).info.evaluation
    assert figures is not None
    told = config.from_dict(Evaluation, model["versions"][0]["evaluation"])
    assert told == dataclasses.replace(figures, dataset="photos")


def test_workers_answer_as_one_process_does(
    client: httpx.Client, evaluated_bundle: str, images: dict[str, bytes]
) -> None:
    predictor = Predictor.load(evaluated_bundle)
    for encoded in images.values():
        (wanted,) = predictor.predict([encoded], top_k=2)
        answer = client.post("/v1/recognize?top_k=2", content=encoded).json()
        assert [each["label"] for each in answer["predictions"]] == [each.label for each in wanted.top_k]
        assert answer["predictions"][0]["probability"] == pytest.approx(wanted.probability, abs=1e-5)
        assert answer["abstain"] is wanted.abstain is True
    assert client.post("/v1/recognize", content=b"no image").status_code == 415
    assert client.post("/v1/recognize", content=images[".png"][:300]).status_code == 422
    form = client.post("/v1/recognize", files=[("image", images[".png"]), ("image", b"no image")]).json()
    assert ["predictions" in result for result in form["results"]] == [True, False]
    pixels = np.random.default_rng(3).integers(0, 256, (2, 24, 20, 3), dtype=np.uint8)
    tensor = {"name": "image", "datatype": "UINT8", "shape": [2, 24, 20, 3], "data": pixels.reshape(-1).tolist()}
    outputs = client.post("/v2/models/colours/infer", json={"inputs": [tensor]}).json()["outputs"]
    np.testing.assert_allclose(outputs[0]["data"], predictor.logits(pixels).reshape(-1), rtol=1e-4, atol=1e-4)
    saliency = client.post("/v1/saliency?label=1", content=images[".png"]).json()
    assert np.shape(saliency["saliency"]) == (24, 20)


def test_workers_are_not_given_the_large_images_of_clients_that_have_left(
    client: httpx.Client, pooled: Any, images: dict[str, bytes]
) -> None:
    large = cv2.imencode(".png", np.zeros((7000, 7000), np.uint8))[1].tobytes()
    before = _metric(client, "manyeyes_images_total")
    request = b"POST /v1/recognize HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(large), large)
    connections = [pooled.connect() for _ in range(8)]
    for connection in connections:
        connection.sendall(request)
    for connection in connections:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
    assert client.post("/v1/recognize", content=images[".png"]).status_code == 200
    assert _metric(client, "manyeyes_images_total") - before - 1 < 8


def test_killing_a_worker_under_load_fails_only_what_it_worked_on_and_nothing_hangs(
    client: httpx.Client, pooled: Any, images: dict[str, bytes]
) -> None:
    stop = threading.Event()
    statuses: Counter[int] = Counter()
    reasons: Counter[str] = Counter()
    lock = threading.Lock()

    def ask() -> None:
        with httpx.Client(base_url=pooled.url, timeout=20) as own:
            while not stop.is_set():
                answer = own.post("/v1/recognize", content=images[".png"])
                with lock:
                    statuses[answer.status_code] += 1
                    if answer.status_code != 200:
                        reasons[answer.json()["reason"]] += 1

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 3):
            time.sleep(0.3)
            victim = _children(pooled.process.pid)[0]
            os.kill(victim, signal.SIGKILL)
            deadline = time.monotonic() + 60
            while _metric(client, "manyeyes_worker_restarts_total") < number:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    # Eight clients have at most eight requests under way, and two workers were killed.
    assert sum(count for status, count in statuses.items() if status != 200) <= 16
    assert set(statuses) <= {200, 502}
    assert set(reasons) <= {"worker_lost"}
    assert statuses[200] > 100
    assert _metric(client, "manyeyes_workers") == 2
    assert len(_children(pooled.process.pid)) == 2


def test_a_stopped_worker_that_is_killed_gives_its_requests_a_502(
    client: httpx.Client, pooled: Any, images: dict[str, bytes]
) -> None:
    restarts = _metric(client, "manyeyes_worker_restarts_total")
    victims = _children(pooled.process.pid)
    for victim in victims:
        os.kill(victim, signal.SIGSTOP)
    answers: list[httpx.Response] = []
    threads = [
        threading.Thread(
            target=lambda: answers.append(httpx.post(f"{pooled.url}/v1/recognize", content=images[".png"], timeout=60))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    assert client.get("/healthz").status_code == 200  # the front answers although no worker does
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    for thread in threads:
        thread.join(timeout=60)
    assert {(answer.status_code, answer.json()["reason"]) for answer in answers} == {(502, "worker_lost")}
    # Meanwhile it is not ready; what comes waits for the new workers.
    assert client.post("/v1/recognize", content=images[".png"]).status_code == 200
    deadline = time.monotonic() + 60
    while _metric(client, "manyeyes_worker_restarts_total") < restarts + 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_new_version_is_loaded_by_all_workers(
    client: httpx.Client, folder: Path, variant: Callable[..., Path], images: dict[str, bytes]
) -> None:
    variant(folder / "colours" / "2", reverse=True)
    deadline = time.monotonic() + 60
    while client.post("/v1/recognize", content=images[".png"]).json()["model"]["version"] != "2":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert {client.post("/v1/recognize", content=images[".png"]).status_code for _ in range(20)} == {200}


def test_workers_end_with_their_server_however_it_ends(
    start_server: Callable[..., Any], folder: Path, pooled: Any
) -> None:
    killed = start_server("--workers", "2", models=folder)
    for server, end in ((pooled, signal.SIGTERM), (killed, signal.SIGKILL)):
        children = _children(server.process.pid)
        assert len(children) == 2
        server.process.send_signal(end)
        assert server.wait() == (0 if end == signal.SIGTERM else -signal.SIGKILL)
        deadline = time.monotonic() + 30
        while any(_is_alive(child) for child in children):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "Traceback" not in "".join(server.lines)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
