"""Processes of a cluster are killed in the middle of an ingest, and the dataset is the one of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from manyeyes import storage
from manyeyes.data.manifest import Manifest
from patience import wait_until

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
NUM_IMAGES = 480
# A driver that says on standard output how far it is, so that a test knows when it is in the middle.
DRIVER = """
import json, logging, sys
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.registry import create_engine

def on_progress(phase, done, total):
    if phase == "write":
        print(done, flush=True)

def main():
    logging.basicConfig(level=logging.WARNING)
    logging.getLogger("manyeyes.engines").setLevel(logging.INFO)
    source, dataset, name, workers, settings = json.loads(sys.argv[1])
    engine = create_engine(name, workers, settings)
    ingest(source, dataset, settings=IngestSettings(size=(48, 64)), engine=engine, on_progress=on_progress)

if __name__ == "__main__":
    main()
"""


class Driver:
    """A running ingest in a process of its own."""

    def __init__(self, source, dataset, engine, workers=2, settings=None, **environment):
        request = json.dumps([source, dataset, engine, workers, settings or {}])
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, request],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
            start_new_session=True,
        )

    def wait_for_the_middle(self):
        """Return when some shards are written and others are not."""
        for line in self.process.stdout:
            if 0 < int(line) < NUM_IMAGES:
                return
        raise AssertionError(f"It ended before its middle:\n{self.process.stderr.read()[-4000:]}")

    def wait_for_the_end(self):
        """Return what it said to people meanwhile."""
        _, errors = self.process.communicate(timeout=400)
        assert self.process.returncode == 0, errors[-4000:]
        return errors

    def kill(self):
        self.process.kill()
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A table that names a few large photos, which take a while to decode, and some that are damaged."""
    folder = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(3)
    for index in range(5):
        shapes = draw.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        content = cv2.imencode(".jpg", cv2.resize(shapes, (2400, 1800), interpolation=cv2.INTER_CUBIC))[1].tobytes()
        (folder / f"{index}.jpg").write_bytes(content if index else content[:-5000])
    rows = "".join(f"{index % 5}.jpg,class {index % 3}\n" for index in range(NUM_IMAGES))
    (folder / "photos.csv").write_text(f"path,label\n{rows}")
    return str(folder / "photos.csv")


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    dataset = str(tmp_path_factory.mktemp("expected") / "dataset")
    Driver(source, dataset, "local").wait_for_the_end()
    return digests(dataset)


def digests(dataset):
    """The digest of each file of a dataset, whose counts balance."""
    manifest = Manifest.load(dataset)
    assert manifest.balances
    assert manifest.num_seen == NUM_IMAGES and manifest.counts.quarantined == {"truncated": NUM_IMAGES // 5}
    assert not storage.exists(storage.join(dataset, ".ingest"))
    files = {}
    for folder in ("", "shards", "quarantine"):
        uri = storage.join(dataset, folder) if folder else dataset
        for name in storage.list_files(uri):
            files[f"{folder}/{name}"] = hashlib.sha256(storage.read_bytes(storage.join(uri, name))).hexdigest()
    return files


def children_of(process_ids):
    """The ids of all living processes whose parent is one of `process_ids`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) in process_ids and state != "Z":
            found.append(int(path.parent.name))
    return found


def pids_in(directory, prefix):
    return [int(path.read_text()) for path in sorted((directory / "pids").glob(f"{prefix}*.pid"))]


def test_a_spark_executor_killed_in_mid_ingest_changes_nothing(source, expected, spark_cluster, tmp_path):
    dataset = str(tmp_path / "dataset")
    workers = pids_in(spark_cluster.directory, "worker")
    # Executors of an earlier session take their time to end.
    earlier = children_of(workers)
    driver = Driver(source, dataset, "spark", None, {"master": spark_cluster.master})
    driver.wait_for_the_middle()
    executors = [process_id for process_id in children_of(workers) if process_id not in earlier]
    assert len(executors) == 2
    os.kill(executors[0], signal.SIGKILL)
    assert "Spark lost executors" in driver.wait_for_the_end()
    assert digests(dataset) == expected


def task_processes(hadoop):
    """The ids of the Python processes of YARN containers that run tasks."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
            environment = (path.parent / "environ").read_bytes()
        except OSError:
            continue
        ours = f"HADOOP_CONF_DIR={hadoop.environment['HADOOP_CONF_DIR']}".encode()
        if b"manyeyes.engines.hadoop.task" in command and b"python" in command[0] and ours in environment:
            found.append(int(path.parent.name))
    return found


def test_a_yarn_container_killed_in_mid_ingest_changes_nothing(source, expected, hadoop, tmp_path):
    dataset = str(tmp_path / "dataset")
    driver = Driver(source, dataset, "hadoop", 2, **hadoop.environment)
    driver.wait_for_the_middle()
    wait_until(lambda: task_processes(hadoop), seconds=180)
    process_id = task_processes(hadoop)[0]
    # The container's Java process is the parent of the task.
    parent = int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(parent, signal.SIGKILL)
    os.kill(process_id, signal.SIGKILL)
    assert "YARN tries it again" in driver.wait_for_the_end()
    assert digests(dataset) == expected


@pytest.fixture
def small_hdfs(tmp_path):
    """A HDFS of two DataNodes that a test may break."""
    for command in ("java", "mvn"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed, which scripts/hadoop-minicluster needs")
    directory = tmp_path / "hdfs"
    script = str(SCRIPTS / "hadoop-minicluster")
    done = subprocess.run([script, "start", str(directory), "--no-yarn"], stdout=subprocess.PIPE, text=True, check=True)
    exports = dict(line.removeprefix("export ").split("=", 1) for line in done.stdout.splitlines())
    yield directory, exports
    subprocess.run([script, "stop", str(directory)], check=True)


def test_a_datanode_killed_in_mid_ingest_changes_nothing(source, expected, small_hdfs):
    directory, exports = small_hdfs
    dataset = f"{exports['MANYEYES_HDFS']}/dataset"
    driver = Driver(source, dataset, "local", **exports)
    driver.wait_for_the_middle()
    os.kill(pids_in(directory, "datanode")[0], signal.SIGKILL)
    # What is still to be written is written without it, and what it held is read from the other.
    assert len(list((directory / "data").glob("datanode-1/**/blk_*"))) > 0
    assert driver.process.poll() is None
    driver.wait_for_the_end()
    assert digests(dataset) == expected


@pytest.mark.parametrize("engine", ["spark", "hadoop"])  # of local ones tests/data/test_ingest_resume.py
def test_what_was_done_before_the_driver_was_killed_is_not_done_again(
    engine, source, expected, tmp_path, request, monkeypatch
):
    settings = {"master": request.getfixturevalue("spark_cluster").master} if engine == "spark" else {}
    if engine == "hadoop":
        for name, value in request.getfixturevalue("hadoop").environment.items():
            monkeypatch.setenv(name, value)
    dataset = tmp_path / "dataset"
    driver = Driver(source, str(dataset), engine, 2, settings)
    driver.wait_for_the_middle()
    driver.kill()
    if engine == "hadoop":
        wait_until(lambda: not task_processes(request.getfixturevalue("hadoop")), seconds=180)
    time.sleep(1)  # whoever still writes a shard, writes it now
    records = sorted((dataset / ".ingest").glob("*-*.json"))
    done = [path for record in records for path in dataset.glob(f"*/{record.stem}.parquet")]
    assert done
    before = {path: path.stat().st_mtime_ns for path in done}
    Driver(source, str(dataset), engine, 2, settings).wait_for_the_end()
    assert digests(str(dataset)) == expected
    assert {path: path.stat().st_mtime_ns for path in done} == before
