"""Manyeyes: from labelled images on any file system to a recogniser that answers in real time.

The verbs of the command line are functions here; each loads its own parts when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyeyes.auditing.audit import audit
    from manyeyes.data.ingest import ingest
    from manyeyes.evaluation.crossval import crossval
    from manyeyes.evaluation.evaluate import evaluate
    from manyeyes.recognition.batch import predict
    from manyeyes.recognition.predictor import Predictor
    from manyeyes.recognition.recognizer import Recognizer
    from manyeyes.report.build import write_report
    from manyeyes.report.comparing import compare
    from manyeyes.serving.server import serve
    from manyeyes.training.export import export
    from manyeyes.training.trainer import train
    from manyeyes.training.tune import tune

__version__ = "0.1.0"
__all__ = [
    "Predictor",
    "Recognizer",
    "audit",
    "compare",
    "crossval",
    "evaluate",
    "export",
    "ingest",
    "predict",
    "serve",
    "train",
    "tune",
    "write_report",
]

_MODULE_OF_NAME = {
    "ingest": "manyeyes.data.ingest",
    "audit": "manyeyes.auditing.audit",
    "train": "manyeyes.training.trainer",
    "tune": "manyeyes.training.tune",
    "evaluate": "manyeyes.evaluation.evaluate",
    "crossval": "manyeyes.evaluation.crossval",
    "write_report": "manyeyes.report.build",
    "compare": "manyeyes.report.comparing",
    "export": "manyeyes.training.export",
    "predict": "manyeyes.recognition.batch",
    "serve": "manyeyes.serving.server",
    "Predictor": "manyeyes.recognition.predictor",
    "Recognizer": "manyeyes.recognition.recognizer",
}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF_NAME:
        return getattr(importlib.import_module(_MODULE_OF_NAME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
