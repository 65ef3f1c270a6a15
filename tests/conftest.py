"""Shared by all tests: quiet TensorFlow, no silent skips in CI, long files first."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spark_classes

# The browser that tests of pages share: tests/browser.py.
pytest_plugins = ("browser",)

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# Most of what a short Spark session costs is Java compiling itself at its best: half of 12 s of CPU here.
os.environ.setdefault("SPARK_SUBMIT_OPTS", f"{spark_classes.QUICK} {spark_classes.options()}")
# A test run in the background starts with Ctrl-C ignored, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with many slow tests come first, so that the processes that share the files end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


# Whatever needs the `hadoop` fixture, whose start costs a minute: one process of a test run has it and runs them all.
ON_HADOOP = (
    "test_hadoop.py",
    "test_crossval_clusters.py",
    "test_diloco_clusters.py",
    "test_faults.py",
    "test_folder.py",
    "test_hdfs.py",
    "test_remote.py",
    "test_remote_journey.py",
    "test_remote_storage.py",
    "test_same_bytes.py",
    "storage/test_contract.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n 2`: the tests of a file run in one process, and so do all that use the Hadoop cluster."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFileAndCluster(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "hadoop" if file.endswith(ON_HADOOP) else file

    return ByFileAndCluster(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """With MANYEYES_REQUIRE_ALL=1 a test that skips for want of a component fails; only a GPU may be missing."""
    report = yield
    required = os.environ.get("MANYEYES_REQUIRE_ALL") == "1" and item.get_closest_marker("gpu") is None
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped ({reason}), but MANYEYES_REQUIRE_ALL=1 forbids it."
    return report


@pytest.fixture(scope="session")
def small_dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A raw dataset of 24 x 20 pixel images in three classes: mostly red, mostly green, mostly blue."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from manyeyes.data.manifest import Counts, Manifest, ShardInfo
    from manyeyes.imaging.preprocessing import Preprocessing

    uri = tmp_path_factory.mktemp("small") / "dataset"
    (uri / "shards").mkdir(parents=True)
    draw = np.random.default_rng(0)
    shards, written = [], {}
    for split, num_examples in (("train", 96), ("val", 45), ("test", 30)):
        labels = np.arange(num_examples, dtype=np.int32) % 3
        pixels = draw.integers(0, 120, (num_examples, 24, 20, 3), dtype=np.uint8)
        pixels[np.arange(num_examples), :, :, labels] += 100
        rows = {
            "image": [{"bytes": image.tobytes(), "path": f"{split}/{i}.png"} for i, image in enumerate(pixels)],
            "label": labels,
            "group": [None] * num_examples,
        }
        schema = pa.schema(
            [
                ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
                ("label", pa.int32()),
                ("group", pa.string()),
            ]
        )
        buffer = io.BytesIO()
        table = pa.Table.from_pydict(rows, schema=schema)
        pq.write_table(table, buffer, row_group_size=16, use_dictionary=False, write_page_checksum=True)
        content = buffer.getvalue()
        name = f"{split}-00000.parquet"
        (uri / "shards" / name).write_bytes(content)
        sizes = tuple(min(16, num_examples - start) for start in range(0, num_examples, 16))
        shards.append(ShardInfo(name, split, sizes, len(content), hashlib.sha256(content).hexdigest()))
        written[split] = np.bincount(labels, minlength=3).tolist()
    preprocessing = Preprocessing.for_size(24, 20)
    Manifest(
        class_names=("red", "green", "blue"),
        encoding="raw",
        preprocessing=preprocessing.to_dict(),
        preprocessing_fingerprint=preprocessing.fingerprint,
        image_shape=(24, 20, 3),
        num_seen=171,
        counts=Counts(written=written),
        shards=tuple(shards),
    ).save(str(uri))
    return str(uri)


@pytest.fixture(scope="session")
def small_run(small_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run of a tiny CNN on `small_dataset`, trained until it tells the classes apart."""
    import keras

    from manyeyes.data.dataset import Dataset
    from manyeyes.imaging.preprocessing import Preprocessing
    from manyeyes.models.registry import ModelConfig, build
    from manyeyes.training import checkpoint, weights
    from manyeyes.training.run import Run

    dataset = Dataset(small_dataset)
    row_groups = [rows for shard in dataset.split("train").shards for rows in dataset.rows(shard)]
    images = np.concatenate([rows.images for rows in row_groups])
    labels = np.concatenate([rows.labels for rows in row_groups])
    keras.utils.set_random_seed(1)
    config = ModelConfig("cnn", (24, 20, 3), 3, options={"width": 4, "stages": 2, "convolutions": 1})
    model = build(config)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(0.02), loss=loss)
    model.fit(images, labels, batch_size=16, epochs=15, verbose=0)
    uri = str(tmp_path_factory.mktemp("small") / "run")
    Run(
        uri=uri,
        class_names=dataset.class_names,
        model=config,
        preprocessing=dataset.preprocessing,
        extra_preprocessing=Preprocessing(),
        dataset=small_dataset,
        dataset_fingerprint=dataset.manifest.fingerprint,
        precision="float32",
        averages=False,
        settings={},
        versions={},
        command=(),
    ).save()
    state = checkpoint.TrainState(15, 0, 90, 1, "", dataset.manifest.fingerprint, finished=True)
    checkpoint.save(str(Path(uri) / checkpoint.CHECKPOINTS), state, {"model": weights.arrays_of(model.variables)})
    return uri


@pytest.fixture(scope="session")
def small_bundle(small_run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """`small_run`, exported in float32. Read it; to change it make a copy."""
    from manyeyes.training.export import export

    uri = str(tmp_path_factory.mktemp("small") / "bundle")
    export(small_run, uri)
    return uri


@dataclass(frozen=True)
class HadoopCluster:
    """A running scripts/hadoop-minicluster.

    Attributes:
        directory: its HADOOP_HOME, with pids/ and logs/.
        environment: what whoever uses it has to have in the environment.
        hdfs: the URI of its HDFS, e.g. hdfs://127.0.0.1:40123.
    """

    directory: Path
    environment: dict[str, str]
    hdfs: str


@pytest.fixture(scope="session")
def hadoop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HadoopCluster]:
    """A real HDFS and YARN on this machine; MANYEYES_HADOOP_CLUSTER=DIR names one that runs already."""
    running = os.environ.get("MANYEYES_HADOOP_CLUSTER")
    if running:
        yield _hadoop_in(Path(running))
        return
    for command in ("java", "mvn"):
        if shutil.which(command) is None:
            pytest.skip(f"{command} is not installed, which scripts/hadoop-minicluster needs")
    directory = tmp_path_factory.mktemp("hadoop")
    script = str(Path(__file__).parent.parent / "scripts" / "hadoop-minicluster")
    with stopped_at_the_end(script, directory):
        done = subprocess.run([script, "start", str(directory)], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.fail(done.stderr)
        yield _hadoop_in(directory)


@contextlib.contextmanager
def stopped_at_the_end(script: str, directory: Path) -> Iterator[None]:
    """Stop a cluster afterwards, also when this process is killed: Ctrl-C gives the processes of a test run 10 s."""
    # It reads from this process until there is nobody to read from.
    command = ["sh", "-c", 'cat; exec "$0" stop "$1"', script, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as stopper:
        yield
    assert stopper.returncode == 0


def _hadoop_in(directory: Path) -> HadoopCluster:
    import xml.etree.ElementTree

    properties = xml.etree.ElementTree.parse(directory / "conf" / "core-site.xml").iter("property")
    values = {entry.findtext("name"): entry.findtext("value") for entry in properties}
    environment = {"HADOOP_HOME": str(directory), "HADOOP_CONF_DIR": str(directory / "conf")}
    return HadoopCluster(directory, environment, values["fs.defaultFS"] or "")


@dataclass(frozen=True)
class S3Server:
    """A running server that speaks S3.

    Attributes:
        endpoint: its URL.
        environment: what whoever uses it has to have in the environment.
        bucket_uri: the URI of an empty bucket.
    """

    endpoint: str
    environment: dict[str, str]
    bucket_uri: str


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real server in a process of its own, with one bucket."""
    log = tmp_path_factory.mktemp("s3") / "server.log"
    with run_s3_server(log) as server:
        yield server


@pytest.fixture(scope="session")
def start_s3_server() -> Callable[..., contextlib.AbstractContextManager[S3Server]]:
    """For a test that needs a server of its own; takes the path of its log, and variables for it."""
    return run_s3_server


@contextlib.contextmanager
def run_s3_server(log: Path, environment: Mapping[str, str] | None = None) -> Iterator[S3Server]:
    """Start moto's server on a free port; `environment` is added to the server's own."""
    import boto3

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, **(environment or {})}) as process,
    ):
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        pytest.fail(f"moto's server did not start: {log.read_text()}")
                    time.sleep(0.05)
            endpoint = f"http://127.0.0.1:{port}"
            client = boto3.client(
                "s3",
                endpoint_url=endpoint,
                aws_access_key_id="key",
                aws_secret_access_key="secret",
                region_name="us-east-1",
            )
            client.create_bucket(Bucket="pictures")
            keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_ENDPOINT_URL": endpoint}
            yield S3Server(endpoint, keys, "s3://pictures")
        finally:
            process.terminate()


@dataclass(frozen=True)
class SparkCluster:
    """A running scripts/spark-standalone.

    Attributes:
        directory: with pids/, logs/ and work/.
        master: its URL, spark://127.0.0.1:PORT.
        page: the URL of the master's page, which also answers /json/.
    """

    directory: Path
    master: str
    page: str


@pytest.fixture(scope="session")
def spark_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkCluster]:
    """A real standalone cluster of Spark: a master and two workers, with room for three sessions of two cores."""
    pytest.importorskip("pyspark")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("java is not installed, which Spark needs")
    directory = tmp_path_factory.mktemp("spark")
    script = str(Path(__file__).parent.parent / "scripts" / "spark-standalone")
    environment = os.environ | {"SPARK_PYTHON": sys.executable, "JAVA_TOOL_OPTIONS": spark_classes.options()}
    with stopped_at_the_end(script, directory):
        done = subprocess.run(
            [script, "start", str(directory), "--cores", "3", "--memory", "2g"],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        if done.returncode:
            pytest.fail(done.stderr)
        master = done.stdout.strip().rpartition("=")[2]
        yield SparkCluster(directory, master, (directory / "page").read_text())
