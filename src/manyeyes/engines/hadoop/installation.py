"""Finds Hadoop on this machine: its commands, its streaming jar, its settings, and how much the cluster can run."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manyeyes.errors import EngineError, UsageError
from manyeyes.storage.hadoop_settings import read_settings
from manyeyes.storage.remote import why_unreachable

# Under HADOOP_HOME, and where distributions that split Hadoop into packages put it.
_STREAMING_JARS = (
    "share/hadoop/tools/lib/hadoop-streaming-*.jar",
    "hadoop-streaming*.jar",
    "../hadoop-mapreduce/hadoop-streaming*.jar",
    "../hadoop-mapreduce-client/hadoop-streaming*.jar",
)
_CONF_DIRECTORIES = ("etc/hadoop", "conf")
_FILES = ("core-site.xml", "yarn-site.xml", "mapred-site.xml")
# Hadoop's own default for a map task.
_DEFAULT_MEMORY_MB = 1024
# Where nothing tells how much the cluster can run.
_GUESSED_NUM_WORKERS = 4


@dataclass(frozen=True)
class Installation:
    """A Hadoop client.

    Attributes:
        hadoop: the command that submits jobs.
        kill: the start of a command that ends a job; its last word is the job's id.
        streaming_jar: the path of Hadoop Streaming.
        properties: those of its core-site.xml, yarn-site.xml and mapred-site.xml, as far as they are known here.
        environment: what its commands need in the environment besides what is there.
    """

    hadoop: str
    kill: tuple[str, ...]
    streaming_jar: str
    properties: Mapping[str, str]
    environment: Mapping[str, str]

    def default_work_dir(self) -> str:
        """A folder of this user on the cluster's default file system.

        Raises:
            UsageError: the cluster's settings name none.
        """
        default_fs = self.properties.get("fs.defaultFS", "")
        if not default_fs.startswith(("hdfs://", "viewfs://")):
            raise UsageError(
                f"The hadoop engine needs a folder on HDFS for its jobs; fs.defaultFS is {default_fs or 'not set'}. "
                "Set HADOOP_CONF_DIR to the cluster's settings, or --engine-set work_dir=hdfs://NAMENODE:PORT/FOLDER."
            )
        return f"{default_fs.rstrip('/')}/tmp/manyeyes-{os.environ.get('HADOOP_USER_NAME') or getpass.getuser()}"

    def num_containers(self, memory_mb: int | None, num_cores: int) -> int:
        """How many map tasks of this size the whole cluster holds, beside one application master; a guess if unknown.

        Args:
            memory_mb: of one map task, in MiB; None for what the cluster's settings say.
            num_cores: of one map task.
        """
        size = memory_mb or int(self.properties.get("mapreduce.map.memory.mb", _DEFAULT_MEMORY_MB))
        for address in self._resource_manager_addresses("webapp.address", 8088):
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            try:
                with opener.open(f"http://{address}/ws/v1/cluster/metrics", timeout=5) as answer:
                    metrics = json.load(answer)["clusterMetrics"]
            except (OSError, ValueError, KeyError):
                continue
            of_memory = metrics["totalMB"] // size - 1
            return int(max(1, min(of_memory, metrics["totalVirtualCores"] // num_cores - 1)))
        return _GUESSED_NUM_WORKERS

    def check_resource_manager(self) -> None:
        """Find out in seconds that no ResourceManager listens; Hadoop's client would try for a quarter of an hour.

        Raises:
            EngineError: none of those that the settings name takes a connection.
        """
        problems = []
        for address in self._resource_manager_addresses("address", 8032):
            host, _, port = address.rpartition(":")
            reason = why_unreachable(host, int(port)) if port.isdecimal() else "it has no port"
            if reason is None:
                return
            problems.append(f"{address}: {reason}")
        if problems:
            raise EngineError(
                f"No ResourceManager of YARN answers ({'; '.join(problems)}). Check that YARN runs, and the "
                f"yarn-site.xml in {self.environment['HADOOP_CONF_DIR']}."
            )

    def _resource_manager_addresses(self, kind: str, port: int) -> list[str]:
        """The addresses of one kind of all ResourceManagers, as far as the settings name them."""
        identities = self.properties.get("yarn.resourcemanager.ha.rm-ids", "")
        addresses = []
        for suffix in [f".{name.strip()}" for name in identities.split(",") if name.strip()] or [""]:
            host = self.properties.get(f"yarn.resourcemanager.hostname{suffix}")
            address = self.properties.get(f"yarn.resourcemanager.{kind}{suffix}") or (host and f"{host}:{port}")
            if address and "$" not in address:
                addresses.append(address)
        return addresses


def find_installation(hadoop: str | None = None, streaming_jar: str | None = None) -> Installation:
    """Find Hadoop by its settings, else by HADOOP_HOME and HADOOP_CONF_DIR, else on the PATH.

    Args:
        hadoop: the `hadoop` command.
        streaming_jar: the path of hadoop-streaming-*.jar.

    Raises:
        UsageError: there is no command or no jar; says which setting or variable names it.
    """
    home = os.environ.get("HADOOP_HOME")
    command = shutil.which(hadoop or (f"{home}/bin/hadoop" if home else "hadoop"))
    if command is None:
        where = hadoop or (f"{home}/bin/hadoop (of HADOOP_HOME)" if home else "hadoop on the PATH")
        raise UsageError(
            f"The hadoop engine needs Hadoop's client, and there is no command {where}. "
            "Set HADOOP_HOME to a Hadoop installation, or --engine-set hadoop=/path/to/bin/hadoop."
        )
    base = Path(home) if home and hadoop is None else Path(command).resolve().parent.parent
    if streaming_jar is None:
        jars = [path for pattern in _STREAMING_JARS for path in sorted(base.glob(pattern))]
        if not jars:
            raise UsageError(
                f"The hadoop engine needs Hadoop Streaming, and no hadoop-streaming-*.jar is under {base}. "
                "Name it: --engine-set streaming_jar=/path/to/hadoop-streaming-VERSION.jar."
            )
        streaming_jar = str(jars[0])
    elif not Path(streaming_jar).is_file():
        raise UsageError(f"There is no file streaming_jar={streaming_jar}. Give the path of hadoop-streaming-*.jar.")
    conf = _conf_directory(base)
    # Beside the command as it was given: a distribution's /usr/bin/hadoop is a link to where no `mapred` may be.
    mapred = Path(command).with_name("mapred")
    return Installation(
        hadoop=command,
        kill=(str(mapred), "job", "-kill") if mapred.exists() else (command, "job", "-kill"),
        streaming_jar=streaming_jar,
        properties=read_settings(str(conf), _FILES) if conf else {},
        environment={"HADOOP_CONF_DIR": str(conf)} if conf else {},
    )


def _conf_directory(base: Path) -> Path | None:
    named = os.environ.get("HADOOP_CONF_DIR")
    candidates = [Path(named)] if named else [*(base / name for name in _CONF_DIRECTORIES), Path("/etc/hadoop/conf")]
    return next((path for path in candidates if (path / "core-site.xml").is_file()), None)
