from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import cv2
import numpy as np
import pytest


def _pixels(label: int) -> np.ndarray:
    pixels = np.random.default_rng(0).integers(40, 80, (48, 64, 3), dtype=np.uint8)
    pixels[:, :, 2 - label] += 100
    return pixels


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("videos") / "video.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 20, (64, 48))
    for index in range(20):
        writer.write(_pixels(index // 10))
    writer.release()
    return path


def _start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "manyeyes.cli.main", "watch", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_video_becomes_json_lines_and_a_summary_with_rate_and_latency(small_bundle: str, video: Path) -> None:
    process = _start(small_bundle, video, "--top-k", 2, "--every", 0.1)
    said, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    lines = [json.loads(line) for line in said.splitlines()]
    assert [line["frame"] for line in lines] == list(range(0, 20, 2))
    assert [line["predictions"][0]["class_name"] for line in lines] == ["red"] * 5 + ["green"] * 5
    assert all(len(line["predictions"]) == 2 and line["latency_ms"] > 0 for line in lines)
    assert lines[5]["time"] == pytest.approx(0.5)
    assert re.search(r"frames/s, latency p50 [\d.]+ ms, p95 [\d.]+ ms; 10 recognised\.", told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_watch_of_a_folder_with_a_summary(
    small_bundle: str, tmp_path: Path, number: signal.Signals
) -> None:
    process = _start(small_bundle, tmp_path, "--preview", 0)
    assert process.stderr is not None
    assert process.stdout is not None
    told = process.stderr.readline() + process.stderr.readline()
    (url,) = re.findall(r"Preview: (\S+)", told)
    cv2.imwrite(str(tmp_path / "one.png"), _pixels(2))
    line = json.loads(process.stdout.readline())
    assert (line["file"], line["predictions"][0]["class_name"]) == ("one.png", "blue")
    assert b"Watching" in urllib.request.urlopen(url, timeout=10).read()
    process.send_signal(number)
    started = time.monotonic()
    said, told = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert (process.returncode, said) == (0, "")
    assert "1 recognised" in told
    assert "Traceback" not in told


def test_a_reader_that_goes_away_ends_the_watch_quietly(small_bundle: str, video: Path) -> None:
    process = _start(small_bundle, video, "--realtime")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr is not None
    assert "Traceback" not in process.stderr.read()
    assert process.wait(60) == 0


def test_mistakes_are_one_line_and_a_proper_exit_code(small_bundle: str, video: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.avi"
    # In every frame the scan is overwritten.
    damaged.write_bytes(re.sub(rb"(\xff\xda.{12}).{40}", lambda m: m[1] + 40 * b"\xff", video.read_bytes(), flags=re.S))
    for arguments, code, words in (
        ((small_bundle, tmp_path / "nowhere.mp4"), 3, "nothing at"),
        ((tmp_path / "nowhere", video), 5, "no bundle"),
        ((small_bundle, tmp_path, "--every", 1), 2, "--every"),
        ((small_bundle, damaged), 3, "None of the 20 images"),
    ):
        process = _start(*arguments)
        _, told = process.communicate(timeout=120)
        assert process.returncode == code, told
        assert words in told.splitlines()[-1]
        assert "Traceback" not in told
