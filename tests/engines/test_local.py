"""What only the local engine promises."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys

import pytest

from manyeyes.engines.base import THREADS_VARIABLE, available_cores, kept_workers
from manyeyes.engines.local import LocalEngine
from manyeyes.engines.testing import processes_of_session, wait_until
from manyeyes.errors import TaskError


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from manyeyes.engines.local import LocalEngine\nLocalEngine(2).map(abs, range(4))\n")
    driver = subprocess.Popen(
        [sys.executable, str(script)], stderr=subprocess.PIPE, text=True, cwd=tmp_path, start_new_session=True
    )
    _, errors = driver.communicate(timeout=120)
    assert driver.returncode == 1
    assert "if __name__ == '__main__':" in errors.splitlines()[-1]
    wait_until(lambda: not processes_of_session(driver.pid))
    assert processes_of_session(driver.pid) == []


def test_workers_share_the_cores():
    share = str(max(1, available_cores() // 2))
    assert LocalEngine(2).map(os.getenv, [THREADS_VARIABLE] * 2) == [share, share]


def test_a_broken_generator_of_items_stops_the_job_and_its_workers():
    def items():
        yield 1
        raise OSError("the source went away")

    with pytest.raises(OSError, match="the source went away"):
        LocalEngine(2).map(abs, items())
    assert multiprocessing.active_children() == []


def test_a_gang_that_raises_says_which_rank():
    with pytest.raises(TaskError, match=r"Worker 0 of the gang failed: .*int"):
        LocalEngine().gang(int, 1)


def test_kept_workers_serve_the_next_job_of_the_same_function_and_end_with_the_block():
    engine = LocalEngine(2)
    with kept_workers(engine):
        first = set(engine.map(os.readlink, ["/proc/self"] * 8))
        assert set(engine.map(os.readlink, ["/proc/self"] * 8)) == first
        assert {str(process.pid) for process in multiprocessing.active_children()} == first
        assert engine.map(abs, [-1]) == [1]
        assert not {str(process.pid) for process in multiprocessing.active_children()} & first
    assert multiprocessing.active_children() == []
    with kept_workers(engine):
        assert not set(engine.map(os.readlink, ["/proc/self"] * 8)) & first


def test_a_kept_worker_that_dies_or_fails_is_replaced():
    engine = LocalEngine(2)
    with kept_workers(engine):
        engine.map(os.readlink, ["/proc/self"] * 8)
        killed, _ = multiprocessing.active_children()
        os.kill(killed.pid, signal.SIGKILL)
        killed.join()
        assert str(killed.pid) not in engine.map(os.readlink, ["/proc/self"] * 8)
        with pytest.raises(TaskError, match="Task 1"):
            engine.map(os.readlink, ["/proc/self", "/not/a/link", "/proc/self"])
        assert len(set(engine.map(os.readlink, ["/proc/self"] * 8))) <= 2
    assert multiprocessing.active_children() == []
