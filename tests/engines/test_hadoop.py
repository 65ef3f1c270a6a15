"""The hadoop engine keeps the contract on a real YARN and HDFS, and what only it promises."""

from __future__ import annotations

import functools
import json
import logging
import operator
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
import xml.etree.ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manyeyes import storage
from manyeyes.engines.base import THREADS_VARIABLE, Engine
from manyeyes.engines.hadoop.installation import find_installation
from manyeyes.engines.hadoop.job import JobFolder
from manyeyes.engines.registry import create_engine
from manyeyes.engines.testing import (
    EngineContract,
    ScriptedTask,
    WorkerProcessContract,
    processes_of_session,
    rank_and_size,
    run_scripted,
    sleep_and_return,
    square,
    wait_until,
)
from manyeyes.errors import ConfigError, EngineError, TaskError, UsageError

# Ends the mapper's process, which is the parent of the worker's, which is the parent of this shell.
KILL_MAPPER = ["sh", "-c", "kill -9 $(ps -o ppid= -p $PPID)"]

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(hadoop: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The minicluster, where every engine and every driver finds it."""
    for name, value in hadoop.environment.items():
        monkeypatch.setenv(name, value)
    return hadoop


class TestHadoop(EngineContract, WorkerProcessContract):
    engine_name = "hadoop"
    patience_seconds = 180.0

    @pytest.fixture(autouse=True)
    def _on_the_cluster(self, cluster: Any) -> None:
        self.cluster = cluster

    def orphans(self, driver: subprocess.Popen[bytes]) -> list[object]:
        return [*processes_of_session(driver.pid), *running_jobs(), *task_processes(self.cluster)]


@pytest.fixture
def engine(cluster: Any) -> Iterator[Engine]:
    """An engine with two workers, whose folder is empty when the test ends."""
    work_dir = f"{cluster.hdfs}/tmp/test-{time.monotonic_ns()}"
    yield create_engine("hadoop", 2, {"work_dir": work_dir})
    assert not storage.exists(work_dir) or storage.filesystem(work_dir)[0].ls(work_dir) == []
    wait_until(lambda: not running_jobs() + task_processes(cluster), 120)  # it ends a moment after it says so
    assert running_jobs() + task_processes(cluster) == []


def test_failed_tasks_are_retried_by_yarn_and_people_are_told(engine, tmp_path, caplog):
    tasks = [ScriptedTask(str(tmp_path), f"task{i}", i) for i in range(2)]
    with caplog.at_level(logging.INFO, logger="manyeyes.engines"):
        assert engine.map(run_scripted, tasks) == ["task0", "task1"]
    said = "\n".join(caplog.messages)
    assert "Hadoop runs job_" in said
    assert "http://" in said
    assert re.search(r"_m_00000[01]_0 failed; YARN tries it again", said)
    assert "3 map containers, 1 failed, 0 killed" in said


def test_a_map_reduce_counts_each_task_once_also_when_some_fail(engine, tmp_path):
    tasks = [ScriptedTask(str(tmp_path), f"<{i}>", i % 4 == 1) for i in range(40)]
    reduced = engine.map_reduce(run_scripted, operator.add, tasks)
    assert sorted(reduced.split("<")[1:]) == sorted(f"{i}>" for i in range(40))


def test_a_reduce_that_fails_is_named(engine):
    with pytest.raises(TaskError, match=r"Reducing \(truediv\) failed 3 times: ZeroDivisionError"):
        engine.map_reduce(square, operator.truediv, [0, 0])


def test_what_a_task_prints_is_no_result(engine):
    assert engine.map_reduce(print, operator.is_, ["0\tsomething"] * 3) in (True, False)


def test_a_function_of_the_script_that_runs_is_refused(engine, monkeypatch):
    monkeypatch.setattr(square, "__module__", "__main__")
    with pytest.raises(EngineError, match=r"square can't be sent.*Move it to a module"):
        engine.map(square, [1])


def test_a_task_whose_containers_always_end_is_named(engine):
    # What was done before it in the same container was begun as often.
    commands = [["true"], ["true"], ["true"], KILL_MAPPER]
    with pytest.raises(TaskError, match=r"Task 3 \(run\) ended its worker 3 times \(last: its container was ended"):
        engine.map_reduce(subprocess.run, operator.is_, commands)


def test_a_job_that_people_end_blames_no_task(engine, tmp_path):
    def end_job() -> None:
        wait_until((tmp_path / "again").exists, 180)
        time.sleep(2)  # until the failure is known to the driver
        subprocess.run([*find_installation().kill, running_jobs()[0].replace("application", "job")], check=True)

    thread = threading.Thread(target=end_job)
    thread.start()
    # It fails once; its second attempt waits for the end.
    fail_once = f"cd {tmp_path}; mkdir failed && exit 1; touch again; exec sleep 300"
    commands = [["sh", "-c", fail_once], ["sleep", "300"]]
    with pytest.raises(EngineError, match=r"Hadoop ended job_\d+_\d+: .*[Kk]ill") as caught:
        engine.map(subprocess.check_call, commands)
    assert not isinstance(caught.value, TaskError)
    thread.join()


def test_only_the_user_can_read_what_goes_through_the_folder_of_a_job(cluster):
    work_dir = f"{cluster.hdfs}/tmp/test-{time.monotonic_ns()}"
    folder = JobFolder.new(work_dir, is_own=True)
    files, path = storage.filesystem(folder.uri)
    assert files.client.get_file_info(path).permission == 0o700
    files.client.set_owner(path.rpartition("/")[0], "mallory")
    with pytest.raises(UsageError, match=rf"{work_dir} is mallory's and not .*'s\. Name another folder"):
        JobFolder.new(work_dir, is_own=True)
    assert len(files.ls(path.rpartition("/")[0])) == 1
    storage.remove(work_dir, recursive=True)


def test_a_client_that_does_not_end_by_itself_is_ended_with_its_driver():
    command = [sys.executable, "-m", "manyeyes.engines.hadoop.supervisor"]
    supervisor = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    client = ["sh", "-c", "echo Running job: job_1_2; exec sleep 600"]
    for message in ({"folder": "memory://none", "kill": ["true"]}, {"command": client}):
        supervisor.stdin.write(json.dumps(message) + "\n")
        supervisor.stdin.flush()
    assert supervisor.stdout.readline() == "Running job: job_1_2\n"
    supervisor.communicate(timeout=60)
    assert supervisor.returncode == 0


def test_a_python_that_the_nodes_lack_is_named(engine):
    settings = {"python": "/nowhere/python"}
    with pytest.raises(
        EngineError, match=r"The nodes have no /nowhere/python\. Name their Python by the setting python"
    ):
        create_engine("hadoop", 1, settings).map(abs, [-1])


def test_a_yarn_that_does_not_run_is_said_within_seconds(cluster, tmp_path, monkeypatch):
    conf = shutil.copytree(cluster.environment["HADOOP_CONF_DIR"], tmp_path / "conf")
    yarn_site = conf / "yarn-site.xml"
    name = "<name>yarn.resourcemanager.address</name><value>"
    yarn_site.write_text(re.sub(rf"{name}[^<]*", f"{name}127.0.0.1:9", yarn_site.read_text()))
    monkeypatch.setenv("HADOOP_CONF_DIR", str(conf))
    with pytest.raises(
        EngineError, match=r"No ResourceManager of YARN answers \(127\.0\.0\.1:9: .*Check that YARN runs"
    ):
        create_engine("hadoop", 1).map(abs, [-1])


def test_a_work_dir_that_the_tasks_can_not_reach_is_refused(cluster, tmp_path):
    with pytest.raises(UsageError, match=r"work_dir is .*; expected a folder on HDFS"):
        create_engine("hadoop", 1, {"work_dir": str(tmp_path)}).map(abs, [-1])
    work_dir = f"{cluster.hdfs}/tmp/with a blank {time.monotonic_ns()}"
    assert create_engine("hadoop", 1, {"work_dir": work_dir}).map(abs, [-1]) == [1]
    storage.remove(work_dir, recursive=True)


def test_nothing_but_the_folder_of_the_job_is_on_a_command_line(engine):
    secret, seen, over = "a-secret-that-is-in-an-item", [], threading.Event()

    def watch() -> None:
        while not over.is_set():
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    text = path.read_bytes()
                except OSError:  # it ended while we looked
                    continue
                seen.append("hadoop.task" if b"manyeyes.engines.hadoop.task" in text else "")
                assert secret.encode() not in text
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert engine.map(functools.partial(operator.add, secret), [secret]) == [secret * 2]
    over.set()
    watcher.join()
    assert "hadoop.task" in seen


def test_an_error_in_on_result_ends_the_job(engine):
    def on_result(index: int, result: float) -> None:
        raise RuntimeError("the driver went wrong")

    with pytest.raises(RuntimeError, match="the driver went wrong"):
        engine.map(sleep_and_return, [0.0, *[60.0] * 5], on_result=on_result)


def test_a_shipped_environment_runs_on_nodes_without_packages(cluster, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    settings = {
        "python": str(tmp_path / "bare/bin/python"),
        "work_dir": f"{cluster.hdfs}/tmp/test-{time.monotonic_ns()}",
    }
    with pytest.raises(EngineError, match=r"Hadoop ended job_.*add --ship-env"):
        create_engine("hadoop", 1, settings).map(abs, [-1])
    shipping = settings | {"ship_env": True, "ship_extras": ["hdfs"]}
    (where,) = create_engine("hadoop", 1, shipping).map(eval, ["__import__('manyeyes').__file__"])
    assert "/manyeyes-environment/" in where
    assert len(storage.list_files(f"{settings['work_dir']}/environments")) == 1
    storage.remove(settings["work_dir"], recursive=True)


def test_tasks_know_their_number_of_threads_and_the_variables_that_a_setting_names(cluster, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    monkeypatch.setenv("MY_OTHER", "not for tasks")
    engine = create_engine("hadoop", 1, {"num_threads": 2, "pass_environment": ["MY_K*"]})
    assert engine.map(os.getenv, [THREADS_VARIABLE, "MY_KEY", "MY_OTHER"]) == ["2", "secret", None]


def test_without_a_number_of_workers_the_cluster_is_filled(cluster):
    # Two NodeManagers of 2 GiB, and containers of 512 MiB: 8, of which one is the application master's.
    assert create_engine("hadoop").num_workers == 7
    assert create_engine("hadoop", None, {"map_memory_mb": 1024}).num_workers == 3


def test_what_hadoop_refuses_is_said_in_its_words(cluster):
    settings = {"properties": {"mapreduce.framework.name": "nonsense"}}
    with pytest.raises(EngineError, match=r"Hadoop took no job: .*mapreduce\.framework\.name"):
        create_engine("hadoop", 1, settings).map(square, [1])
    with pytest.raises(EngineError, match=r"Hadoop ended job_.*(capability|resource request).*yarn logs"):
        create_engine("hadoop", 1, {"map_memory_mb": 1 << 20}).map(square, [1])


def test_a_gang_is_refused_with_a_way_out(cluster):
    with pytest.raises(UsageError, match=r"gang of 2 workers.*--engine spark.*--engine local"):
        create_engine("hadoop", 2).gang(rank_and_size, 2)


def test_a_missing_hadoop_is_said_with_what_mends_it(monkeypatch, tmp_path):
    monkeypatch.delenv("HADOOP_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"no command hadoop on the PATH.*HADOOP_HOME.*hadoop=/path/to/bin/hadoop"):
        create_engine("hadoop")
    monkeypatch.setenv("HADOOP_HOME", str(tmp_path))
    with pytest.raises(UsageError, match=rf"no command {tmp_path}/bin/hadoop \(of HADOOP_HOME\)"):
        create_engine("hadoop")


def test_a_missing_jar_and_settings_that_name_no_hdfs_are_said_with_what_mends_them(monkeypatch, tmp_path):
    command = tmp_path / "bin" / "hadoop"
    command.parent.mkdir()
    command.write_text("#!/bin/sh\n")
    command.chmod(0o755)
    monkeypatch.setenv("HADOOP_HOME", str(tmp_path))
    monkeypatch.delenv("HADOOP_CONF_DIR", raising=False)
    with pytest.raises(UsageError, match=f"no hadoop-streaming-.*jar is under {tmp_path}.*streaming_jar="):
        create_engine("hadoop")
    with pytest.raises(UsageError, match=r"There is no file streaming_jar=nowhere\.jar"):
        create_engine("hadoop", None, {"streaming_jar": "nowhere.jar"})
    jar = tmp_path / "share/hadoop/tools/lib/hadoop-streaming-3.4.2.jar"
    jar.parent.mkdir(parents=True)
    jar.touch()
    with pytest.raises(UsageError, match=r"fs\.defaultFS is not set.*HADOOP_CONF_DIR.*work_dir="):
        create_engine("hadoop")
    (tmp_path / "etc/hadoop").mkdir(parents=True)
    core_site = tmp_path / "etc/hadoop/core-site.xml"
    root = xml.etree.ElementTree.Element("configuration")
    entry = xml.etree.ElementTree.SubElement(root, "property")
    xml.etree.ElementTree.SubElement(entry, "name").text = "fs.defaultFS"
    xml.etree.ElementTree.SubElement(entry, "value").text = "hdfs://cluster"
    xml.etree.ElementTree.ElementTree(root).write(core_site)
    assert create_engine("hadoop").num_workers == 4  # a guess
    core_site.write_text("no xml")
    with pytest.raises(UsageError, match=r"core-site\.xml can't be read"):
        create_engine("hadoop")


def test_an_unknown_setting_is_refused():
    with pytest.raises(ConfigError, match=r"Unknown setting queu\. Did you mean queue\?"):
        create_engine("hadoop", 1, {"queu": "default"})
    with pytest.raises(ConfigError, match="num_threads=0 is below 1"):
        create_engine("hadoop", 1, {"num_threads": 0})


def test_java_of_the_minicluster_starts_with_archived_classes(cluster):
    # Another process of this test run may be making the archive.
    archive = Path((cluster.directory / "conf" / "archive.args").read_text().split('"')[1].partition("=")[2])
    wait_until(archive.exists, 180)
    options = [f"@{cluster.directory}/conf/{name}.args" for name in ("archive", "class-path")]
    # Java refuses where it would otherwise do without: with other jars, or a class path in another order.
    command = ["java", *options, "-Xshare:on", "org.apache.hadoop.util.VersionInfo"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.startswith("Hadoop 3.")


def running_jobs() -> list[Any]:
    """The applications that YARN runs."""
    address = find_installation().properties["yarn.resourcemanager.webapp.address"]
    with urllib.request.urlopen(f"http://{address}/ws/v1/cluster/apps?states=ACCEPTED,RUNNING") as answer:
        return [app["id"] for app in ((json.load(answer)["apps"] or {}).get("app") or [])]


def task_processes(cluster: Any) -> list[Any]:
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
