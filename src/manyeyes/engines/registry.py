"""Maps the name of an engine to its factory, imported only when asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from manyeyes.engines.base import Engine
from manyeyes.errors import UsageError

# name -> module with a `create(num_workers, settings) -> Engine`
_MODULE_OF_ENGINE = {
    "inline": "manyeyes.engines.inline",
    "local": "manyeyes.engines.local",
    "spark": "manyeyes.engines.spark",
    "hadoop": "manyeyes.engines.hadoop",
}
ENGINE_NAMES = tuple(_MODULE_OF_ENGINE)


def create_engine(
    name: str = "local", num_workers: int | None = None, settings: Mapping[str, Any] | None = None
) -> Engine:
    """Return the engine `name`.

    Args:
        num_workers: tasks at once; default: one per core, or what the cluster offers.
        settings: of this engine (see SparkSettings, HadoopSettings); the inline and local engines have none.

    Raises:
        UsageError: no such engine, a number of workers below 1, or an unknown setting.
        MissingExtraError: the library of the engine is not installed.
    """
    if name not in _MODULE_OF_ENGINE:
        raise UsageError(f"Unknown engine {name!r}. Choose one of: {', '.join(ENGINE_NAMES)}.")
    if num_workers is not None and num_workers < 1:
        raise UsageError(f"num_workers={num_workers} is below 1. Give at least 1, or leave it out for one per core.")
    return importlib.import_module(_MODULE_OF_ENGINE[name]).create(num_workers, settings or {})
