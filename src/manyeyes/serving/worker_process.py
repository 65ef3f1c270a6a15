"""One worker process as the server sees it: how it is started, what it has to do, and whether it still lives."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from manyeyes import config
from manyeyes.engines.base import THREADS_VARIABLE, available_cores
from manyeyes.errors import BundleError
from manyeyes.serving import frames
from manyeyes.serving.frames import Kind
from manyeyes.serving.jobs import Job
from manyeyes.serving.models import ModelCard
from manyeyes.serving.settings import ServeSettings

if TYPE_CHECKING:
    from manyeyes.serving.workers import RemoteModel, WorkerPool

# A worker is asked so often before it is taken for hung.
PINGS = 5
# Until its first word: Python and its libraries are read from the disk.
_START_SECONDS = 60.0


class WorkerProcess(asyncio.Protocol):
    """One process and what it works on."""

    def __init__(self, pool: WorkerPool, process: subprocess.Popen[bytes], settings: ServeSettings) -> None:
        self.process = process
        self.started = time.monotonic()
        # By number, in the order in which they were given; the time is the event loop's.
        self.jobs: dict[int, tuple[RemoteModel, Job, float]] = {}
        self.waiting_for: dict[int, asyncio.Future[Any]] = {}
        self._pool = pool
        self._splitter = frames.Splitter()
        self._now = asyncio.get_running_loop().time
        self._job_timeout_seconds = settings.job_timeout_seconds
        # Pings are counted, not seconds: a machine that sleeps, or a paused container, makes nobody look hung.
        self._unanswered = 0
        self._patience = max(PINGS, round(_START_SECONDS * PINGS / settings.worker_timeout_seconds))
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        self._unanswered = 0
        self._patience = PINGS
        finished: dict[RemoteModel, list[Job]] = {}
        for kind, number, payload in self._splitter.feed(data):
            entry = self.jobs.pop(number, None) if kind in (Kind.ANSWER, Kind.FAILURE) else None
            if entry is not None:
                model, job, _ = entry
                if kind is Kind.ANSWER:
                    before = job.queue_seconds
                    frames.unpack_answer(payload, job)
                    job.queue_seconds += before
                else:
                    job.failure = frames.unpack_failure(payload)
                model.num_under_way -= 1
                finished.setdefault(model, []).append(job)
            elif (future := self.waiting_for.pop(number, None)) is not None and not future.done():
                if kind is Kind.LOADED:
                    future.set_result(config.from_dict(ModelCard, json.loads(payload)))
                elif kind is Kind.REFUSED:
                    future.set_exception(BundleError(payload.decode()))
                elif kind is Kind.FAILURE:
                    future.set_result(frames.unpack_failure(payload))
                else:
                    future.set_result(frames.unpack_explanation(payload))
        for model, jobs in finished.items():
            self._pool.deliver(model, jobs)
        self._pool.pump()

    def connection_lost(self, error: Exception | None) -> None:
        """See asyncio.Protocol."""
        self._pool.lost(self)

    def ask(self, frame: bytes, number: int) -> asyncio.Future[Any]:
        """Send something that has an answer."""
        future = asyncio.get_running_loop().create_future()
        self.waiting_for[number] = future
        self.transport.write(frame)
        return future

    def give(self, number: int, model: RemoteModel, job: Job) -> None:
        """Send a job."""
        self.jobs[number] = (model, job, self._now())
        self.transport.write(frames.pack_job(number, model.number, job))

    def why_hung(self) -> str | None:
        """Ask for a sign of life; what is wrong if it gave none when it was asked before, or works for too long."""
        if self._unanswered >= self._patience:
            return "it does not answer"
        oldest = next(iter(self.jobs.values()), None)
        if oldest is not None and self._now() - oldest[2] > self._job_timeout_seconds:
            return f"it has worked on an image for more than {self._job_timeout_seconds:g} s"
        self._unanswered += 1
        self.transport.write(frames.pack(Kind.PING, 0))
        return None

    def kill(self) -> None:
        """End it at once; the pool is told by `connection_lost`."""
        self.process.kill()
        self.transport.abort()


async def start_worker(pool: WorkerPool, settings: ServeSettings) -> WorkerProcess:
    """Start a process that speaks `frames`. Raises OSError."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "manyeyes.serving.worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=_environment(settings.num_workers),
        )
    loop = asyncio.get_running_loop()
    _, worker = await loop.create_unix_connection(lambda: WorkerProcess(pool, process, settings), sock=ours)
    return worker


def end_all(processes: Iterable[subprocess.Popen[bytes]], seconds: float) -> None:
    """Wait `seconds` for processes to end, then kill those that are left."""
    deadline = time.monotonic() + seconds
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _environment(num_workers: int) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name != "MANYEYES_TOKEN"}
    environment.setdefault(THREADS_VARIABLE, str(max(1, available_cores() // num_workers)))
    return environment
