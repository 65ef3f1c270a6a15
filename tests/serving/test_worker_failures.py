"""Worker processes that hang, whose bundle changes behind them, or that can't load a version; and the end of these."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from manyeyes.serving.jobs import Job
from manyeyes.serving.metrics import Metrics
from manyeyes.serving.settings import ServeSettings
from manyeyes.serving.workers import WorkerPool
from patience import wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, variant: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("models")
    variant(folder / "colours" / "1")
    return folder


@pytest.fixture(scope="module")
def pooled(start_server: Callable[..., Any], folder: Path) -> Any:
    arguments = ("--workers", "2", "--worker-timeout", "4", "--drain-timeout", "0.5", "--poll", "0.2")
    return start_server(*arguments, models=folder)


@pytest.fixture
def client(pooled: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=pooled.url, timeout=60) as client:
        yield client


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _metric(client: httpx.Client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(f"{name} ")]
    return float(lines[0].rpartition(" ")[2]) if lines else 0.0


def test_a_worker_that_hangs_is_replaced_and_every_request_is_answered(
    client: httpx.Client, pooled: Any, images: dict[str, bytes]
) -> None:
    victim = _children(pooled.process.pid)[0]
    os.kill(victim, signal.SIGSTOP)
    statuses: list[int] = []

    def ask() -> None:
        with httpx.Client(base_url=pooled.url, timeout=30) as own:
            statuses.extend(own.post("/v1/recognize", content=images[".png"]).status_code for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 40
    assert set(statuses) == {200, 502}
    wait_until(lambda: _metric(client, "manyeyes_worker_restarts_total") == 1)
    assert victim not in _children(pooled.process.pid)
    assert any("is killed" in line and "does not answer" in line for line in pooled.lines)
    assert {client.post("/v1/recognize", content=images[".png"]).status_code for _ in range(10)} == {200}


def test_workers_start_again_from_what_they_had_loaded_when_a_damaged_version_took_its_place(
    client: httpx.Client, pooled: Any, folder: Path, variant: Callable[..., Path], images: dict[str, bytes]
) -> None:
    before = client.post("/v1/recognize", content=images[".png"]).json()["predictions"]
    restarts = _metric(client, "manyeyes_worker_restarts_total")
    aside = variant(folder.parent / "damaged", reverse=True)
    (aside / "model.onnx").write_bytes((aside / "model.onnx").read_bytes()[:-100])
    (folder / "colours" / "1").rename(folder.parent / "good")
    aside.rename(folder / "colours" / "1")
    wait_until(lambda: any("was refused" in line and "version=1 " in line for line in pooled.lines))
    for child in _children(pooled.process.pid):
        os.kill(child, signal.SIGKILL)
    wait_until(lambda: _metric(client, "manyeyes_worker_restarts_total") == restarts + 2)
    after = client.post("/v1/recognize", content=images[".png"]).json()["predictions"]
    assert [each["class_name"] for each in after] == [each["class_name"] for each in before]


def test_a_version_that_fails_in_a_way_that_nobody_foresaw_is_refused_by_the_workers_and_the_next_is_loaded(
    client: httpx.Client, pooled: Any, folder: Path, unforeseen: Callable[[Path], Path], variant: Callable[..., Path]
) -> None:
    unforeseen(folder / "colours" / "2")
    wait_until(lambda: any("was refused" in line and "version=2 " in line for line in pooled.lines))
    (line,) = [line for line in pooled.lines if "was refused" in line and "version=2 " in line]
    assert "ValueError: zip()" in line
    variant(folder / "colours" / "3")
    wait_until(lambda: client.get("/v1/models").json()["models"][0]["default_version"] == "3")


def test_a_server_ends_in_time_although_its_workers_hang(pooled: Any, images: dict[str, bytes]) -> None:
    children = _children(pooled.process.pid)
    assert len(children) == 2
    for child in children:
        os.kill(child, signal.SIGSTOP)
    outcome: list[Any] = []

    def ask() -> None:
        try:
            outcome.append(httpx.post(f"{pooled.url}/v1/recognize", content=images[".png"], timeout=30).status_code)
        except httpx.RemoteProtocolError as error:
            outcome.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    started = time.monotonic()
    assert pooled.stop() == 0
    # --drain-timeout 0.5 and what deploy/ allows beyond it.
    assert time.monotonic() - started < 0.5 + 5
    thread.join()
    assert isinstance(outcome[0], httpx.RemoteProtocolError)  # cut off
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    assert "Traceback" not in "".join(pooled.lines)


def test_a_server_ends_in_time_although_a_version_is_never_read_to_its_end(
    start_server: Callable[..., Any], tmp_path: Path, variant: Callable[..., Path]
) -> None:
    variant(tmp_path / "colours" / "1")
    running = start_server("--poll", "0.1", "--drain-timeout", "0.2", models=tmp_path)
    aside = variant(tmp_path.parent / f"{tmp_path.name}-aside")
    (aside / "model.onnx").unlink()
    os.mkfifo(aside / "model.onnx")
    aside.rename(tmp_path / "colours" / "2")
    time.sleep(1)  # what opens a pipe waits until somebody writes into it
    started = time.monotonic()
    assert running.stop() == 0
    assert time.monotonic() - started < 0.2 + 5
    assert any("does not end in time" in line for line in running.lines)


def test_an_image_that_takes_a_worker_too_long_is_answered_by_502_and_the_worker_is_replaced(
    small_bundle: str, caplog: pytest.LogCaptureFixture
) -> None:
    # Much to decode, little to send.
    large = cv2.imencode(".png", np.zeros((7000, 7000, 3), np.uint8))[1].tobytes()
    settings = ServeSettings(num_workers=1, worker_timeout_seconds=2, job_timeout_seconds=0.1)

    async def run() -> tuple[Job, int]:
        delivered = asyncio.Event()
        pool = WorkerPool(settings, lambda model, jobs: delivered.set(), Metrics())
        await pool.start()
        model = await pool.load(small_bundle, None, None)
        (first,) = pool._workers
        job = Job(large, 1, lambda job: None)
        assert model.submit(job)
        await asyncio.wait_for(delivered.wait(), 60)
        while pool.num_ready == 0:
            await asyncio.sleep(0.05)
        (second,) = pool._workers
        await pool.close()
        return job, second.process.pid - first.process.pid

    job, difference = asyncio.run(run())
    assert job.failure is not None
    assert (job.failure.status, job.failure.reason) == (502, "worker_lost")
    assert difference
    assert "has worked on an image for more than 0.1 s" in str([vars(record).get("why") for record in caplog.records])
