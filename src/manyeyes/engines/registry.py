"""Maps the name of an engine to its factory, imported only when asked for."""

from __future__ import annotations

import importlib

from manyeyes.engines.base import Engine
from manyeyes.errors import UsageError

# name -> module with a `create(num_workers) -> Engine`
_MODULE_OF_ENGINE = {
    "inline": "manyeyes.engines.inline",
    "local": "manyeyes.engines.local",
}
ENGINE_NAMES = tuple(_MODULE_OF_ENGINE)


def create_engine(name: str = "local", num_workers: int | None = None) -> Engine:
    """Return the engine `name`; `num_workers` defaults to one per core.

    Raises:
        UsageError: no such engine, or a number of workers below 1.
    """
    if name not in _MODULE_OF_ENGINE:
        raise UsageError(f"Unknown engine {name!r}. Choose one of: {', '.join(ENGINE_NAMES)}.")
    if num_workers is not None and num_workers < 1:
        raise UsageError(f"num_workers={num_workers} is below 1. Give at least 1, or leave it out for one per core.")
    return importlib.import_module(_MODULE_OF_ENGINE[name]).create(num_workers)
