"""What is refused before it costs anything: by token, by the image's header, by the page that asks."""

from __future__ import annotations

import hmac

from manyeyes.errors import ImageError, Reason
from manyeyes.imaging.decode import ImageInfo, probe
from manyeyes.serving.jobs import Failure, Job
from manyeyes.serving.messages import Request
from manyeyes.serving.settings import ServeSettings

# A core decodes 30 to 150 million pixels a second: what waits is some seconds of work, whatever images it is.
# One image within the limit for one is always let in.
_MAX_PIXELS_OF_A_REQUEST = 200_000_000
_MAX_PIXELS = 400_000_000


class Admission:
    """Bounds the work and the memory of the images that wait or are decoded; used in the event loop alone.

    Files of a few kilobytes can hold many pixels, so that neither their number nor their bytes bound the work.

    Attributes:
        num_pixels: by the headers of all images that are under way.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.num_pixels = 0
        self._max_pixels = max(_MAX_PIXELS, settings.max_pixels)
        self._max_pixels_of_a_request = max(_MAX_PIXELS_OF_A_REQUEST, settings.max_pixels)

    def check_request(self, num_pixels: int) -> Failure | None:
        """Why a request of several images is refused, if it is."""
        if num_pixels <= self._max_pixels_of_a_request:
            return None
        return Failure(
            413,
            "The request can't be answered",
            Reason.TOO_MANY_PIXELS.value,
            f"the images have {num_pixels} pixels together, the limit is {self._max_pixels_of_a_request}",
        )

    def has_room_for(self, num_pixels: int) -> bool:
        """Whether images of so many pixels may come now."""
        return self.num_pixels + num_pixels <= self._max_pixels

    def take(self, job: Job, request: Request) -> None:
        """Count a job, which needs the memory of its request, until `let_go`."""
        job.held = request
        request.hold()
        self.num_pixels += job.num_pixels

    def let_go(self, job: Job) -> None:
        """The job is done, or was dropped."""
        request, job.held = job.held, None
        if request is not None:
            self.num_pixels -= job.num_pixels
            request.let_go()

    def client_left(self, jobs: list[Job], is_certain: bool) -> bool:
        """See Request.on_gone."""
        if not is_certain and any(job.started for job in jobs):
            return False
        for job in jobs:
            if job.drop():
                self.let_go(job)
        return True


def check_image(encoded: bytes, settings: ServeSettings) -> ImageInfo | Failure:
    """Read the header of an image; no pixel is decoded."""
    try:
        info = probe(encoded)
        if info.width * info.height > settings.max_pixels:
            raise ImageError(
                Reason.TOO_MANY_PIXELS, f"{info.width} x {info.height}, the limit is {settings.max_pixels} pixels"
            )
    except ImageError as error:
        return Failure.of_image(error)
    return info


def has_token(authorization: bytes, token: bytes) -> bool:
    """Whether the header `authorization` carries the token; takes as long for a wrong one as for the right one."""
    scheme, _, given = authorization.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token)


def cors_headers(origin: str, allowed: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The headers that let a page from `origin` read the answer; none where it is not allowed."""
    if not origin or (origin not in allowed and "*" not in allowed):
        return ()
    return (
        ("access-control-allow-origin", "*" if "*" in allowed else origin),
        ("access-control-expose-headers", "inference-header-content-length, retry-after, x-request-id"),
        ("vary", "origin"),
    )
