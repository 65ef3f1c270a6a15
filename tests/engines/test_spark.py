"""The Spark engine: the contract on this machine and on a real cluster, and what only Spark does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

pyspark = pytest.importorskip("pyspark")

from manyeyes.data.ingest import ingest  # noqa: E402
from manyeyes.engines.base import THREADS_VARIABLE  # noqa: E402
from manyeyes.engines.registry import create_engine  # noqa: E402
from manyeyes.engines.spark_errors import job_error  # noqa: E402
from manyeyes.engines.testing import (  # noqa: E402
    EngineContract,
    GangContract,
    LazyContract,
    WorkerProcessContract,
    processes_of_session,
    rank_and_size,
    sleep_and_return,
)
from manyeyes.errors import ConfigError, EngineError, UsageError  # noqa: E402
from manyeyes.recognition.batch import predict  # noqa: E402


class TestSparkLocal(EngineContract):
    """Driver and executor are one process here; the contract of workers and gangs is run on a real cluster below."""

    engine_name = "spark"
    knows_signals = False
    patience_seconds = 120.0

    def engine_settings(self) -> dict[str, Any]:
        return {"master": "local[2]"}


@pytest.mark.slow
class TestSparkStandalone(EngineContract, LazyContract, WorkerProcessContract, GangContract):
    engine_name = "spark"
    knows_signals = False
    patience_seconds = 120.0

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


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory) -> str:
    """A Python of this version without any package, as the nodes of a cluster may have it."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return str(folder / "bin" / "python")


@pytest.mark.slow
def test_executors_without_manyeyes_say_what_to_do(spark_cluster, bare_python):
    engine = create_engine("spark", 2, {"master": spark_cluster.master, "python": bare_python})
    with pytest.raises(EngineError, match=r"Manyeyes is not installed .* Add --ship-env"):
        engine.map(abs, [-1])


@pytest.mark.slow
def test_a_shipped_environment_ingests_and_predicts_on_bare_executors(
    spark_cluster, bare_python, small_dataset, small_bundle, tmp_path
):
    settings = {"master": spark_cluster.master, "python": bare_python, "ship_env": True}
    engine = create_engine("spark", 2, settings)
    (where,) = engine.map(eval, ["__import__('manyeyes').__file__"])
    assert where.startswith(str(spark_cluster.directory / "work"))
    out = str(tmp_path / "predictions.parquet")
    predicted = predict(small_bundle, small_dataset, out, engine=engine)
    assert predicted.num_predicted == 171
    assert pq.read_table(out) == pq.read_table(
        predict(small_bundle, small_dataset, str(tmp_path / "inline.parquet"), engine=create_engine("inline")).out
    )
    images = folder_of_images(tmp_path / "images")
    ingested = ingest(str(images), str(tmp_path / "dataset"), engine=engine)
    assert ingested.num_written == 12


@pytest.mark.slow
def test_an_executor_killed_in_the_middle_of_a_map_changes_no_result(spark_cluster):
    engine = create_engine("spark", 2, {"master": spark_cluster.master, "executor_memory": "512m"})
    killed = []

    def on_result(index: int, result: float) -> None:
        if index >= 5 and not killed:
            killed.extend(executors_of(engine.context.applicationId)[:1])
            os.kill(killed[0], signal.SIGKILL)

    items = [0.2 + index / 1000 for index in range(30)]
    assert engine.map(sleep_and_return, items, on_result=on_result) == items
    assert killed


def test_workers_take_the_threads_that_spark_gives_a_task():
    engine = create_engine("spark", 2, {"master": "local[2]"})
    assert engine.map(os.getenv, [THREADS_VARIABLE, "OMP_NUM_THREADS"]) == ["1", "1"]


def test_a_gang_larger_than_the_slots_is_refused_at_once():
    engine = create_engine("spark", 2, {"master": "local[2]"})
    with pytest.raises(UsageError, match="A gang of 3 workers needs that many slots at once; Spark has 2"):
        engine.gang(rank_and_size, 3)


def test_large_functions_and_results_travel():
    engine = create_engine("spark", 2, {"master": "local[2]"})
    large = os.urandom(3 << 20)
    assert engine.map(large.__add__, [b"1", b"2"]) == [large + b"1", large + b"2"]


def test_a_broken_generator_of_items_stops_the_job():
    def items():
        yield 1
        raise OSError("the source went away")

    engine = create_engine("spark", 2, {"master": "local[2]"})
    with pytest.raises(OSError, match="the source went away"):
        engine.map(abs, items())
    assert list(engine.context.statusTracker().getActiveJobsIds()) == []


def test_unknown_settings_and_properties_are_refused():
    with pytest.raises(ConfigError, match="Did you mean master"):
        create_engine("spark", 2, {"mastr": "yarn"})
    with pytest.raises(UsageError, match="executors=0 is below 1"):
        create_engine("spark", 2, {"executors": 0})
    with pytest.raises(UsageError, match=r"'hadoop\.x' is not a property of Spark"):
        create_engine("spark", 2, {"properties": {"hadoop": {"x": "1"}}})


def test_without_java_it_is_said_how_to_get_one(tmp_path):
    code = "from manyeyes.engines.registry import create_engine as c; c('spark', 1).map(abs, [1])"
    for variables, message in (({}, "no `java` on the PATH"), ({"JAVA_HOME": str(tmp_path)}, "has no bin/java")):
        environment = {"PATH": str(tmp_path), **variables}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert "EngineError: Spark needs Java 17 or newer" in done.stderr
        assert message in done.stderr


def test_a_wrong_master_is_said_within_seconds():
    with pytest.raises(EngineError, match=r"No Spark master answers at spark://127.0.0.1:9 .*refused"):
        create_engine("spark", 1, {"master": "spark://127.0.0.1:9"}).map(abs, [1])
    with pytest.raises(UsageError, match=r"master is spark://127.0.0.1; expected spark://HOST:PORT"):
        create_engine("spark", 1, {"master": "spark://127.0.0.1"}).map(abs, [1])


JAVA_THAT_DIES = """
import os, signal
from pyspark import SparkContext
from manyeyes.engines import testing
from manyeyes.engines.registry import create_engine
from manyeyes.errors import EngineError

engine = create_engine("spark", 2, {"master": "local[2]"})

def kill_java(index, result):
    os.kill(SparkContext._gateway.proc.pid, signal.SIGKILL)

try:
    engine.map(testing.sleep_and_return, [0.0, *[10.0] * 9], on_result=kill_java)
except EngineError as error:
    print(error)
print(engine.map(abs, [-5]))
"""


def test_a_session_whose_java_dies_fails_its_job_and_the_next_job_gets_another():
    done = subprocess.run([sys.executable, "-c", JAVA_THAT_DIES], capture_output=True, text=True, timeout=120)
    said = "The Spark session ended while the job ran. Run it again; what was done stays done."
    assert done.stdout.splitlines() == [said, "[5]"], done.stderr


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(104, "Connection reset by peer"),
        ValueError("not enough values to unpack (expected at least 2, got 0)"),
        Exception("Answer from Java side is empty"),
        type("Py4JNetworkError", (Exception,), {})("Error while sending or receiving"),
    ],
)
def test_whatever_the_death_of_java_breaks_first_it_is_told_as_the_end_of_the_session(error):
    assert str(job_error(error)).startswith("The Spark session ended while the job ran.")


def test_other_pythons_on_the_executors_are_named():
    # As Spark 4.3 says it; no second Python is sure to be installed here.
    error = Exception(
        "[PYTHON_VERSION_MISMATCH] Python in worker has different version: 3.12 than that in driver: 3.11, PySpark "
        "cannot run with different minor versions."
    )
    assert str(job_error(error)).startswith("Python 3.12 runs on the executors and 3.11 here. Give a Python")


SESSION_OF_A_USER = """
import logging
from pyspark.sql import SparkSession
from manyeyes.engines.registry import create_engine

logging.basicConfig(level=logging.INFO, format="%(message)s")
logging.getLogger("py4j").setLevel(logging.WARNING)
session = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
from manyeyes.engines import testing
import sys
engine = create_engine("spark", settings={"master": "local[7]", "executor_memory": "3g"})
tasks = [testing.ScriptedTask(sys.argv[1], f"task{i}", i) for i in range(3)]
print(engine.map(testing.run_scripted, tasks), engine.num_workers)
print([testing.count_attempts(task) for task in tasks])
tasks = [testing.ScriptedTask(sys.argv[1], f"killed{i}", i) for i in range(3)]
print(engine.map(testing.kill_scripted, tasks))
print(session.range(5).count())
"""


def test_the_session_of_the_user_is_used_and_left_running(tmp_path):
    # Spark tries a task of "local[2]" once; the contract's three attempts hold there too.
    done = subprocess.run(
        [sys.executable, "-c", SESSION_OF_A_USER, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYSPARK_PYTHON": sys.executable},
    )
    lines = ["['task0', 'task1', 'task2'] 2", "[1, 2, 3]", "['killed0', 'killed1', 'killed2']", "5"]
    assert done.stdout.splitlines() == lines, done.stderr
    assert "is used as it is; without effect: master, executor_memory" in done.stderr


def executors_of(application: str) -> list[int]:
    """The ids of the Java processes of an application's executors."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes()
            if b"CoarseGrainedExecutorBackend" in command and application.encode() in command:
                found.append(int(path.parent.name))
    return found


def folder_of_images(folder: Path) -> Path:
    """Twelve PNG files in two classes."""
    for index in range(12):
        path = folder / ("dark", "light")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((20, 24, 3), 60 + 100 * (index % 2) + index, np.uint8))
    return folder
