"""Streams are real ones: files of OpenCV's writer, an HTTP server of MJPEG, folders that other threads fill."""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from manyeyes.errors import SourceError, UsageError
from manyeyes.recognition.predictor import Predictor
from manyeyes.recognition.preview import Preview
from manyeyes.recognition.stream import StreamResult, StreamStatistics, watch
from manyeyes.recognition.stream_sources import Frame, FrameSource, open_stream

COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def predictor(small_bundle: str) -> Predictor:
    return Predictor.load(small_bundle)


def _pixels(label: int) -> np.ndarray:
    """BGR, as OpenCV writes it."""
    pixels = np.random.default_rng(0).integers(40, 80, (48, 64, 3), dtype=np.uint8)
    pixels[:, :, 2 - label] += 100
    return pixels


def _jpeg(label: int) -> bytes:
    return cv2.imencode(".jpg", _pixels(label))[1].tobytes()


def _video(path: Path, labels: list[int], codec: str, fps: float = 25) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), fps, (64, 48))
    assert writer.isOpened(), f"this OpenCV can't write {codec}"
    for label in labels:
        writer.write(_pixels(label))
    writer.release()
    return path


def _watch(predictor: Predictor, source: FrameSource, **settings: Any) -> tuple[list[StreamResult], StreamStatistics]:
    results: list[StreamResult] = []
    counts = watch(predictor, source, on_result=lambda result, _: results.append(result), **settings)
    return results, counts


def _names(results: list[StreamResult]) -> list[str]:
    return [result.top_k[0].class_name if result.top_k else result.reason for result in results]


class _Slow(Predictor):
    """A predictor that takes its time."""

    def __init__(self, predictor: Predictor, seconds: float) -> None:
        super().__init__(predictor.bundle, predictor.backend)
        self.seconds = seconds

    def probabilities(self, batch: np.ndarray) -> np.ndarray:
        time.sleep(self.seconds)
        return super().probabilities(batch)


@pytest.mark.parametrize("codec, suffix", [("MJPG", ".avi"), ("mp4v", ".mp4"), ("FFV1", ".avi")])
def test_every_frame_of_a_video_is_recognised_in_order_with_its_place_in_time(
    predictor: Predictor, tmp_path: Path, codec: str, suffix: str
) -> None:
    labels = [0] * 10 + [1] * 10 + [2] * 10
    video = _video(tmp_path / f"video{suffix}", labels, codec, fps=20)
    results, counts = _watch(_Slow(predictor, 0.005), open_stream(str(video)), top_k=2)
    assert _names(results) == [COLOURS[label] for label in labels]
    assert [result.frame for result in results] == list(range(30))
    np.testing.assert_allclose([result.time_seconds for result in results], np.arange(30) / 20, atol=0.026)
    assert all(len(result.top_k) == 2 and result.latency_ms >= 5 for result in results)
    assert (counts.num_recognised, counts.num_dropped, counts.num_failed) == (30, 0, 0)


def test_a_frame_of_mjpeg_is_answered_as_the_same_image_by_itself(predictor: Predictor, tmp_path: Path) -> None:
    video = _video(tmp_path / "video.avi", [1], "MJPG")
    content = video.read_bytes()
    start = content.index(b"\xff\xd8\xff")
    jpeg = content[start : content.index(b"\xff\xd9", start) + 2]
    (result,), _ = _watch(predictor, open_stream(str(video)))
    assert result.top_k == predictor.predict([jpeg])[0].top_k


def test_a_damaged_frame_is_told_with_its_reason_and_the_stream_goes_on(predictor: Predictor, tmp_path: Path) -> None:
    video = _video(tmp_path / "video.avi", [0] * 12, "MJPG")
    content = bytearray(video.read_bytes())
    starts = [at for at in range(len(content)) if content[at : at + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 12
    scan = content.index(b"\xff\xda", starts[5]) + 14
    content[scan : scan + 60] = b"\xff" * 60
    video.write_bytes(content)
    results, counts = _watch(predictor, open_stream(str(video)))
    assert [result.frame for result in results] == list(range(12))
    assert [index for index, result in enumerate(results) if result.reason] == [5]
    assert results[5].detail
    assert (counts.num_recognised, counts.num_failed) == (11, 1)


def test_a_video_that_is_cut_off_is_told(predictor: Predictor, tmp_path: Path) -> None:
    video = _video(tmp_path / "video.avi", [0] * 20, "MJPG")
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    results, counts = _watch(predictor, open_stream(str(video)))
    assert 5 < counts.num_recognised < 15
    assert (results[-1].reason, "of 20 frames" in results[-1].detail) == ("truncated", True)


def test_one_frame_in_so_many_seconds_is_taken_where_that_is_asked_for(predictor: Predictor, tmp_path: Path) -> None:
    video = _video(tmp_path / "video.avi", [0] * 40, "MJPG", fps=20)
    results, _ = _watch(predictor, open_stream(str(video), every_seconds=0.5))
    assert [result.frame for result in results] == [0, 10, 20, 30]


def test_smoothing_is_an_exponential_mean_over_frames(predictor: Predictor, tmp_path: Path) -> None:
    labels = [0] * 6 + [1] + [0] * 6 + [2] * 12
    video = _video(tmp_path / "video.avi", labels, "FFV1")
    plain, _ = _watch(predictor, open_stream(str(video)), top_k=3)
    smoothed, _ = _watch(predictor, open_stream(str(video)), top_k=3, smooth=5)
    assert _names(plain)[6] == "green"
    # One odd frame does not show, a change does.
    assert _names(smoothed)[:13] == ["red"] * 13
    assert _names(smoothed)[-1] == "blue"

    def vectors(results: list[StreamResult]) -> np.ndarray:
        return np.array([[each.probability for each in sorted(r.top_k, key=lambda c: c.label)] for r in results])

    mean = vectors(plain)[0]
    for one, found in zip(vectors(plain)[1:], vectors(smoothed)[1:], strict=True):
        mean = mean + (one - mean) / 3
        np.testing.assert_allclose(found, mean, atol=1e-12)


def test_a_video_played_at_its_own_speed_drops_frames_when_the_model_is_slow_and_stays_close(
    predictor: Predictor, tmp_path: Path
) -> None:
    video = _video(tmp_path / "video.avi", [0] * 60, "MJPG", fps=50)
    started = time.perf_counter()
    results, counts = _watch(_Slow(predictor, 0.06), open_stream(str(video)), realtime=True)
    assert 1.1 < time.perf_counter() - started < 3
    assert counts.num_dropped > 20
    assert counts.num_recognised + counts.num_dropped == 60
    assert results[-1].frame == 59
    # A frame waits for at most one answer, then for its own; a queue would have come to 60 x 60 ms.
    assert np.median([result.latency_ms for result in results]) < 250


@contextlib.contextmanager
def _mjpeg_server(parts: Callable[[], Iterator[tuple[float, bytes]]]) -> Iterator[str]:
    """A camera on the network: HTTP with a JPEG after the other, each after so many seconds; ends with its parts."""
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            with contextlib.suppress(OSError):
                for seconds, jpeg in parts():
                    if over.wait(seconds):
                        return
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                    self.wfile.write(head.encode() + jpeg + b"\r\n")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/camera.mjpg"
    finally:
        over.set()
        server.shutdown()
        server.server_close()


def test_a_network_camera_that_is_faster_than_the_model_is_dropped_from_and_latency_stays_bounded(
    predictor: Predictor,
) -> None:
    def parts() -> Iterator[tuple[float, bytes]]:
        for index in itertools.count():
            yield 0.01, _jpeg(index // 40 % 3)

    with _mjpeg_server(parts) as url:
        results, counts = _watch(_Slow(predictor, 0.05), open_stream(url), max_frames=30)
    assert counts.num_recognised == 30
    # 100 frames a second come, 20 can be answered.
    assert counts.num_dropped > 30
    latencies = [result.latency_ms for result in results]
    assert np.median(latencies) < 200
    assert np.median(latencies[-10:]) < 2 * np.median(latencies[:10]) + 50
    assert all(later.frame > earlier.frame for earlier, later in itertools.pairwise(results))


def test_a_network_camera_that_breaks_off_is_opened_again_and_its_damaged_frames_are_told(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyeyes.recognition.stream_sources._RETRY_SECONDS", 0.1)

    def parts() -> Iterator[tuple[float, bytes]]:
        # FFmpeg looks at the first packets before it gives any.
        for index in range(40):
            jpeg = _jpeg(1)
            yield 0.02, jpeg[: len(jpeg) // 2] if index == 30 else jpeg

    with _mjpeg_server(parts) as url:
        results, counts = _watch(predictor, open_stream(url), max_frames=100)
    assert counts.num_recognised == 100
    assert set(_names(results)) == {"green", "unreadable", "truncated"}
    assert counts.failed["unreadable"] >= 1


def test_a_network_camera_that_stays_away_ends_the_stream_with_an_error(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyeyes.recognition.stream_sources._RETRY_SECONDS", 0.01)
    with _mjpeg_server(lambda: iter([(0.01, _jpeg(0))] * 30)) as url:
        source = open_stream(url)
    with pytest.raises(SourceError, match="no frame in 10 attempts"):
        _watch(predictor, source)


def test_a_stop_ends_a_live_stream_at_once_also_where_the_camera_hangs(predictor: Predictor) -> None:
    def parts() -> Iterator[tuple[float, bytes]]:
        yield from [(0.01, _jpeg(0))] * 40
        yield 60, b""

    stop = threading.Event()
    with _mjpeg_server(parts) as url:
        source = open_stream(url)
        threading.Timer(1.5, stop.set).start()
        started = time.perf_counter()
        _, counts = _watch(predictor, source, stop=stop)
        assert time.perf_counter() - started < 4
    assert counts.num_recognised > 0


def _fill(folder: Path, delay: float = 0.05) -> None:
    for index in range(6):
        # As careful programs do: written aside, then renamed.
        aside = folder / f".{index}.part"
        aside.write_bytes(_jpeg(index % 3))
        aside.rename(folder / f"{index}.jpg")
        time.sleep(delay)
    # As careless ones do: in pieces, with a pause.
    with (folder / "slow.jpg").open("wb") as file:
        content = _jpeg(1)
        for start in range(0, len(content), 200):
            file.write(content[start : start + 200])
            file.flush()
            time.sleep(0.15)
    (folder / "notes.txt").write_text("no image")
    (folder / "broken.jpg").write_bytes(_jpeg(0)[:300])


def test_a_folder_that_fills_gives_each_whole_file_once_and_tells_the_broken_ones(
    predictor: Predictor, tmp_path: Path
) -> None:
    (tmp_path / "a-before.jpg").write_bytes(_jpeg(2))
    filler = threading.Thread(target=_fill, args=(tmp_path,))
    filler.start()
    stop = threading.Event()
    results: list[StreamResult] = []

    def on_result(result: StreamResult, _: Frame) -> None:
        results.append(result)
        if len(results) == 9:
            threading.Timer(0.6, stop.set).start()

    threading.Timer(30, stop.set).start()
    counts = watch(predictor, open_stream(str(tmp_path)), on_result=on_result, stop=stop)
    filler.join()
    answers = {result.name: name for result, name in zip(results, _names(results), strict=True)}
    assert answers == {
        "a-before.jpg": "blue",
        **{f"{index}.jpg": COLOURS[index % 3] for index in range(6)},
        "slow.jpg": "green",
        "broken.jpg": "truncated",
    }
    assert len(results) == 9
    assert [result.frame for result in results] == list(range(9))
    assert (counts.num_recognised, counts.num_failed) == (8, 1)


def test_a_file_that_is_written_anew_is_recognised_anew(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "latest.jpg").write_bytes(_jpeg(0))
    stop = threading.Event()
    results: list[StreamResult] = []

    def on_result(result: StreamResult, _: Frame) -> None:
        results.append(result)
        if len(results) == 1:
            (tmp_path / ".new").write_bytes(_jpeg(2))
            (tmp_path / ".new").rename(tmp_path / "latest.jpg")
        else:
            stop.set()

    watch(predictor, open_stream(str(tmp_path)), on_result=on_result, stop=stop)
    assert _names(results) == ["red", "blue"]


def test_a_state_file_keeps_a_restart_from_answering_twice_even_if_its_last_line_is_cut(
    predictor: Predictor, tmp_path: Path
) -> None:
    folder, state = tmp_path / "in", str(tmp_path / "state.jsonl")
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.jpg").write_bytes(_jpeg(index % 3))
    first, _ = _watch(predictor, open_stream(str(folder), state=state), max_frames=3)
    second, _ = _watch(predictor, open_stream(str(folder), state=state), max_frames=2)
    assert [result.name for result in first + second] == [f"{index}.jpg" for index in range(5)]
    with open(state, "a") as file:
        file.write('["5.jpg", 12')
    (folder / "6.jpg").write_bytes(_jpeg(0))
    third, _ = _watch(predictor, open_stream(str(folder), state=state), max_frames=1)
    assert [result.name for result in third] == ["6.jpg"]
    assert [json.loads(line)[0] for line in Path(state).read_text().splitlines()] == [
        *(f"{index}.jpg" for index in range(5)),
        "6.jpg",
    ]


def test_what_cannot_be_watched_gets_one_clear_line(tmp_path: Path, predictor: Predictor) -> None:
    video = _video(tmp_path / "video.avi", [0], "MJPG")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "state").write_text("nonsense\n")
    for error, source, options, words in (
        (SourceError, tmp_path / "nowhere.avi", {}, "nothing at"),
        (SourceError, tmp_path / "text.mp4", {}, "can't be opened"),
        (SourceError, "99", {}, "camera 99"),
        (SourceError, "memory://videos/video.avi", {}, "local file"),
        (UsageError, tmp_path, {"every_seconds": 1}, "--every"),
        (UsageError, video, {"state": "x"}, "--state"),
        (UsageError, tmp_path, {"state": str(tmp_path / "state")}, "not a state file"),
    ):
        with pytest.raises(error) as caught:
            open_stream(str(source), **options)  # type: ignore[arg-type]
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="smooth=0"):
        _watch(predictor, open_stream(str(video)), smooth=0)


def test_the_preview_shows_the_newest_frame_and_answer_and_only_to_who_names_its_address(
    predictor: Predictor, tmp_path: Path
) -> None:
    statistics = StreamStatistics()
    video = _video(tmp_path / "video.mp4", [2] * 3, "mp4v")
    with Preview(0, statistics) as page:

        def get(path: str, **headers: str) -> bytes:
            return urllib.request.urlopen(urllib.request.Request(page.url + path, headers=headers), timeout=10).read()

        assert json.loads(get("state"))["result"] is None
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get("frame.jpg")
        watch(predictor, open_stream(str(video)), on_result=page.show, statistics=statistics)
        state = json.loads(get("state"))
        assert (state["count"], state["result"]["frame"]) == (3, 2)
        assert state["result"]["top_k"][0]["class_name"] == "blue"
        assert "3 recognised" in state["statistics"]
        shown = cv2.imdecode(np.frombuffer(get("frame.jpg?3"), np.uint8), cv2.IMREAD_COLOR)
        assert shown.shape == (48, 64, 3)
        assert shown[..., 0].mean() > shown[..., 2].mean() + 50  # BGR
        assert b"http" not in get("").replace(b"http-equiv", b"")
        with pytest.raises(urllib.error.HTTPError, match="403"):
            get("frame.jpg", Host="camera.example.com")
        taken = int(page.url.rstrip("/").rpartition(":")[2])
        with pytest.raises(UsageError, match="another port"):
            Preview(taken, statistics)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", taken), timeout=1)
