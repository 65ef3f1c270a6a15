"""The door is light: neither `import manyeyes` nor `manyeyes --help` loads a heavy library."""

from __future__ import annotations

import subprocess
import sys

import pytest

from manyeyes.cli.main import VERBS

HEAVY = ("keras", "tensorflow", "pyarrow", "cv2", "numpy", "pyspark", "matplotlib", "openvino", "onnxruntime", "onnx")


def heavy_modules_after(code: str) -> str:
    script = f"import sys\n{code}\nprint('LOADED', [name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return result.stdout.splitlines()[-1]


def test_import_manyeyes_loads_no_heavy_library():
    assert heavy_modules_after("import manyeyes; dir(manyeyes)") == "LOADED []"


def test_the_check_sees_a_heavy_library():
    assert heavy_modules_after("import numpy") == "LOADED ['numpy']"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_loads_no_heavy_library(arguments):
    code = (
        f"sys.argv = ['manyeyes', *{arguments!r}]\n"
        "import manyeyes.cli.main\n"
        "try:\n    manyeyes.cli.main.run()\nexcept SystemExit as end:\n    assert not end.code, end.code"
    )
    assert heavy_modules_after(code) == "LOADED []"
