"""The commands of docs/guides/ run as they stand, in the order in which a reader meets them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
# Its commands need a GPU; tests/training/test_gpu.py has what it claims.
NOT_RUN = {"gpu"}
# What a guide needs beyond Python: without it the guide is a visible skip.
NEEDS = {
    "serving": ("curl",),
    "watch": ("curl",),
    "spark": ("java",),
    "hadoop": ("java", "mvn"),
    "storage": ("java", "mvn"),
}


def script_of(guide):
    """The bash script of a guide: `$ ` lines of ```console blocks (and their `> ` continuations), ```python blocks.

    A block whose fence says more (```console no-run) is for the reader's own cluster and is passed over.
    """
    lines = ["set -euo pipefail"]
    for kind, body in re.findall(r"^```(console|python)\n(.*?)^```$", guide.read_text(), re.MULTILINE | re.DOTALL):
        if kind == "python":
            lines += ["cat > guide.py <<'END_OF_PYTHON'", body.rstrip("\n"), "END_OF_PYTHON", "python guide.py"]
        else:
            lines += [line[2:] for line in body.splitlines() if line.startswith(("$ ", "> "))]
    return "\n".join(lines) + "\n"


@pytest.fixture
def folder(small_bundle, tmp_path):
    """Where a reader stands: a checkout's scripts, a folder of photos and a bundle that knows them."""
    draw = np.random.default_rng(0)
    for label, name in enumerate(("red", "green", "blue")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(20):
            image = draw.integers(0, 120, (24, 20, 3), dtype=np.uint8)
            image[:, :, 2 - label] += 100
            (tmp_path / "photos" / name / f"{index:02}.jpg").write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
    shutil.copytree(small_bundle, tmp_path / "bundle")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    return tmp_path


def test_there_is_a_guide_for_every_engine_file_system_and_for_training_evaluation_serving_and_streams():
    assert {guide.stem for guide in GUIDES} == {
        "evaluation",
        "gpu",
        "hadoop",
        "local",
        "serving",
        "spark",
        "storage",
        "training",
        "watch",
    }


@pytest.mark.slow
@pytest.mark.parametrize("guide", [pytest.param(each, id=each.stem) for each in GUIDES if each.stem not in NOT_RUN])
def test_a_guide_runs_as_it_stands(guide, folder):
    for command in NEEDS.get(guide.stem, ()):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed, which docs/guides/{guide.name} needs")
    script = script_of(guide)
    assert len(script.splitlines()) > 3
    hidden = ("HADOOP", "SPARK", "PYSPARK", "AWS", "MANYEYES")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment["SPARK_SUBMIT_OPTS"] = os.environ["SPARK_SUBMIT_OPTS"]
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    process = subprocess.Popen(
        ["bash", "-x", "-c", script],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        for name, stop in (("hadoop", "hadoop-minicluster"), ("spark", "spark-standalone")):
            if (folder / name).exists():
                # A guide stops its cluster at its end, which a guide that failed did not reach.
                subprocess.run([ROOT / "scripts" / stop, "stop", folder / name], check=True)
    assert process.returncode == 0, said[-6000:]
