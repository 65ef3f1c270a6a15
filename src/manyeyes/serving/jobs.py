"""One image on its way through a model: what is asked, and what becomes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from manyeyes.errors import ImageError, Reason

if TYPE_CHECKING:
    from manyeyes.serving.messages import Request

_STATUS_OF_REASON = {
    Reason.EMPTY: 400,
    Reason.TOO_MANY_BYTES: 413,
    Reason.TOO_MANY_PIXELS: 413,
    Reason.NOT_AN_IMAGE: 415,
    Reason.UNSUPPORTED_FORMAT: 415,
}
_UNDECODABLE = 422


@dataclass(frozen=True)
class Failure:
    """Why there is no answer: the status of the response, and {error, reason, detail} of its body."""

    status: int
    error: str
    reason: str
    detail: str = ""

    @classmethod
    def of_image(cls, error: ImageError) -> Failure:
        """The fault is the image's."""
        status = _STATUS_OF_REASON.get(error.reason, _UNDECODABLE)
        return cls(status, "The image can't be used", error.reason.value, error.detail)

    def to_dict(self) -> dict[str, str]:
        """The body of the response."""
        return {"error": self.error, "reason": self.reason, "detail": self.detail}


OVERLOADED = Failure(503, "The server is busy", "overloaded", "too many images wait; try again later")
EXPLAINING = Failure(
    503,
    "The server is busy",
    "overloaded",
    "the pixels of another image are being explained, one at a time; try again later",
)
WORKER_LOST = Failure(502, "The server failed", "worker_lost", "the process that worked on it ended; try again")
INTERNAL = Failure(500, "The server failed", "internal", "see the server's log")

_ABSTAIN_JSON = {None: b"", True: b'"abstain":true,', False: b'"abstain":false,'}


class Job:
    """One image for one model.

    Attributes:
        content: encoded bytes, or the pixels of a model input, uint8 (height, width, channels).
        top_k: classes that are wanted; 0: the logits.
        done: called with the job in the event loop, exactly once.
        num_pixels: of the image, as its header says; 0 for a model input.
        held: the request whose memory it holds (see limits.Admission).
        gone: nobody waits for the answer any more.
        started: a thread or a worker process has begun with it.
        failure: None when it was answered.
        payload: JSON of the list of predictions, or float32 logits as bytes.
        label: the likeliest class, or -1.
        abstain: whether it is too unlikely to be relied on; None where the model has no threshold.
        brightness: mean of the model's input in [0, 255].
        queue_seconds, decode_seconds, predict_seconds: each; predict is that of the whole batch.
        batch_size: of the batch that it was predicted in.
    """

    __slots__ = (
        "abstain",
        "batch_size",
        "brightness",
        "content",
        "decode_seconds",
        "done",
        "failure",
        "gone",
        "held",
        "label",
        "num_pixels",
        "payload",
        "predict_seconds",
        "queue_seconds",
        "started",
        "submitted",
        "top_k",
    )

    def __init__(
        self, content: bytes | np.ndarray, top_k: int, done: Callable[[Job], None], num_pixels: int = 0
    ) -> None:
        self.content = content
        self.top_k = top_k
        self.done = done
        self.submitted = time.perf_counter()
        self.num_pixels = num_pixels
        self.held: Request | None = None
        self.gone = False
        self.started = False
        self.failure: Failure | None = None
        self.payload = b""
        self.label = -1
        self.abstain: bool | None = None
        self.brightness = 0.0
        self.queue_seconds = 0.0
        self.decode_seconds = 0.0
        self.predict_seconds = 0.0
        self.batch_size = 0

    def drop(self) -> bool:
        """Nobody waits any more; True if nothing has begun with it, so that its memory is free at once."""
        self.gone = True
        # What begins says `started` before it looks at `gone`: so one of the two sees the other.
        if self.started:
            return False
        self.content = b""
        return True

    def to_json(self) -> bytes:
        """What is told of a job that was answered, as members of a JSON object; timings in milliseconds."""
        return b'"predictions":%s,%s"timings_ms":{"queue":%.3f,"decode":%.3f,"predict":%.3f}' % (
            self.payload,
            _ABSTAIN_JSON[self.abstain],
            1e3 * self.queue_seconds,
            1e3 * self.decode_seconds,
            1e3 * self.predict_seconds,
        )
