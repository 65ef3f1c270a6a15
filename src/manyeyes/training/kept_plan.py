"""A directory that holds one long job of many trainings: the same command goes on with it, another one is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from manyeyes import storage
from manyeyes.errors import UsageError

PLAN_NAME = "plan.json"


def keep_plan(out: str, plan: Mapping[str, Any], what: str) -> dict[str, Any]:
    """Write what is planned to plan.json in `out`, or hold it against what is planned there already.

    Args:
        plan: values of JSON.
        what: the job is, for people: "search".

    Returns:
        The plan as it is read back: tuples are lists there.

    Raises:
        UsageError: `out` holds another plan, or something else.
    """
    wanted: dict[str, Any] = json.loads(storage.canonical_json(plan))
    uri = storage.join(out, PLAN_NAME)
    try:
        before = storage.read_json(uri)
    except FileNotFoundError:
        if storage.exists(out) and next(storage.iterate_directory(out), None) is not None:
            raise UsageError(f"{out} is not empty and holds no {what}. Give another --out.") from None
        storage.check_writable(out)
        storage.write_json(uri, wanted)
        return wanted
    differing = sorted(key for key in wanted if wanted[key] != before.get(key))
    if differing:
        raise UsageError(
            f"{out} holds a {what} with another {', '.join(differing)}. "
            "Go on with it by the same command, or give another --out."
        )
    return wanted
