"""The hadoop engine keeps the contract on a real YARN and HDFS, and what only it promises."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from manyeyes.engines.testing import EngineContract, WorkerProcessContract, processes_of_session

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def cluster(hadoop: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The minicluster, where every engine and every driver finds it."""
    for name, value in hadoop.environment.items():
        monkeypatch.setenv(name, value)
    return hadoop


class TestHadoop(EngineContract, WorkerProcessContract):
    engine_name = "hadoop"
    patience_seconds = 90.0

    @pytest.fixture(autouse=True)
    def _on_the_cluster(self, cluster: Any) -> None:
        self.cluster = cluster

    def orphans(self, driver: subprocess.Popen[bytes]) -> list[object]:
        return [*processes_of_session(driver.pid), *running_jobs(), *task_processes(self.cluster)]


def running_jobs() -> list[object]:
    """The applications that YARN runs."""
    from manyeyes.engines.hadoop.installation import find_installation

    address = find_installation().properties["yarn.resourcemanager.webapp.address"]
    with urllib.request.urlopen(f"http://{address}/ws/v1/cluster/apps?states=ACCEPTED,RUNNING") as answer:
        return [app["id"] for app in ((json.load(answer)["apps"] or {}).get("app") or [])]


def task_processes(cluster: Any) -> list[int]:
    """The mappers and reducers of this project that run on the cluster."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:  # it ended while we looked
            continue
        if b"manyeyes.engines.hadoop.task" in words and any(cluster.hdfs.encode() in word for word in words):
            found.append(int(path.parent.name))
    return found
