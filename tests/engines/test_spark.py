"""The Spark engine: the contract on this machine and on a real cluster, and what only Spark does."""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

pyspark = pytest.importorskip("pyspark")

from manyeyes.engines.testing import (  # noqa: E402
    EngineContract,
    GangContract,
    LazyContract,
    WorkerProcessContract,
    processes_of_session,
)


class TestSparkLocal(EngineContract, LazyContract, WorkerProcessContract, GangContract):
    engine_name = "spark"
    knows_signals = False

    def engine_settings(self) -> dict[str, Any]:
        return {"master": "local[2]"}


class TestSparkStandalone(EngineContract, LazyContract, WorkerProcessContract, GangContract):
    engine_name = "spark"
    knows_signals = False

    @pytest.fixture(autouse=True)
    def _cluster(self, spark_cluster) -> None:
        self.cluster = spark_cluster

    def engine_settings(self) -> dict[str, Any]:
        return {"master": self.cluster.master, "executor_memory": "512m"}

    def orphans(self, driver: subprocess.Popen[bytes]) -> list[object]:
        return [*processes_of_session(driver.pid), *strange_applications(self.cluster)]


def strange_applications(cluster) -> list[str]:
    """Applications that the master still runs, and their processes, but not this process's own."""
    context = pyspark.SparkContext._active_spark_context
    ours = "none" if context is None else context.applicationId
    with urllib.request.urlopen(f"{cluster.page}/json/", timeout=5) as answer:
        found = {application["id"] for application in json.load(answer)["activeapps"]} - {ours}
    for path in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if path.readlink().is_relative_to(cluster.directory / "work") and ours not in str(path.readlink()):
                found.add(str(path))
    return sorted(found)
