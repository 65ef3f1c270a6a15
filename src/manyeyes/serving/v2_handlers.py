"""The routes of the Open Inference Protocol (see v2)."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import manyeyes
from manyeyes.serving import v2
from manyeyes.serving.answers import Refusals, in_json
from manyeyes.serving.catalog import Catalog, Choice
from manyeyes.serving.jobs import Failure, Job
from manyeyes.serving.messages import Request, Response, copied
from manyeyes.serving.models import Model
from manyeyes.serving.settings import ServeSettings


class V2Handlers:
    """Handles /v2 and below.

    Args:
        is_ready: whether requests may come.
        run_all: see Recognition.run_all.
    """

    def __init__(
        self,
        catalog: Catalog,
        settings: ServeSettings,
        refusals: Refusals,
        is_ready: Callable[[], bool],
        run_all: Callable[[Request, Choice, list[Any], int], Awaitable[list[Job] | Failure]],
    ) -> None:
        self._catalog = catalog
        self._settings = settings
        self._refusals = refusals
        self._is_ready = is_ready
        self._run_all = run_all

    def v2_server(self, request: Request) -> Response:
        """GET /v2."""
        return in_json({"name": "manyeyes", "version": manyeyes.__version__, "extensions": v2.EXTENSIONS})

    def v2_live(self, request: Request) -> Response:
        """GET /v2/health/live."""
        return in_json({"live": True})

    def v2_ready(self, request: Request) -> Response:
        """GET /v2/health/ready."""
        return in_json({"ready": self._is_ready()}, 200 if self._is_ready() else 503)

    def v2_model(self, request: Request) -> Response:
        """GET /v2/models/{model}."""
        return self._of_v2_model(
            request, lambda model: v2.metadata(model.card, list(self._catalog.models[model.card.name]))
        )

    def v2_model_ready(self, request: Request) -> Response:
        """GET /v2/models/{model}/ready."""
        return self._of_v2_model(request, lambda model: {"name": model.card.name, "ready": True})

    async def v2_infer(self, request: Request) -> Response:
        """POST /v2/models/{model}/infer."""
        choice = self._choose(request)
        if isinstance(choice, Failure):
            return v2.to_response(self._refusals.count(choice))
        card = choice.model.card
        header_length = request.header(b"inference-header-content-length")

        def read() -> v2.InferRequest:
            return v2.read_request(request.body, header_length, card, self._settings)

        try:
            with copied(request):
                asked = read() if v2.is_small(request.body, header_length) else await asyncio.to_thread(read)
        except v2.RequestError as error:
            return v2.to_response(self._refusals.count(error.failure))
        jobs = await self._run_all(request, choice, asked.images, 0)
        if isinstance(jobs, Failure):
            return v2.to_response(jobs)
        for job in jobs:
            # A tensor has no place for the error of one image.
            if job.failure is not None:
                return v2.to_response(job.failure)
        payloads = [job.payload for job in jobs]
        if v2.is_few(asked, card):
            return v2.answer(asked, card, payloads)
        return await asyncio.to_thread(v2.answer, asked, card, payloads)

    def _of_v2_model(self, request: Request, tell: Callable[[Model], dict[str, Any]]) -> Response:
        choice = self._choose(request)
        if isinstance(choice, Failure):
            return v2.to_response(self._refusals.count(choice))
        return in_json(tell(choice.model))

    def _choose(self, request: Request) -> Choice | Failure:
        names = request.path_parameters
        return self._catalog.choose(names["model"], names.get("version"), request.id if request.has_own_id else None)
