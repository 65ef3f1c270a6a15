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


def test_a_worker_of_training_loads_nothing_that_keras_loads_for_others_and_a_task_may_still():
    code = (
        "import os\n"
        "from manyeyes.engines.base import THREADS_VARIABLE\n"
        "from manyeyes.training import backend\n"
        "os.environ[THREADS_VARIABLE] = '1'\n"
        "backend.prepare(0)\n"
        "assert 'keras' in sys.modules\n"
        "print([name for name in ('pandas', 'sklearn', 'matplotlib') if name in sys.modules])\n"
        "import pandas, sklearn, matplotlib"
    )
    done = subprocess.run([sys.executable, "-c", f"import sys\n{code}"], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
