"""A worker process: decodes, batches and predicts what the server sends over a socket (see frames).

Started as `python -m manyeyes.serving.worker DESCRIPTOR`; ends when the server closes the socket, however that ended.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, cast

import numpy as np

from manyeyes import config, storage
from manyeyes.serving import frames, logs
from manyeyes.serving.folder import say_why
from manyeyes.serving.frames import Kind
from manyeyes.serving.jobs import INTERNAL, OVERLOADED, WORKER_LOST, Failure, Job
from manyeyes.serving.models import LocalModel
from manyeyes.serving.settings import ServeSettings

_log = logging.getLogger("manyeyes.serving.worker")


class _NumberedJob(Job):
    __slots__ = ("number",)

    def __init__(self, number: int, content: bytes | np.ndarray, top_k: int) -> None:
        super().__init__(content, top_k, _nothing)
        self.number = number


class Worker:
    """Serves one server."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._settings = ServeSettings()
        self._models: dict[int, LocalModel] = {}
        self._sending = threading.Lock()

    def run(self) -> None:
        """Work until the socket is closed."""
        stream = cast(BinaryIO, self._connection.makefile("rb", buffering=1 << 20))
        while (frame := frames.read(stream)) is not None:
            kind, number, payload = frame
            if kind in (Kind.IMAGE, Kind.PIXELS):
                self._take(number, payload, kind is Kind.PIXELS)
            elif kind is Kind.LOAD:
                # Beside the loop: what is loaded already goes on answering.
                _in_thread(self._load, number, payload)
            elif kind is Kind.UNLOAD:
                model = self._models.pop(number, None)
                if model is not None:
                    _in_thread(model.close_now)
            elif kind is Kind.EXPLAIN:
                _in_thread(self._explain, number, payload)
            elif kind is Kind.PING:
                self._send(frames.pack(Kind.ALIVE, number))
            elif kind is Kind.CONFIGURE:
                content = json.loads(payload)
                self._settings = config.from_dict(ServeSettings, content["settings"])
                logs.set_up(content["log_format"])

    def _take(self, number: int, payload: bytes, is_pixels: bool) -> None:
        model_number, top_k = frames.JOB.unpack_from(payload)
        model = self._models.get(model_number)
        if model is None:
            self._send(frames.pack_failure(number, WORKER_LOST))
            return
        content: bytes | np.ndarray = payload[frames.JOB.size :]
        if is_pixels:
            content = np.frombuffer(payload, np.uint8, offset=frames.JOB.size).reshape(model.card.input_shape)
        if not model.submit(_NumberedJob(number, content, top_k)):
            self._send(frames.pack_failure(number, OVERLOADED))

    def _load(self, number: int, payload: bytes) -> None:
        source, files = frames.unpack_load(payload)
        # Opened as every bundle is, from the memory of this process.
        place = f"memory://worker/{number}"
        filesystem, path = storage.filesystem(place)
        filesystem.pipe({storage.join(path, name): content for name, content in files.items()})
        try:
            settings = dataclasses.replace(self._settings, backend=source["backend"])
            model = LocalModel.load(place, source["name"], source["version"], settings, self._deliver)
        except Exception as error:
            self._send(frames.pack(Kind.REFUSED, number, say_why(error).replace(place, source["uri"]).encode()))
            return
        finally:
            storage.remove(place, recursive=True)
        self._models[number] = model
        self._send(frames.pack(Kind.LOADED, number, json.dumps(dataclasses.asdict(model.card)).encode()))

    def _explain(self, number: int, payload: bytes) -> None:
        model_number, label = frames.JOB.unpack_from(payload)
        model = self._models.get(model_number)
        try:
            found = (
                model.explain_now(payload[frames.JOB.size :], label - 1 if label else None) if model else WORKER_LOST
            )
        except Exception:
            _log.exception("An explanation failed")
            found = INTERNAL
        self._send(
            frames.pack_failure(number, found) if isinstance(found, Failure) else frames.pack_explanation(number, found)
        )

    def _deliver(self, model: LocalModel, jobs: list[Job]) -> None:
        self._send(b"".join([frames.pack_result(job.number, job) for job in jobs if isinstance(job, _NumberedJob)]))

    def _send(self, content: bytes) -> None:
        with self._sending:
            try:
                self._connection.sendall(content)
            except OSError:  # the server has gone; the loop ends by itself
                return


def main() -> None:
    """Entry point."""
    # Ctrl-C and a service manager signal every process of the group; the server says when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        Worker(connection).run()


def _in_thread(work: Callable[..., object], *arguments: Any) -> None:
    threading.Thread(target=work, args=arguments, daemon=True).start()


def _nothing(job: Job) -> None:
    """A job of a worker is answered by its frame."""


if __name__ == "__main__":
    main()
