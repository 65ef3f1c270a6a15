"""Several images in one request: a form with a part `image` for each."""

from __future__ import annotations

import itertools

import multipart

from manyeyes.serving.jobs import Failure
from manyeyes.serving.settings import ServeSettings

_PIECE_BYTES = 64 * 1024


def read_form(content_type: str, body: bytes, settings: ServeSettings) -> list[bytes] | Failure:
    """Return the parts of the name `image`, in order."""
    wrong = "The request can't be answered"
    _, options = multipart.parse_options_header(content_type)
    boundary = options.get("boundary", "")
    if not boundary:
        return Failure(400, wrong, "bad_request", "the form has no boundary")
    images: list[bytes] = []
    chunks: list[bytes] = []
    is_image = False
    try:
        with multipart.PushMultipartParser(
            boundary, content_length=len(body), max_segment_count=settings.max_images
        ) as parser:
            # In pieces: the parser copies what it is given.
            pieces = (body[start : start + _PIECE_BYTES] for start in range(0, len(body), _PIECE_BYTES))
            for event in itertools.chain.from_iterable(map(parser.parse, pieces)):
                if isinstance(event, multipart.MultipartSegment):
                    is_image = event.name == "image"
                elif not is_image:
                    continue
                elif event is not None:
                    chunks.append(bytes(event))
                else:
                    images.append(b"".join(chunks))
                    chunks = []
    except multipart.MultipartError as error:
        limit = isinstance(error, multipart.ParserLimitReached)
        detail = f"more than {settings.max_images} parts, or too long headers" if limit else f"this is no form: {error}"
        return Failure(413 if limit else 400, wrong, "too_many_images" if limit else "bad_request", detail[:200])
    if not images:
        return Failure(400, wrong, "empty", "the form has no part of the name image")
    return images
