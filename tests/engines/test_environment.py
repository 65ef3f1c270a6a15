"""What is sent to nodes that have Python and nothing else."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("packaging")

from manyeyes.engines import environment
from manyeyes.engines.environment import pack_environment
from manyeyes.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("environments")


@pytest.fixture(scope="module")
def archive(folder) -> Path:
    return pack_environment([], folder)


def test_a_python_without_packages_runs_manyeyes_from_the_archive(archive, tmp_path):
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    code = "import manyeyes.data.ingest, manyeyes.imaging.decode, sys; print(manyeyes.__file__, 'keras' in sys.modules)"
    # -S: no site-packages, as if this Python had none.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.split() == [str(tmp_path / "manyeyes" / "__init__.py"), "False"], done.stderr


def test_it_is_packed_once(archive, folder, caplog):
    with caplog.at_level(logging.INFO, logger="manyeyes.engines"):
        assert pack_environment([], folder) == archive
    assert not caplog.records
    assert list(folder.iterdir()) == [archive]


def test_the_same_packages_give_the_same_bytes():
    distributions = {name: environment.importlib.metadata.distribution(name) for name in ("fsspec", "manyeyes")}
    first, second = io.BytesIO(), io.BytesIO()
    environment._write(distributions, first)
    environment._write(distributions, second)
    assert first.getvalue() == second.getvalue()


def test_training_is_not_sent_unless_asked_for():
    assert "tensorflow" not in environment._closure(None)
    assert {"numpy", "manyeyes", "onnxruntime"} <= set(environment._closure(["predict"]))


def test_an_unknown_extra_is_refused_with_the_known_ones(folder):
    with pytest.raises(UsageError, match=r"no extra 'predit' to send\. It has: .*predict"):
        pack_environment(["predit"], folder)
