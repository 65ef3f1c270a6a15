"""A camera that speaks RTSP, as most on networks do: GStreamer's server, of H.264 live and of a recording in MJPEG."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest

from manyeyes.errors import SourceError, UsageError
from manyeyes.recognition.predictor import Predictor
from manyeyes.recognition.stream import StreamResult, watch
from manyeyes.recognition.stream_sources import open_stream

_ROOT = Path(__file__).parents[2]
# With what they need beyond what a browser needs too; OpenCV's FFmpeg can only read RTSP.
_PACKAGES = (
    "libgstrtspserver-1.0-0",
    "libgstreamer1.0-0",
    "libgstreamer-plugins-base1.0-0",
    "gstreamer1.0-plugins-base",
    "gstreamer1.0-plugins-good",
    "gstreamer1.0-plugins-ugly",
    "libx264-164",
    "liborc-0.4-0",
)
_CAPS = "video/x-raw,format=I420,width=64,height=48,framerate=20/1"
_COLOUR = "videotestsrc is-live=true pattern=solid-color foreground-color=0xff{} num-buffers={} ! " + _CAPS + " ! c."
_LIVE = (
    "( concat name=c adjust-base=false ! x264enc tune=zerolatency key-int-max=10 ! rtph264pay name=pay0 "
    f"{_COLOUR.format('a03c3c', 40)} {_COLOUR.format('3ca03c', 20)} {_COLOUR.format('3c3ca0', -1)} )"
)
_RECORDING = "( filesrc location={} ! avidemux ! rtpjpegpay name=pay0 )"
_Start = Callable[..., contextlib.AbstractContextManager["_Server"]]


class _Server:
    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process, self.port = process, port
        self.url = f"rtsp://127.0.0.1:{port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def predictor(small_bundle: str) -> Predictor:
    return Predictor.load(small_bundle)


@pytest.fixture(scope="module")
def start_rtsp(tmp_path_factory: pytest.TempPathFactory) -> _Start:
    """Start a server of /live: red for 2 s, green for 1 s, then blue; and of /recording: the same, of 1 s of blue."""
    folder = tmp_path_factory.mktemp("rtsp")
    command = [sys.executable, str(_ROOT / "scripts" / "debian_package.py"), *_PACKAGES, str(folder)]
    unpacked = subprocess.run(command, capture_output=True, text=True)
    if unpacked.returncode:
        pytest.skip(f"GStreamer's RTSP server: {unpacked.stderr.strip()}")
    (libraries,) = (folder / "usr" / "lib").glob("*-linux-gnu*")
    environment = {
        "LD_LIBRARY_PATH": str(libraries),
        "GST_PLUGIN_PATH": str(libraries / "gstreamer-1.0"),
        "GST_PLUGIN_SYSTEM_PATH": "",
        "GST_REGISTRY": str(folder / "registry"),
        "GST_REGISTRY_FORK": "no",
    }
    # OpenCV's own writer: RTP has no room for the Huffman tables that FFmpeg's makes.
    writer = cv2.VideoWriter(
        str(folder / "video.avi"), cv2.CAP_OPENCV_MJPEG, cv2.VideoWriter_fourcc(*"MJPG"), 20, (64, 48)
    )
    assert writer.isOpened()
    # What comes while a stream is opened, about a second, is dropped for newer frames.
    for label in 40 * [0] + 20 * [1] + 20 * [2]:
        pixels = np.random.default_rng(0).integers(40, 80, (48, 64, 3), dtype=np.uint8)
        pixels[:, :, 2 - label] += 100
        writer.write(pixels)
    writer.release()

    @contextlib.contextmanager
    def start(port: int = 0) -> Iterator[_Server]:
        arguments = [str(port), "/live", _LIVE, "/recording", _RECORDING.format(folder / "video.avi")]
        with (
            (folder / "server.log").open("w") as log,
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("rtsp_server.py")), *arguments],
                env=os.environ | environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            ) as process,
        ):
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                assert line.strip().isdigit(), (folder / "server.log").read_text()[-2000:]
                yield _Server(process, int(line))
            finally:
                process.kill()

    return start


def _runs(results: list[StreamResult]) -> list[str]:
    """What was seen, or why nothing was; once where it is the same several times on end."""
    return [name for name, _ in groupby(r.top_k[0].class_name if r.top_k else r.reason for r in results)]


def test_a_camera_that_speaks_rtsp_is_watched_opened_again_when_it_breaks_off_and_given_up_when_it_stays_away(
    predictor: Predictor, start_rtsp: _Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyeyes.recognition.stream_sources._RETRY_SECONDS", 0.2)
    results: list[StreamResult] = []
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(start_rtsp())
        kills = 0

        def on_result(result: StreamResult, _: object) -> None:
            nonlocal server, kills
            results.append(result)
            if _runs(results[-5:]) == ["blue"] and _runs(results).count("blue") > kills:
                server.kill()
                kills += 1
                if kills == 1:
                    server = stack.enter_context(start_rtsp(server.port))

        source = open_stream(f"{server.url}/live")
        assert source.is_live
        with pytest.raises(SourceError, match="no frame in 10 attempts"):
            watch(predictor, source, on_result=on_result)
    once = ["red", "green", "blue", "unreadable"]
    assert _runs(results) == once + once
    assert all(later.frame >= earlier.frame for earlier, later in pairwise(results))


def test_a_recording_that_an_rtsp_server_plays_ends_with_it_and_is_not_lagged_behind(
    predictor: Predictor, start_rtsp: _Start
) -> None:
    results: list[StreamResult] = []
    with start_rtsp() as server:
        source = open_stream(f"{server.url}/recording")
        counts = watch(predictor, source, on_result=lambda result, _: results.append(result))
    assert _runs(results) == ["red", "green", "blue"]
    assert (counts.num_recognised + counts.num_dropped, counts.num_failed) == (80, 0)
    assert results[-1].time_seconds == pytest.approx(79 / 20, abs=0.1)


def test_a_wrong_address_is_one_line_that_does_not_tell_the_password(
    start_rtsp: _Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyeyes.recognition.stream_sources._OPEN_TIMEOUT_MS", 500)
    with start_rtsp() as server, socket.create_server(("127.0.0.1", 0)) as silent:
        server_port, silent_port = server.port, silent.getsockname()[1]
        for port, path in ((server_port, "nothing"), (silent_port, "live"), (1, "live")):
            with pytest.raises(SourceError) as caught:
                open_stream(f"rtsp://admin:secret@127.0.0.1:{port}/{path}")
            assert str(caught.value) == (
                f"rtsp://127.0.0.1:{port}/{path} can't be opened as a camera or video. "
                "Check the address, user and password."
            )
    with pytest.raises(UsageError, match="rtsp://camera/live is none"):
        open_stream("rtsp://admin:secret@camera/live", state="state.jsonl")
