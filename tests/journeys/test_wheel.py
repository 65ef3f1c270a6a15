"""What people get by `pip install`: the wheel alone, in an environment where nothing else is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command as in a fresh shell: nothing of this environment's Python is on its way."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=500, env=clean, cwd=cwd, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    built = run(sys.executable, "-m", "build", "--wheel", "--outdir", out, PROJECT)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment(wheel: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    page = {
        f"manyeyes/{folder}/{path.name}"
        for folder in ("serving/page", "report/page")
        for path in (PROJECT / "src/manyeyes" / folder).iterdir()
        if path.is_file()
    }
    assert {
        "manyeyes/serving/page/style.css",
        "manyeyes/serving/page/base.css",
        "manyeyes/report/page/matrix.js",
    } <= page
    assert {"manyeyes/py.typed", *page} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "manyeyes",
        wheel.name.removesuffix("-py3-none-any.whl") + ".dist-info",
    }

    venv.create(tmp_path / "venv", with_pip=True)
    python, manyeyes = tmp_path / "venv" / "bin" / "python", tmp_path / "venv" / "bin" / "manyeyes"
    installed = run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    assert installed.returncode == 0, installed.stderr

    assert run(manyeyes, "--version").stdout == f"manyeyes {wheel.name.split('-')[1]}\n"
    for arguments in ((), ("ingest",), ("train",), ("evaluate",), ("export",), ("predict",), ("serve",)):
        helped = run(manyeyes, *arguments, "--help")
        assert helped.returncode == 0, helped.stderr
        assert "Usage: manyeyes" in helped.stdout

    for number in range(20):
        path = tmp_path / "photos" / ("dark" if number % 2 else "light") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((20, 20, 3), 200 - 10 * number, np.uint8))
    ingested = run(manyeyes, "ingest", tmp_path / "photos", tmp_path / "dataset", "--size", 16, "--json")
    assert ingested.returncode == 0, ingested.stderr
    assert json.loads(ingested.stdout)["num_written"] == 20

    for extra, arguments in (
        ("train", ("train", tmp_path / "dataset", "--out", tmp_path / "run", "--batch-size", 4)),
        ("export", ("export", tmp_path / "run", tmp_path / "bundle")),
        ("serve", ("serve", tmp_path / "bundle")),
    ):
        refused = run(manyeyes, *arguments)
        assert refused.returncode == 2, refused.stderr
        (line,) = refused.stderr.splitlines()
        assert line.endswith(f"Run: pip install 'manyeyes[{extra}]'")
