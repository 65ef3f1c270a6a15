"""Answers in JSON, and those that say why there is none."""

from __future__ import annotations

import json
from typing import Any

from manyeyes.serving.jobs import Failure
from manyeyes.serving.messages import Response
from manyeyes.serving.metrics import Metrics


def in_json(content: Any, status: int = 200, headers: tuple[tuple[str, str], ...] = ()) -> Response:
    """An answer with `content` as JSON."""
    return Response(status, json.dumps(content, ensure_ascii=False).encode(), headers=headers)


class Refusals:
    """Tells clients why there is no answer, and counts it."""

    def __init__(self, counters: Metrics) -> None:
        self._counters = counters

    def count(self, failure: Failure) -> Failure:
        """Count a failure by its reason."""
        self._counters.errors.add((failure.reason,))
        return failure

    def answer(self, failure: Failure) -> Response:
        """The answer that tells a failure, which is counted."""
        self.count(failure)
        return in_json(failure.to_dict(), failure.status, (("retry-after", "1"),) if failure.status == 503 else ())

    def refuse(self, status: int, reason: str, detail: str) -> Response:
        """The answer to what is no request, or breaks a limit."""
        error = "The server failed" if status >= 500 and status != 503 else "The request can't be answered"
        return self.answer(Failure(status, error, reason, detail))
