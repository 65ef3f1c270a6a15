"""Recognition over HTTP: one image or a form of several, and which pixels decided."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import Coroutine
from typing import Any

from manyeyes.recognition.saliency import overlay
from manyeyes.serving.answers import Refusals, in_json
from manyeyes.serving.catalog import Catalog, Choice
from manyeyes.serving.forms import read_form
from manyeyes.serving.jobs import OVERLOADED, Failure, Job
from manyeyes.serving.limits import check_image
from manyeyes.serving.messages import Request, Response, header_lines
from manyeyes.serving.metrics import Metrics
from manyeyes.serving.models import Model
from manyeyes.serving.parameters import Parameters, read_parameters
from manyeyes.serving.settings import ServeSettings


class Recognition:
    """Handles /v1/recognize and /v1/saliency."""

    def __init__(self, catalog: Catalog, counters: Metrics, settings: ServeSettings, refusals: Refusals) -> None:
        self._catalog = catalog
        self._metrics = counters
        self._settings = settings
        self._refusals = refusals
        self._explaining = asyncio.Lock()
        self._read_query = functools.lru_cache(maxsize=256)(
            functools.partial(read_parameters, default_top_k=settings.default_top_k)
        )

    def recognize(self, request: Request) -> Response | Coroutine[Any, Any, Response] | None:
        """POST /v1/recognize."""
        asked = self._read_choice(request)
        if isinstance(asked, Failure):
            return self._refusals.answer(asked)
        parameters, choice = asked
        if request.headers.get(b"content-type", b"")[:10].lower() == b"multipart/":
            return self._recognize_form(request, parameters)
        encoded = request.body
        failure = self._check_image(encoded)
        if failure is not None:
            return self._refusals.answer(failure)
        job = Job(encoded, parameters.top_k, functools.partial(self._answer, request, choice, encoded))
        request.on_gone = functools.partial(setattr, job, "gone", True)
        if not choice.model.submit(job):
            return self._refusals.answer(OVERLOADED)
        return None

    def _answer(self, request: Request, choice: Choice, encoded: bytes, job: Job) -> None:
        failure = job.failure
        if failure is not None:
            response = self._refusals.answer(failure)
            request.respond(response.status, response.body, extra=header_lines(response.headers) + request.extra)
            return
        card = choice.model.card
        request.respond(
            200,
            b'{"predictions":%s,"model":%s,"timings_ms":%s}'
            % (job.payload, _model_json(card.name, card.version), job.timings_json()),
        )
        if choice.shadow is not None:
            self._ask_shadow(choice.shadow, encoded, job.label)

    async def _recognize_form(self, request: Request, parameters: Parameters) -> Response:
        images = await asyncio.to_thread(read_form, request.header(b"content-type"), request.body, self._settings)
        if isinstance(images, Failure):
            return self._refusals.answer(images)
        choice = self._choose(request, parameters)
        if isinstance(choice, Failure):
            return self._refusals.answer(choice)
        jobs = await self.run_all(choice.model, list(images), parameters.top_k)
        if isinstance(jobs, Failure):
            return self._refusals.answer(jobs)
        results = [
            json.dumps(job.failure.to_dict(), ensure_ascii=False).encode()
            if job.failure
            else b'{"predictions":%s,"timings_ms":%s}' % (job.payload, job.timings_json())
            for job in jobs
        ]
        card = choice.model.card
        if choice.shadow is not None:
            for encoded, job in zip(images, jobs, strict=True):
                if job.failure is None:
                    self._ask_shadow(choice.shadow, encoded, job.label)
        return Response(
            200, b'{"results":[%s],"model":%s}' % (b",".join(results), _model_json(card.name, card.version))
        )

    async def run_all(self, model: Model, contents: list[Any], top_k: int) -> list[Job] | Failure:
        """Run several images of one request through a model; a bad one fails alone.

        Args:
            contents: encoded images, or model inputs.
            top_k: 0 asks for the logits.

        Returns:
            A finished job for each, in order; or why none was taken.
        """
        finished = asyncio.Event()
        left = len(contents)

        def done(job: Job) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                finished.set()

        jobs = [Job(content, top_k, done) for content in contents]
        wanted = []
        for job in jobs:
            failure = self._check_image(job.content) if isinstance(job.content, bytes) else None
            if failure is None:
                wanted.append(job)
            else:
                job.failure = failure
                left -= 1
        if not model.has_room_for(len(wanted)):
            return self._refusals.count(OVERLOADED)
        for job in wanted:
            if not model.submit(job):
                job.failure = OVERLOADED
                left -= 1
        if left:
            await finished.wait()
        for job in jobs:
            if job.failure is not None:
                self._refusals.count(job.failure)
        return jobs

    def _ask_shadow(self, shadow: Model, encoded: bytes, label: int) -> None:
        def compare(job: Job) -> None:
            outcome = "failed" if job.failure else "true" if job.label == label else "false"
            self._metrics.shadow.add((shadow.card.name, shadow.card.version, outcome))

        # What answers goes first: a shadow that can't follow sees fewer images.
        if shadow.num_waiting * 4 > self._settings.max_queue or not shadow.submit(Job(encoded, 1, compare)):
            self._metrics.shadow.add((shadow.card.name, shadow.card.version, "dropped"))

    async def saliency(self, request: Request) -> Response:
        """POST /v1/saliency."""
        asked = self._read_choice(request)
        if isinstance(asked, Failure):
            return self._refusals.answer(asked)
        parameters, choice = asked
        failure = self._check_image(request.body)
        if failure is not None:
            return self._refusals.answer(failure)
        card = choice.model.card
        if parameters.label is not None and parameters.label >= len(card.class_names):
            detail = f"label={parameters.label}, there are {len(card.class_names)}"
            return self._refusals.refuse(400, "bad_request", detail)
        # It costs as much as hundreds of predictions, so that there is one at a time.
        if self._explaining.locked():
            return self._refusals.answer(OVERLOADED)
        async with self._explaining:
            explanation = await choice.model.explain(request.body, parameters.label)
        if isinstance(explanation, Failure):
            return self._refusals.answer(explanation)
        if parameters.format == "png":
            return Response(200, overlay(explanation.pixels, explanation.saliency), b"image/png")
        return in_json(
            {
                "label": explanation.label,
                "class_name": card.class_names[explanation.label],
                "saliency": [[round(value, 4) for value in row] for row in explanation.saliency.tolist()],
                "model": {"name": card.name, "version": card.version},
            }
        )

    def _read_choice(self, request: Request) -> tuple[Parameters, Choice] | Failure:
        """What the query asks for, and the version that answers it."""
        parameters = self._read_query(request.query)
        if isinstance(parameters, Failure):
            return parameters
        choice = self._choose(request, parameters)
        return choice if isinstance(choice, Failure) else (parameters, choice)

    def _choose(self, request: Request, parameters: Parameters) -> Choice | Failure:
        return self._catalog.choose(parameters.model, parameters.version, request.id if request.has_own_id else None)

    def _check_image(self, encoded: bytes) -> Failure | None:
        info = check_image(encoded, self._settings)
        if isinstance(info, Failure):
            return info
        self._metrics.pixels.observe((), info.width * info.height)
        self._metrics.bytes.observe((), len(encoded))
        return None


@functools.lru_cache(maxsize=256)
def _model_json(name: str, version: str) -> bytes:
    return json.dumps({"name": name, "version": version}, separators=(",", ":")).encode()
