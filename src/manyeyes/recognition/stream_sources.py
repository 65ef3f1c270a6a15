"""Where the images of `watch` come from: cameras, video files, network streams, and folders that fill."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from manyeyes import storage
from manyeyes.data.sources.base import has_image_name, read_image_file
from manyeyes.errors import ImageError, Reason, SourceError, UsageError

# FFmpeg writes what it thinks of each packet to standard error, past Python; what matters is told by us.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

_URL_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "rtp", "srt")
_OPEN_TIMEOUT_MS = 10_000
_READ_TIMEOUT_MS = 10_000
_RETRY_SECONDS = 1.0
_MAX_RETRIES = 10
# Decoders give no word of a damaged frame but for the end; so many failures on end are the end.
_MAX_FAILURES_ON_END = 25
_POLL_SECONDS = 0.2
# A file that can't be read yet may still be growing; when it has kept its size for so long it is told.
_SETTLED_SECONDS = 2.0

_Key = tuple[str, int, int]
"""The name of a file, its size in bytes, and when it was changed, in nanoseconds (0 on remote file systems)."""


@dataclass(frozen=True)
class Frame:
    """One image of a stream.

    Attributes:
        index: in the source, from 0; frames that were dropped or left out are counted.
        name: of the file, in a folder; else "".
        time_seconds: place in a video file; else since the start.
        image: encoded bytes, uint8 pixels (height, width, 3) in RGB, or why there is none.
        taken: time.perf_counter() at which it was there.
    """

    index: int
    name: str
    time_seconds: float
    image: bytes | np.ndarray | ImageError
    taken: float


class FrameSource(Protocol):
    """Images one after the other.

    Attributes:
        name: for people.
        is_live: whether frames are lost that nobody takes.
    """

    name: str
    is_live: bool

    def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
        """Yield frames until the source ends or `stop` is set.

        Raises:
            SourceError: there is nothing, or a live source stays away.
        """
        ...

    def done(self, frame: Frame) -> None:
        """Take note that a frame was answered, or will never be."""
        ...

    def put_back(self, frame: Frame) -> bool:
        """Whether an image that can't be decoded may become whole; if so it comes again."""
        ...


def open_stream(source: str, *, every_seconds: float = 0.0, state: str | None = None) -> FrameSource:
    """Find out what `source` is: a camera, a URL, a folder or a video file.

    Args:
        source: the number of a camera, /dev/videoN, rtsp://…, http://…, the path or URI of a folder, or of a video.
        every_seconds: of a camera or video, take one frame in this time; 0 is all.
        state: a file that remembers which files of a folder were done.

    Raises:
        SourceError: nothing is there.
        UsageError: an option does not go with the source.
    """
    scheme = source.partition("://")[0] if "://" in source else ""
    is_device = source.isdigit() or source.startswith("/dev/video")
    is_url = scheme in _URL_SCHEMES
    if not is_device and not is_url and storage.is_directory(source):
        if every_seconds:
            raise UsageError("--every is for cameras and videos; every file of a folder is taken.")
        return FolderSource(source, state)
    if state is not None:
        raise UsageError(f"--state is for folders; {_without_password(source)} is none.")
    if not is_device and not is_url:
        if not storage.is_local(source):
            raise SourceError(f"{source} can't be watched: a video has to be a local file. Copy it here first.")
        if not storage.exists(source):
            raise SourceError(
                f"There is nothing at {source}. Give a camera (0), a video, an rtsp:// or http:// URL, or a folder."
            )
    if source.startswith("/dev/video"):
        source = source.removeprefix("/dev/video")
    return VideoSource(source, is_live=is_device or is_url, every_seconds=every_seconds)


class VideoSource:
    """A camera, a network stream or a video file, by OpenCV.

    Frames of MJPEG are taken as they are encoded and decoded as images are everywhere here: then a damaged one is seen,
    which a video decoder would pass on with a part of it grey.

    A stream that says how long it is (a recording, played by an RTSP server) ends; other live ones are opened again.
    """

    def __init__(self, source: str, *, is_live: bool, every_seconds: float = 0.0) -> None:
        self.name = f"camera {source}" if source.isdigit() else _without_password(source)
        self.is_live = is_live
        self._source = source
        self._every_seconds = every_seconds
        self._capture = self._open()
        self.num_frames = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self._ends = not is_live or (not source.isdigit() and self.num_frames > 0)
        # A file on a web server waits for who reads it; a stream goes on, and frames that nobody reads get lost in it.
        if self._ends and source.startswith(("http://", "https://")):
            self.is_live = False
        self._fps = self._capture.get(cv2.CAP_PROP_FPS)

    def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
        """See FrameSource.frames."""
        started = time.perf_counter()
        index = failures = retries = 0
        due = 0.0
        while not stop.is_set():
            if not self._capture.grab():
                if self._ends:
                    # A damaged frame, or the end; the count of frames in the header is often a guess.
                    failures += 1
                    if self.is_live or index + failures >= self.num_frames or failures > _MAX_FAILURES_ON_END:
                        break
                    continue
                retries += 1
                if retries > _MAX_RETRIES:
                    raise SourceError(f"{self.name} has given no frame in {retries - 1} attempts.")
                yield self._problem(index, started, Reason.UNREADABLE, "the stream broke off; it is opened again")
                # Most cameras are for one at a time.
                self._capture.release()
                if stop.wait(_RETRY_SECONDS):
                    break
                try:
                    self._capture = self._open()
                except SourceError:
                    continue
                continue
            for _ in range(failures):
                yield self._problem(index, started, Reason.CORRUPT, "the frame can't be decoded")
                index += 1
            failures = retries = 0
            now = time.perf_counter()
            at = self._position(index) if self._ends else now - started
            if at >= due:
                due = at + self._every_seconds
                done, image = self._capture.retrieve()
                yield Frame(
                    index,
                    "",
                    at,
                    self._as_image(image) if done else ImageError(Reason.CORRUPT, "the frame can't be decoded"),
                    now,
                )
            index += 1
        self._capture.release()
        if self._ends and not stop.is_set():
            if index == 0:
                raise SourceError(f"{self.name} holds no frame that can be decoded.")
            # Of a stream the count is the duration times the rate, and one may come in late.
            if index < self.num_frames - (self._fps if self.is_live else 0):
                detail = f"the video ends after {index} of {self.num_frames} frames: it is cut off or damaged"
                yield self._problem(index, started, Reason.TRUNCATED, detail)

    def done(self, frame: Frame) -> None:
        """See FrameSource.done: nothing is remembered."""

    def put_back(self, frame: Frame) -> bool:
        """See FrameSource.put_back: a frame comes once."""
        return False

    def _position(self, index: int) -> float:
        milliseconds = self._capture.get(cv2.CAP_PROP_POS_MSEC)
        return milliseconds / 1e3 if milliseconds > 0 else index / self._fps if self._fps > 0 else 0.0

    def _problem(self, index: int, started: float, reason: Reason, detail: str) -> Frame:
        now = time.perf_counter()
        return Frame(index, "", now - started, ImageError(reason, detail), now)

    def _as_image(self, image: np.ndarray) -> bytes | np.ndarray:
        if image.shape[0] == 1 and image.ndim == 2:
            return image.tobytes()
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB)

    def _open(self) -> cv2.VideoCapture:
        level = cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
        try:
            if self._source.isdigit():
                capture = cv2.VideoCapture(int(self._source))
                # The newest frame, not one of some that the driver has kept.
                capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
            else:
                options = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _OPEN_TIMEOUT_MS]
                options += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, _READ_TIMEOUT_MS]
                capture = cv2.VideoCapture(self._source, cv2.CAP_FFMPEG, options)
                if capture.isOpened() and _is_mjpeg(capture):
                    capture.set(cv2.CAP_PROP_FORMAT, -1)
        finally:
            cv2.utils.logging.setLogLevel(level)
        if not capture.isOpened():
            check = "the address, user and password" if "://" in self._source else "that it is there and free"
            raise SourceError(f"{self.name} can't be opened as a camera or video. Check {check}.")
        return capture


def _without_password(source: str) -> str:
    """An address without user and password, which are nobody's business who reads a log."""
    return re.sub("(?<=://)[^/]*@", "", source)


def _is_mjpeg(capture: cv2.VideoCapture) -> bool:
    return int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little").lower() in (b"mjpg", b"jpeg")


class FolderSource:
    """A folder on any file system, looked at again and again: each file once, in the order of the names.

    A file counts as new again when its size or time changes. It is taken when it is whole: at once where it can be
    decoded, so that a file that is renamed into the folder waits for nobody; else when it has kept its size for 2 s.
    """

    is_live = False

    def __init__(self, uri: str, state: str | None = None) -> None:
        self.name = uri
        self._uri = storage.absolute(uri)
        self._state = Path(state) if state is not None else None
        self._done: set[_Key] = set()
        self._taken: dict[int, _Key] = {}
        self._first_seen: dict[_Key, float] = {}
        if self._state is not None and self._state.exists():
            try:
                content = self._state.read_bytes()
                # The last line of a process that was killed may be cut; the next must not be joined to it.
                whole = content[: content.rfind(b"\n") + 1]
                self._done = {(name, size, changed) for name, size, changed in map(json.loads, whole.splitlines())}
                if whole != content:
                    os.truncate(self._state, len(whole))
            except (OSError, ValueError, TypeError) as error:
                raise UsageError(f"{state} is not a state file of watch: {error}. Give another --state.") from None

    def frames(self, stop: threading.Event) -> Generator[Frame, None, None]:
        """See FrameSource.frames."""
        started = time.perf_counter()
        index = 0
        while not stop.is_set():
            looked = time.perf_counter()
            found = [key for key in self._listing() if key not in self._done]
            self._first_seen = {key: self._first_seen.get(key, looked) for key in found}
            for key in found:
                if stop.is_set():
                    return
                now = time.perf_counter()
                self._taken[index] = key
                yield Frame(index, key[0], now - started, self._read(key), now)
                if key in self._done:
                    index += 1
            # A folder of a hundred thousand files takes its time to list.
            stop.wait(max(_POLL_SECONDS, 2 * (time.perf_counter() - looked) if not found else 0))

    def done(self, frame: Frame) -> None:
        """See FrameSource.done: the file is not taken again, nor after a restart where there is a state."""
        key = self._taken.pop(frame.index)
        self._done.add(key)
        if self._state is not None:
            with self._state.open("a", encoding="utf-8") as file:
                file.write(json.dumps(key) + "\n")

    def put_back(self, frame: Frame) -> bool:
        """See FrameSource.put_back: until the file has kept its size for a while."""
        key = self._taken[frame.index]
        return time.perf_counter() - self._first_seen[key] < _SETTLED_SECONDS

    def _listing(self) -> list[_Key]:
        try:
            items = list(storage.iterate_directory(self._uri))
        except FileNotFoundError:
            raise SourceError(f"{self.name} is gone.") from None
        keys = []
        for item in items:
            if item.is_directory or not has_image_name(item.name) or item.name.startswith("."):
                continue
            changed = 0
            if storage.is_local(self._uri):
                try:
                    status = (Path(self._uri) / item.name).stat()
                except OSError:
                    continue
                changed = status.st_mtime_ns
            keys.append((item.name, item.size_bytes, changed))
        return keys

    def _read(self, key: _Key) -> bytes | ImageError:
        try:
            content = read_image_file(storage.join(self._uri, key[0]))
        except ImageError as error:
            return error
        if len(content) != key[1]:
            return ImageError(Reason.TRUNCATED, "the file is growing")
        return content
