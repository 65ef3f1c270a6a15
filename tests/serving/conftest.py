from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import httpx
import numpy as np
import pytest

from browser import Page
from manyeyes.evaluation.intervals import wilson_interval
from manyeyes.recognition.bundle import GOLDEN_NAME, Bundle, Evaluation, write_bundle


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
    """The small bundle with figures of an evaluation, and a threshold that images of one colour reach and noise not."""
    bundle = Bundle.load(small_bundle)
    files = {file: bundle.read_file(file) for file in bundle.info.files}
    info = dataclasses.replace(bundle.info, evaluation=_figures_of(len(bundle.class_names)), threshold=0.95)
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
