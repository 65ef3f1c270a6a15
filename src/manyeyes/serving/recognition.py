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
from manyeyes.serving.jobs import EXPLAINING, OVERLOADED, Failure, Job
from manyeyes.serving.limits import Admission, check_image
from manyeyes.serving.messages import Request, Response, copied, header_lines
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
        self._admission = Admission(settings)
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
        num_pixels = self._check_image(request.body)
        if isinstance(num_pixels, Failure):
            return self._refusals.answer(num_pixels)
        job = Job(request.body, parameters.top_k, functools.partial(self._answer, request, choice), num_pixels)
        if not self._admission.has_room_for(num_pixels) or not choice.model.submit(job):
            return self._refusals.answer(OVERLOADED)
        self._admission.take(job, request)
        request.on_gone = functools.partial(self._admission.client_left, [job])
        return None

    def _answer(self, request: Request, choice: Choice, job: Job) -> None:
        self._admission.let_go(job)
        if job.gone:
            return
        failure = job.failure
        if failure is not None:
            response = self._refusals.answer(failure)
            request.respond(response.status, response.body, extra=header_lines(response.headers) + request.extra)
            return
        card = choice.model.card
        encoded = request.body
        request.hold()
        request.respond(
            200,
            b'{%s,"model":%s}' % (job.to_json(), _model_json(card.name, card.version)),
        )
        if choice.shadow is not None:
            self._ask_shadow(choice.shadow, request, encoded, job)
        request.let_go()

    async def _recognize_form(self, request: Request, parameters: Parameters) -> Response:
        with copied(request):
            images = await asyncio.to_thread(read_form, request.header(b"content-type"), request.body, self._settings)
        if isinstance(images, Failure):
            return self._refusals.answer(images)
        choice = self._choose(request, parameters)
        if isinstance(choice, Failure):
            return self._refusals.answer(choice)
        jobs = await self.run_all(request, choice, list(images), parameters.top_k)
        if isinstance(jobs, Failure):
            return self._refusals.answer(jobs)
        results = [
            json.dumps(job.failure.to_dict(), ensure_ascii=False).encode() if job.failure else b"{%s}" % job.to_json()
            for job in jobs
        ]
        card = choice.model.card
        return Response(
            200, b'{"results":[%s],"model":%s}' % (b",".join(results), _model_json(card.name, card.version))
        )

    async def run_all(self, request: Request, choice: Choice, contents: list[Any], top_k: int) -> list[Job] | Failure:
        """Run several images of one request through a model, and its shadow; a bad one fails alone.

        Args:
            contents: encoded images, or model inputs.
            top_k: 0 asks for the logits.

        Returns:
            A finished job for each, in order; or why none was taken.
        """
        if request.gone:
            return OVERLOADED  # which nobody will see
        finished = asyncio.Event()
        left = len(contents)

        def done(job: Job) -> None:
            nonlocal left
            self._admission.let_go(job)
            left -= 1
            if left == 0:
                finished.set()

        def client_left(is_certain: bool) -> bool:
            given_up = self._admission.client_left(wanted, is_certain)
            if given_up:
                finished.set()
            return given_up

        jobs = [Job(content, top_k, done) for content in contents]
        wanted: list[Job] = []
        for job in jobs:
            num_pixels = self._check_image(job.content) if isinstance(job.content, bytes) else 0
            if isinstance(num_pixels, Failure):
                job.failure = num_pixels
                left -= 1
            else:
                job.num_pixels = num_pixels
                wanted.append(job)
        num_pixels = sum(job.num_pixels for job in wanted)
        failure = self._admission.check_request(num_pixels)
        if failure is None and not (
            choice.model.has_room_for(len(wanted)) and self._admission.has_room_for(num_pixels)
        ):
            failure = OVERLOADED
        if failure is not None:
            return self._refusals.count(failure)
        for job in wanted:
            if choice.model.submit(job):
                self._admission.take(job, request)
            else:
                job.failure = OVERLOADED
                left -= 1
        request.on_gone = client_left
        if left:
            await finished.wait()
        if request.gone:
            return OVERLOADED
        for content, job in zip(contents, jobs, strict=True):
            if job.failure is not None:
                self._refusals.count(job.failure)
            elif choice.shadow is not None:
                self._ask_shadow(choice.shadow, request, content, job)
        return jobs

    def _ask_shadow(self, shadow: Model, request: Request, content: Any, answered: Job) -> None:
        label = answered.label

        def compare(job: Job) -> None:
            self._admission.let_go(job)
            outcome = "failed" if job.failure else "true" if job.label == label else "false"
            self._metrics.shadow.add((shadow.card.name, shadow.card.version, outcome))

        job = Job(content, 1, compare, answered.num_pixels)
        # What answers goes first: a shadow that can't follow sees fewer images.
        if (
            shadow.num_waiting * 4 <= self._settings.max_queue
            and self._admission.has_room_for(2 * job.num_pixels)
            and shadow.submit(job)
        ):
            self._admission.take(job, request)
        else:
            self._metrics.shadow.add((shadow.card.name, shadow.card.version, "dropped"))

    async def saliency(self, request: Request) -> Response:
        """POST /v1/saliency."""
        asked = self._read_choice(request)
        if isinstance(asked, Failure):
            return self._refusals.answer(asked)
        parameters, choice = asked
        num_pixels = self._check_image(request.body)
        if isinstance(num_pixels, Failure):
            return self._refusals.answer(num_pixels)
        card = choice.model.card
        if parameters.label is not None and parameters.label >= len(card.class_names):
            detail = f"label={parameters.label}, there are {len(card.class_names)}"
            return self._refusals.refuse(400, "bad_request", detail)
        # It costs as much as hundreds of predictions, so that there is one at a time.
        if self._explaining.locked():
            return self._refusals.answer(EXPLAINING)
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

    def _check_image(self, encoded: bytes) -> int | Failure:
        """The number of pixels that the header tells."""
        info = check_image(encoded, self._settings)
        if isinstance(info, Failure):
            return info
        num_pixels = info.width * info.height
        self._metrics.pixels.observe((), num_pixels)
        self._metrics.bytes.observe((), len(encoded))
        return num_pixels


@functools.lru_cache(maxsize=256)
def _model_json(name: str, version: str) -> bytes:
    return json.dumps({"name": name, "version": version}, separators=(",", ":")).encode()
