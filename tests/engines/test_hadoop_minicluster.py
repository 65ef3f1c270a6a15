"""scripts/hadoop-minicluster starts separate daemons and takes all of them away again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from manyeyes import storage
from manyeyes.engines.testing import wait_until

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "hadoop-minicluster"


def minicluster(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, check=False)


def processes_of(directory: Path) -> list[int]:
    """The processes that have to do with a minicluster, by their command lines and environments."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            texts = (path / "cmdline").read_bytes() + (path / "environ").read_bytes()
        except OSError:  # it ended while we looked
            continue
        if f"={directory}".encode() in texts:
            found.append(int(path.name))
    return found


@pytest.mark.slow
def test_it_serves_hdfs_while_it_runs_and_leaves_nothing_when_stopped(tmp_path):
    for command in ("java", "mvn"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed, which scripts/hadoop-minicluster needs")
    directory = str(tmp_path / "cluster")
    started = minicluster("start", directory, "--no-yarn", "--datanodes", "1", "--replication", "1")
    try:
        assert started.returncode == 0, started.stderr
        exported = dict(line.removeprefix("export ").split("=", 1) for line in started.stdout.splitlines())
        assert exported["HADOOP_HOME"] == directory
        uri = f"{exported['MANYEYES_HDFS']}/folder/file"
        storage.write_bytes(uri, b"content")
        shown = subprocess.run(
            [f"{directory}/bin/hdfs", "dfs", "-cat", uri], capture_output=True, text=True, check=True
        )
        assert shown.stdout == "content"
        again = minicluster("start", directory)
        assert again.returncode != 0
        assert "runs in" in again.stderr
        assert "Stop it first" in again.stderr
        assert minicluster("status", directory).returncode == 0
        os.kill(int((tmp_path / "cluster/pids/datanode-1.pid").read_text()), signal.SIGKILL)
        wait_until(lambda: minicluster("status", directory).returncode == 1)
        dead = minicluster("status", directory)
        assert dead.returncode == 1
        assert "datanode-1           dead" in dead.stdout
    finally:
        stopped = minicluster("stop", directory)
    assert stopped.returncode == 0
    assert processes_of(tmp_path / "cluster") == []
    assert minicluster("status", directory).returncode == 1
