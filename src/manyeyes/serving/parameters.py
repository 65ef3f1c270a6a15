"""What a query may say."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass

from manyeyes.serving.jobs import Failure


@dataclass(frozen=True)
class Parameters:
    """The query of a request: how many classes, of which model, and for an explanation which class and form."""

    top_k: int
    model: str | None = None
    version: str | None = None
    label: int | None = None
    format: str = "json"


def read_parameters(query: bytes, default_top_k: int) -> Parameters | Failure:
    """Read a query; what is not known in it is passed over, what is known must be sound."""
    try:
        found = urllib.parse.parse_qs(query.decode("latin-1"), keep_blank_values=True, max_num_fields=100)
    except ValueError:
        return _wrong("the query has more than 100 fields")
    values = {name: entries[-1] for name, entries in found.items()}
    top_k, label = values.get("top_k", str(default_top_k)), values.get("label")
    if not _is_number(top_k) or int(top_k) < 1:
        return _wrong(f"top_k={top_k[:40]!r} is not a number of at least 1")
    if label is not None and not _is_number(label):
        return _wrong(f"label={label[:40]!r} is not a number of at least 0")
    answer_format = values.get("format", "json")
    if answer_format not in ("json", "png"):
        return _wrong(f"format={answer_format[:40]!r} is not json or png")
    return Parameters(
        int(top_k), values.get("model"), values.get("version"), None if label is None else int(label), answer_format
    )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 6


def _wrong(detail: str) -> Failure:
    return Failure(400, "The request can't be answered", "bad_request", detail)
