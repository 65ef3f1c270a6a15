"""One version of a model, ready to answer: a predictor, its threads, and its card."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from manyeyes.engines.base import threads_per_worker
from manyeyes.errors import ImageError, Reason
from manyeyes.imaging.decode import DecodeLimits
from manyeyes.recognition.bundle import Evaluation
from manyeyes.recognition.predictor import Predictor, softmax, top_labels
from manyeyes.serving.batcher import Batcher, choose_batch_size
from manyeyes.serving.jobs import INTERNAL, Failure, Job
from manyeyes.serving.settings import ServeSettings

_log = logging.getLogger(__name__)
# Brightness is for watching drift; about so many values of an image are enough.
_BRIGHTNESS_SAMPLES = 2000


@dataclass(frozen=True)
class ModelCard:
    """What is told of a version of a model.

    Attributes:
        name, version: by which requests choose it.
        fingerprint: of the bundle.
        preprocessing: from an image to the model's input (see imaging.Preprocessing.to_dict).
        input_shape: (height, width, channels) in pixels.
        backend, precision: what it runs by and in.
        temperature: logits are divided by it before softmax.
        threshold: a prediction whose class has a lower probability abstains; None: none does.
        max_batch_size: the cap that its latency curve gave.
        latency_curve: (batch size, seconds of one call), measured when it was loaded.
        parity, evaluation, provenance: as the bundle has them; evaluation is None where the run was not evaluated.
    """

    name: str
    version: str
    fingerprint: str
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any]
    input_shape: tuple[int, int, int]
    backend: str
    precision: str
    temperature: float = 1.0
    threshold: float | None = None
    max_batch_size: int = 1
    latency_curve: tuple[tuple[int, float], ...] = ()
    parity: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    provenance: dict[str, Any] = field(default_factory=dict)


class Model(Protocol):
    """A version that answers, in this process or in others."""

    @property
    def card(self) -> ModelCard:
        """What is told of it."""
        ...

    @property
    def num_waiting(self) -> int:
        """Images that wait for it."""
        ...

    def has_room_for(self, num_images: int) -> bool:
        """Whether so many would be taken now."""
        ...

    def submit(self, job: Job) -> bool:
        """Take a job, from the event loop; False if the queue is full."""
        ...

    async def explain(self, content: bytes, label: int | None) -> Explanation | Failure:
        """Find the pixels that decided for `label` (default: the likeliest)."""
        ...

    async def close(self) -> None:
        """Finish what was taken, and end."""
        ...


@dataclass(frozen=True)
class Explanation:
    """Which pixels decided.

    Attributes:
        label: the class that is explained.
        saliency: float32 (height, width) in [0, 1], on the model's input.
        pixels: the model's input, uint8 (height, width, channels).
    """

    label: int
    saliency: np.ndarray
    pixels: np.ndarray


class LocalModel:
    """A model in this process.

    Args:
        deliver: called on a thread with jobs that are finished.
    """

    def __init__(
        self,
        predictor: Predictor,
        name: str,
        version: str,
        settings: ServeSettings,
        deliver: Callable[[LocalModel, list[Job]], None],
    ) -> None:
        info = predictor.bundle.info
        self._predictor = predictor
        self._deliver = deliver
        self._temperature = info.temperature
        self._threshold = info.threshold
        self._limits = DecodeLimits(max_pixels=settings.max_pixels, max_bytes=settings.max_body_bytes)
        self._class_names_json = [json.dumps(name, ensure_ascii=False).encode() for name in info.class_names]
        self._explainer = ThreadPoolExecutor(1, thread_name_prefix="explain")
        curve = predictor.latency_curve()
        max_batch_size = choose_batch_size(curve)
        # A size that comes for the first time takes tens of milliseconds more.
        predictor.warm_up(range(1, max_batch_size + 1))
        self.card = ModelCard(
            name=name,
            version=version,
            fingerprint=info.fingerprint,
            class_names=info.class_names,
            preprocessing=info.preprocessing,
            input_shape=info.input_shape,
            backend=predictor.backend.name,
            precision=predictor.backend.precision,
            temperature=info.temperature,
            threshold=info.threshold,
            max_batch_size=max_batch_size,
            latency_curve=tuple(curve),
            parity=info.parity,
            evaluation=info.evaluation,
            provenance=info.provenance,
        )
        self._buffer = np.empty((max_batch_size, *info.input_shape), np.uint8)
        # A step that 3 does not divide takes all channels.
        step = max(1, self._buffer[0].size // _BRIGHTNESS_SAMPLES)
        self._brightness_step = step + 1 if step % 3 == 0 else step
        self._batcher: Batcher[Job, np.ndarray] = Batcher(
            self._prepare,
            self._predict,
            self._finish,
            max_batch_size=max_batch_size,
            max_waiting=settings.max_queue,
            num_threads=settings.num_threads or threads_per_worker(),
            # The first prediction of a thread is many times slower than the next; no request shall wait for it.
            start_thread=lambda: predictor.warm_up([1, max_batch_size]),
        )

    @classmethod
    def load(
        cls,
        uri: str,
        name: str | None,
        version: str | None,
        settings: ServeSettings,
        deliver: Callable[[LocalModel, list[Job]], None],
    ) -> LocalModel:
        """Open a bundle, prove it on its golden examples, measure and warm it.

        Args:
            name, version: default: the bundle's name and fingerprint.

        Raises:
            BundleError: see Predictor.load.
        """
        predictor = Predictor.load(uri, settings.backend, num_threads=settings.num_threads)
        info = predictor.bundle.info
        return cls(predictor, name or info.name, version or info.fingerprint, settings, deliver)

    @property
    def num_waiting(self) -> int:
        """See Model."""
        return self._batcher.num_waiting

    def has_room_for(self, num_images: int) -> bool:
        """See Model."""
        return self._batcher.num_waiting + num_images <= self._batcher.max_waiting

    def submit(self, job: Job) -> bool:
        """See Model."""
        return self._batcher.submit(job)

    async def close(self) -> None:
        """See Model."""
        await asyncio.to_thread(self.close_now)

    def close_now(self) -> None:
        """As `close`, in the calling thread."""
        self._batcher.close()
        self._explainer.shutdown(cancel_futures=True)

    async def explain(self, content: bytes, label: int | None) -> Explanation | Failure:
        """See Model."""
        return await asyncio.get_running_loop().run_in_executor(self._explainer, self.explain_now, content, label)

    def explain_now(self, content: bytes, label: int | None) -> Explanation | Failure:
        """As `explain`, in the calling thread."""
        from manyeyes.recognition.saliency import saliency

        try:
            pixels = self._predictor.preprocess(content, self._limits)
        except ImageError as error:
            return Failure.of_image(error)
        if label is None:
            label = int(self._predictor.logits(pixels[None])[0].argmax())
        return Explanation(label, saliency(self._predictor, pixels, label), pixels)

    def _prepare(self, job: Job) -> np.ndarray | None:
        started = time.perf_counter()
        job.queue_seconds = started - job.submitted
        job.started = True
        if job.gone:
            return None
        try:
            content = job.content
            # Pixels are a tensor of the model's own shape, checked where they came in.
            pixels = content if isinstance(content, np.ndarray) else self._predictor.preprocess(content, self._limits)
        except ImageError as error:
            job.failure = Failure.of_image(error)
            return None
        except MemoryError:
            job.failure = Failure.of_image(ImageError(Reason.TOO_MANY_PIXELS, "there is not enough memory for it"))
            return None
        except Exception:
            _log.exception("An image could not be prepared")
            job.failure = INTERNAL
            return None
        finally:
            job.content = b""  # the memory of the request, while it waits for its batch
        job.decode_seconds = time.perf_counter() - started
        return pixels

    def _predict(self, jobs: list[Job], inputs: list[np.ndarray]) -> None:
        started = time.perf_counter()
        batch = self._buffer[: len(inputs)]
        for index, pixels in enumerate(inputs):
            batch[index] = pixels
        logits = self._predictor.logits(batch)
        probabilities = softmax(logits, self._temperature)
        brightness = batch.reshape(len(jobs), -1)[:, :: self._brightness_step].mean(axis=1).tolist()
        top_k = max([1, *[job.top_k for job in jobs]])
        candidates, ordered = (array.tolist() for array in top_labels(probabilities, top_k))
        seconds = time.perf_counter() - started
        for index, job in enumerate(jobs):
            job.batch_size = len(jobs)
            job.predict_seconds = seconds
            job.label = candidates[index][0]
            job.brightness = brightness[index]
            if self._threshold is not None:
                job.abstain = ordered[index][0] < self._threshold
            if not ordered[index][0] >= 0:  # one logit that is no number makes all probabilities of its row so
                _log.error("%s answers with a number that is none", self.card.name)
                job.failure = INTERNAL
            elif job.top_k:
                job.payload = self._to_json(candidates[index][: job.top_k], ordered[index])
            else:
                job.payload = logits[index].tobytes()

    def _to_json(self, labels: list[int], probabilities: list[float]) -> bytes:
        names = self._class_names_json
        return b"[%s]" % b",".join(
            [
                b'{"label":%d,"class_name":%s,"probability":%r}' % (label, names[label], probability)
                for label, probability in zip(labels, probabilities, strict=False)
            ]
        )

    def _finish(self, jobs: list[Job], error: Exception | None) -> None:
        if error is not None:
            for job in jobs:
                job.failure = INTERNAL
        self._deliver(self, jobs)
