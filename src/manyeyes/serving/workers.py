"""Worker processes as the server sees them: starts them, gives them jobs, replaces those that end."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from manyeyes import config
from manyeyes.engines.base import available_cores
from manyeyes.errors import BundleError, EngineError
from manyeyes.serving import frames
from manyeyes.serving.folder import read_bundle
from manyeyes.serving.frames import Kind
from manyeyes.serving.jobs import WORKER_LOST, Failure, Job
from manyeyes.serving.metrics import Metrics
from manyeyes.serving.models import Explanation, Model, ModelCard
from manyeyes.serving.settings import ServeSettings
from manyeyes.serving.worker_process import PINGS, WorkerProcess, end_all, start_worker

_log = logging.getLogger(__name__)
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 10.0
# A worker that lived so long was not ended by its start.
_GOOD_LIFE_SECONDS = 30.0
# With no worker at all for so long, what waits is given up.
_PATIENCE_SECONDS = 5.0
# To compile and measure a large model on few cores.
_LOAD_SECONDS = 600.0
_END_SECONDS = 1.0
_MAX_NUMBER = 2**32
# It takes long to decode so many, beside which a frame to a worker costs nothing.
_MANY_PIXELS = 4_000_000


class RemoteModel:
    """A version that every worker has loaded.

    Attributes:
        source, files: what workers load it from: its bytes are kept, because a worker that takes the place of another
            must load the same, whatever lies at the URI by then.
    """

    def __init__(
        self, pool: WorkerPool, number: int, source: dict[str, Any], files: Mapping[str, bytes], card: ModelCard
    ) -> None:
        self.card = card
        self.number = number
        self.source = source
        self.files = files
        self.num_under_way = 0
        self.num_waiting = 0
        self._pool = pool

    def has_room_for(self, num_images: int) -> bool:
        """See Model."""
        return self._pool.has_room_for(num_images)

    def submit(self, job: Job) -> bool:
        """See Model."""
        return self._pool.submit(self, job)

    async def explain(self, content: bytes, label: int | None) -> Explanation | Failure:
        """See Model."""
        return await self._pool.explain(self, content, label)

    async def close(self) -> None:
        """See Model."""
        while self.num_under_way or self.num_waiting:
            await asyncio.sleep(0.02)
        self._pool.unload(self)


class WorkerPool:
    """The worker processes of a server. Used from the event loop alone.

    Args:
        deliver: called with jobs that are finished.
    """

    def __init__(
        self,
        settings: ServeSettings,
        deliver: Callable[[Model, list[Job]], None],
        counters: Metrics,
    ) -> None:
        self.deliver = deliver
        self._settings = settings
        self._num_threads = settings.num_threads or max(1, available_cores() // settings.num_workers)
        self._metrics = counters
        # Those that have loaded every model, and all.
        self._workers: list[WorkerProcess] = []
        self._processes: set[WorkerProcess] = set()
        self._models: dict[int, RemoteModel] = {}
        self._waiting: deque[tuple[RemoteModel, Job]] = deque()
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closing = False
        self._pause_seconds = _FIRST_PAUSE_SECONDS
        counters.add_gauge("manyeyes_workers", "Worker processes that answer.", (), lambda: {(): self.num_ready})

    @property
    def num_ready(self) -> int:
        """Workers that take jobs."""
        return len(self._workers)

    async def start(self) -> None:
        """Start all workers."""
        self._run(self._look_after_workers())
        await asyncio.gather(*(self._start_worker() for _ in range(self._settings.num_workers)))

    async def load(self, uri: str, name: str | None, version: str | None) -> RemoteModel:
        """Load a bundle in every worker.

        Raises:
            BundleError: a worker refuses it.
            EngineError: there is no worker.
        """
        source = {"uri": uri, "name": name, "version": version, "backend": self._settings.backend}
        files = await asyncio.to_thread(read_bundle, uri)
        number = self._next_number()
        asked: set[WorkerProcess] = set()
        answers: list[Any] = []
        # The first one chooses the backend by measurement, the others follow. Workers may come while others load.
        while missing := [worker for worker in self._workers if worker not in asked]:
            if not asked:
                missing = missing[:1]
            asked.update(missing)
            loads = [self._load_in(worker, number, source, files) for worker in missing]
            answers += await asyncio.gather(*loads, return_exceptions=True)
            if isinstance(answers[0], ModelCard):
                source["backend"] = answers[0].backend
            elif isinstance(answers[0], BundleError):
                break
        cards = [answer for answer in answers if isinstance(answer, ModelCard)]
        refusals = [answer for answer in answers if isinstance(answer, BundleError)]
        if refusals or not cards:
            self._unload(number)
            raise refusals[0] if refusals else EngineError("No worker process is running that could load a model.")
        model = RemoteModel(self, number, source, files, cards[0])
        self._models[number] = model
        return model

    def unload(self, model: RemoteModel) -> None:
        """Let the workers forget a model."""
        self._models.pop(model.number, None)
        self._unload(model.number)

    def has_room_for(self, num_images: int) -> bool:
        """Whether so many images would be taken now."""
        return len(self._waiting) + num_images <= self._settings.max_queue

    def submit(self, model: RemoteModel, job: Job) -> bool:
        """Take a job; False if the queue is full."""
        if self._is_closing or not self.has_room_for(1):
            return False
        model.num_waiting += 1
        self._waiting.append((model, job))
        self.pump()
        return True

    def pump(self) -> None:
        """Give what waits to the workers that have least to do."""
        while self._waiting:
            worker = min(self._workers, key=lambda each: len(each.jobs), default=None)
            model, job = self._waiting[0]
            # A batch in work and one to go on with; what is given to a worker is lost with it. Of large images one for
            # each thread and one to go on with, because what has been given is done, also for who has left.
            most = model.card.max_batch_size
            if job.num_pixels > _MANY_PIXELS:
                most = min(most, self._num_threads)
            if worker is None or len(worker.jobs) >= 2 * most:
                return
            self._waiting.popleft()
            model.num_waiting -= 1
            job.started = True
            if job.gone:
                self.deliver(model, [job])
                continue
            job.queue_seconds = time.perf_counter() - job.submitted
            number = self._next_number()
            model.num_under_way += 1
            worker.give(number, model, job)

    async def explain(self, model: RemoteModel, content: bytes, label: int | None) -> Explanation | Failure:
        """See Model.explain."""
        if not self._workers:
            return WORKER_LOST
        worker = min(self._workers, key=lambda each: len(each.jobs))
        payload = frames.JOB.pack(model.number, 0 if label is None else label + 1) + content
        number = self._next_number()
        try:
            async with asyncio.timeout(self._settings.job_timeout_seconds):
                return await worker.ask(frames.pack(Kind.EXPLAIN, number, payload), number)
        except EngineError:
            return WORKER_LOST
        except TimeoutError:
            self._kill(worker, f"it has explained an image for more than {self._settings.job_timeout_seconds:g} s")
            return WORKER_LOST

    async def close(self) -> None:
        """End all workers."""
        self._is_closing = True
        for task in self._tasks:
            task.cancel()
        processes = [worker.process for worker in self._processes]
        for worker in list(self._processes):
            worker.transport.abort()
        await asyncio.to_thread(end_all, processes, _END_SECONDS)

    def lost(self, worker: WorkerProcess) -> None:
        """A worker has ended: what it worked on fails, another takes its place."""
        self._processes.discard(worker)
        lost_jobs, worker.jobs = worker.jobs, {}
        for future in worker.waiting_for.values():
            if not future.done():
                future.set_exception(EngineError("The worker process ended."))
        if self._is_closing or worker not in self._workers:  # one that is being started is known to who starts it
            return
        self._workers.remove(worker)
        by_model: dict[RemoteModel, list[Job]] = {}
        for model, job, _ in lost_jobs.values():
            job.failure = WORKER_LOST
            model.num_under_way -= 1
            by_model.setdefault(model, []).append(job)
        _log.error(
            "A worker process ended, another takes its place",
            extra={"pid": worker.process.pid, "jobs_lost": len(lost_jobs)},
        )
        for model, jobs in by_model.items():
            self.deliver(model, jobs)
        if time.monotonic() - worker.started > _GOOD_LIFE_SECONDS:
            self._pause_seconds = _FIRST_PAUSE_SECONDS
        self._run(self._replace(worker))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _look_after_workers(self) -> None:
        while True:
            await asyncio.sleep(self._settings.worker_timeout_seconds / PINGS)
            for worker in list(self._processes):
                if (why := worker.why_hung()) is not None:
                    self._kill(worker, why)

    def _kill(self, worker: WorkerProcess, why: str) -> None:
        _log.error("A worker process is killed", extra={"pid": worker.process.pid, "why": why})
        worker.kill()

    async def _replace(self, worker: WorkerProcess) -> None:
        if not self.num_ready:
            asyncio.get_running_loop().call_later(_PATIENCE_SECONDS, self._give_up_waiting)
        # Without its socket it has nothing to do any more, whatever state it is in.
        await asyncio.to_thread(end_all, [worker.process], 0.0)
        while not self._is_closing:
            await asyncio.sleep(self._pause_seconds)
            self._pause_seconds = min(2 * self._pause_seconds, _LONGEST_PAUSE_SECONDS)
            try:
                await self._start_worker()
            except (BundleError, EngineError, OSError) as error:
                _log.error("A worker process can't be started", extra={"why": str(error)})
            else:
                self._metrics.restarts.add()
                return

    def _give_up_waiting(self) -> None:
        if self.num_ready:
            return
        waiting, self._waiting = self._waiting, deque()
        for model, job in waiting:
            model.num_waiting -= 1
            job.failure = WORKER_LOST
            self.deliver(model, [job])
        if not self._is_closing:
            asyncio.get_running_loop().call_later(_PATIENCE_SECONDS, self._give_up_waiting)

    async def _start_worker(self) -> None:
        worker = await start_worker(self, self._settings)
        self._processes.add(worker)
        content = config.to_dict(dataclasses.replace(self._settings, token=None))
        worker.transport.write(
            frames.pack(
                Kind.CONFIGURE, 0, json.dumps({"settings": content, "log_format": self._settings.log_format}).encode()
            )
        )
        loaded: set[int] = set()
        try:
            # Models may come while others are loaded.
            while missing := [model for number, model in self._models.items() if number not in loaded]:
                for model in missing:
                    await self._load_in(worker, model.number, model.source, model.files)
                    loaded.add(model.number)
        except BaseException:
            worker.kill()
            raise
        self._workers.append(worker)
        for number in loaded - set(self._models):
            worker.transport.write(frames.pack(Kind.UNLOAD, number))
        self.pump()

    def _unload(self, number: int) -> None:
        for worker in self._workers:
            worker.transport.write(frames.pack(Kind.UNLOAD, number))

    async def _load_in(
        self, worker: WorkerProcess, number: int, source: dict[str, Any], files: Mapping[str, bytes]
    ) -> ModelCard:
        try:
            async with asyncio.timeout(_LOAD_SECONDS):
                return await worker.ask(frames.pack_load(number, source, files), number)
        except TimeoutError:
            self._kill(worker, f"it has loaded a version for more than {_LOAD_SECONDS:g} s")
            raise BundleError(f"{source['uri']} could not be loaded within {_LOAD_SECONDS:g} s.") from None

    def _next_number(self) -> int:
        return next(self._numbers) % _MAX_NUMBER
