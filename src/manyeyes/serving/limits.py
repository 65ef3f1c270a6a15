"""What is refused before it costs anything: by token, by the image's header, by the page that asks."""

from __future__ import annotations

import hmac

from manyeyes.errors import ImageError, Reason
from manyeyes.imaging.decode import ImageInfo, probe
from manyeyes.serving.jobs import Failure
from manyeyes.serving.settings import ServeSettings


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
        ("access-control-expose-headers", "x-request-id"),
        ("vary", "origin"),
    )
