"""Nothing is told to others of what is run here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import manyeyes

_SOURCE = Path(manyeyes.__file__).parent
# What ONNX Runtime is told at the moment it is imported, which is when its reports begin.
_WATCH = """
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
"""


def _told(code: str, **environment: str) -> str:
    variables = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-c", _WATCH + code]
    done = subprocess.run(command, capture_output=True, text=True, env={**variables, **environment}, check=True)
    return done.stdout.strip()


def test_onnx_runtime_does_not_report_to_its_makers_unless_the_user_says_so(small_bundle: str) -> None:
    code = f"from manyeyes.recognition.predictor import Predictor; Predictor.load({small_bundle!r}, 'onnxruntime')"
    assert _told(code) == "1"
    assert _told(code, ORT_DISABLE_TELEMETRY="0") == "0"
    assert _told("import onnxruntime") == "None", "the check sees nothing"


_IMPORTS = [
    ".".join(("manyeyes", *path.relative_to(_SOURCE).with_suffix("").parts))
    for path in _SOURCE.rglob("*.py")
    if re.search(r"^\s*(import|from) (onnxruntime|tf2onnx)\b", path.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("module", sorted({*_IMPORTS, "manyeyes.training.export"}))
def test_every_module_that_imports_onnx_runtime_turns_its_reports_off_before(module: str) -> None:
    assert _told(f"import {module}, onnxruntime") == "1"


def test_modules_that_import_onnx_runtime_are_found() -> None:
    assert {"manyeyes.recognition.backends", "manyeyes.training.quantize"} <= set(_IMPORTS)
