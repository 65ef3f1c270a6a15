"""HDFS: addresses as Hadoop reads them, the user, failover, and mistakes that are told in a line within seconds."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyeyes import storage
from manyeyes.errors import StorageError, UsageError

SECONDS = 20


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch):
    for name in ("HADOOP_CONF_DIR", "HADOOP_HOME", "HADOOP_USER_NAME", "HADOOP_PROXY_USER"):
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def within_seconds() -> Iterator[None]:
    started = time.monotonic()
    yield
    assert time.monotonic() - started < SECONDS


@pytest.fixture
def folder(hadoop, monkeypatch) -> Iterator[str]:
    """A path on the cluster; host and port go before it."""
    path = f"/storage-{uuid.uuid4().hex}"
    storage.write_bytes(f"{hadoop.hdfs}{path}/file", b"content")
    yield path
    monkeypatch.delenv("HADOOP_USER_NAME", raising=False)
    storage.remove(f"{hadoop.hdfs}{path}", recursive=True)


def address_of(hadoop) -> str:
    return hadoop.hdfs.removeprefix("hdfs://")


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def write_settings(directory: Path, name: str, values: dict[str, str]) -> None:
    properties = "".join(f"<property><name>{k}</name><value>\n {v}\n</value></property>" for k, v in values.items())
    (directory / name).write_text(f'<?xml version="1.0"?>\n<configuration>{properties}</configuration>')


def test_an_address_with_host_and_port_needs_no_settings(hadoop, folder):
    assert storage.read_bytes(f"{hadoop.hdfs}{folder}/file") == b"content"
    assert storage.read_bytes(f"{hadoop.hdfs}{folder}/file/") == b"content"
    assert storage.is_directory(hadoop.hdfs)
    assert storage.is_directory(f"{hadoop.hdfs}/")


def test_an_address_without_a_host_is_the_default_file_system(hadoop, folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HADOOP_CONF_DIR", hadoop.environment["HADOOP_CONF_DIR"])
    assert storage.read_bytes(f"hdfs://{folder}/file") == b"content"
    # Settings may stand below HADOOP_HOME, with blanks around values, and name one another.
    monkeypatch.delenv("HADOOP_CONF_DIR")
    monkeypatch.setenv("HADOOP_HOME", str(tmp_path))
    (tmp_path / "etc" / "hadoop").mkdir(parents=True)
    host, _, port = address_of(hadoop).partition(":")
    values = {"my.host": host, "fs.defaultFS": f"hdfs://${{my.host}}:{port}/"}
    write_settings(tmp_path / "etc" / "hadoop", "core-site.xml", values)
    assert storage.read_bytes(f"hdfs://{folder}/file") == b"content"


def test_without_a_default_file_system_it_says_what_to_write(monkeypatch, tmp_path):
    with pytest.raises(UsageError, match=r"^hdfs:/// stands for .* it is not set\. Write hdfs://HOST:PORT/"):
        storage.exists("hdfs:///folder")
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    write_settings(tmp_path, "core-site.xml", {"fs.defaultFS": "file:///"})
    with pytest.raises(UsageError, match=r"core-site\.xml says 'file:///'\. Write hdfs://HOST:PORT/"):
        storage.exists("hdfs:///folder")
    (tmp_path / "core-site.xml").write_text("<configuration>")
    with pytest.raises(UsageError, match=r"core-site\.xml can't be read: .* Mend HADOOP_CONF_DIR\."):
        storage.exists("hdfs:///folder")


def test_a_name_service_fails_over_to_the_namenode_that_lives(hadoop, folder, monkeypatch, tmp_path, silent_port):
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    for dead in (closed_port(), silent_port):
        values = {
            "dfs.nameservices": "MyCluster",
            "dfs.ha.namenodes.MyCluster": "nn1, nn2",
            "dfs.namenode.rpc-address.MyCluster.nn1": f"127.0.0.1:{dead}",
            "dfs.namenode.rpc-address.MyCluster.nn2": address_of(hadoop),
        }
        write_settings(tmp_path, "hdfs-site.xml", values)
        write_settings(tmp_path, "core-site.xml", {"fs.defaultFS": "hdfs://MyCluster"})
        for base in ("hdfs://MyCluster", "hdfs://"):
            with within_seconds():
                assert storage.read_bytes(f"{base}{folder}/file") == b"content"
                storage.write_bytes(f"{base}{folder}/other", b"more")
                assert storage.list_files(f"{base}{folder}") == ["file", "other"]


def test_a_name_service_of_which_no_namenode_lives_is_said_with_their_addresses(monkeypatch, tmp_path):
    monkeypatch.setenv("HADOOP_CONF_DIR", str(tmp_path))
    ports = closed_port(), closed_port()
    values = {
        "dfs.ha.namenodes.mine": "a,b",
        "dfs.namenode.rpc-address.mine.a": f"127.0.0.1:{ports[0]}",
        "dfs.namenode.rpc-address.mine.b": f"127.0.0.1:{ports[1]}",
    }
    write_settings(tmp_path, "hdfs-site.xml", values)
    expected = rf"^hdfs://mine can't be opened: no NameNode answers at 127\.0\.0\.1:{ports[0]} \(.*:{ports[1]} \(Conn"
    with within_seconds(), pytest.raises(ConnectionError, match=expected):
        storage.exists("hdfs://mine/x")
    del values["dfs.namenode.rpc-address.mine.b"]
    write_settings(tmp_path, "hdfs-site.xml", values)
    with pytest.raises(UsageError, match=r"no dfs\.namenode\.rpc-address\.mine\.b\. Add it to hdfs-site\.xml\."):
        storage.exists("hdfs://mine/x")


def test_a_wrong_address_is_said_within_seconds(silent_port):
    cases = [
        (f"hdfs://127.0.0.1:{closed_port()}", r"no NameNode answers at 127\.0\.0\.1:\d+ \(Connection refused\)"),
        (f"hdfs://127.0.0.1:{silent_port}", r"no NameNode answers at 127\.0\.0\.1:\d+ \(no answer within 5 s\)"),
        ("hdfs://no-such-host.invalid:8020", r"no NameNode answers at no-such-host\.invalid:8020 \("),
        ("hdfs://no-such-host.invalid", r"no NameNode answers at no-such-host\.invalid:8020 \("),
    ]
    for base, message in cases:
        for attempt in (storage.exists, storage.list_files, storage.read_bytes, storage.make_directory):
            with within_seconds(), pytest.raises(ConnectionError, match=message) as caught:
                attempt(f"{base}/folder")
            assert "\n" not in str(caught.value)


def test_an_address_that_can_not_be_right_is_a_usage_error(hadoop):
    with pytest.raises(UsageError, match=r"has the port 'x'\. Expected a number"):
        storage.exists("hdfs://host:x/folder")
    with pytest.raises(
        UsageError, match=r"names a user, which HDFS does not read there\. Set HADOOP_USER_NAME=alice\."
    ):
        storage.exists(f"hdfs://alice@{address_of(hadoop)}/folder")


def test_a_port_where_something_else_listens_is_said_within_seconds(s3):
    with within_seconds(), pytest.raises(ConnectionError, match=r"HDFS does not answer as it should: .* RPC port\."):
        storage.exists(s3.endpoint.replace("http", "hdfs") + "/folder")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with within_seconds(), pytest.raises(ConnectionError, match="has not answered as a NameNode within 10 s"):
            storage.exists(f"hdfs://127.0.0.1:{port}/folder")


def test_the_user_is_that_of_the_environment(hadoop, folder, monkeypatch):
    monkeypatch.setenv("HADOOP_USER_NAME", "mallory")
    uri = f"{hadoop.hdfs}{folder}/hers"
    with pytest.raises(
        StorageError, match=rf"^{uri} can't be written: Permission denied: user=mallory, .*\.$"
    ) as caught:
        storage.write_bytes(uri, b"content")
    assert "\n" not in str(caught.value)
    assert "aside" not in str(caught.value)
    for attempt in (storage.make_directory, lambda uri: storage.remove(uri.replace("hers", "file"))):
        with pytest.raises(PermissionError, match="user=mallory"):
            attempt(uri)
    assert storage.read_bytes(f"{hadoop.hdfs}{folder}/file") == b"content"


def test_a_directory_that_is_there_but_takes_no_files_is_found_out_before_the_work(hadoop, folder, monkeypatch):
    uri = f"{hadoop.hdfs}{folder}"
    storage.check_writable(uri)
    assert storage.list_files(uri) == ["file"]
    monkeypatch.setenv("HADOOP_USER_NAME", "mallory")
    with pytest.raises(UsageError, match=rf"^{uri} can't be written: Permission denied.*Choose another place\.$"):
        storage.check_writable(uri)


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_absent_one(hadoop, folder, monkeypatch):
    uri = f"{hadoop.hdfs}{folder}"
    fs, path = storage.filesystem(uri)
    fs.client.set_permission(path, 0o700)
    monkeypatch.setenv("HADOOP_USER_NAME", "mallory")
    for attempt in (
        storage.list_files,
        lambda uri: storage.exists(f"{uri}/file"),
        lambda uri: storage.is_directory(f"{uri}/x"),
    ):
        with pytest.raises(PermissionError) as caught:
            attempt(uri)
        assert caught.value.filename.startswith(uri)


def test_the_parts_of_a_file_aside_are_said_by_the_name_of_that_file(hadoop, folder, monkeypatch):
    monkeypatch.setenv("HADOOP_USER_NAME", "mallory")
    with pytest.raises(StorageError, match=rf"^{hadoop.hdfs}{folder}/p\.jsonl/part-0 can't be written: Permission"):
        storage.write_bytes(f"{hadoop.hdfs}{folder}/{storage.ASIDE_MARK}0123456789ab-p.jsonl/part-0", b"")


def test_a_full_quota_is_a_storage_error(hadoop, folder):
    uri = f"{hadoop.hdfs}{folder}"
    command = [f"{hadoop.directory}/bin/hdfs", "dfsadmin", "-setSpaceQuota", "1m", folder]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **hadoop.environment}, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    with pytest.raises(StorageError, match=rf"^{uri}/large can't be written: The DiskSpace quota of .* is exceeded"):
        storage.write_bytes(f"{uri}/large", bytes(2 << 20))
    assert storage.list_files(uri) == ["file"]


def test_a_name_that_hdfs_does_not_take_is_named(hadoop, folder):
    with pytest.raises(OSError, match="Invalid path name"):
        storage.write_bytes(f"{hadoop.hdfs}{folder}/a:b", b"content")


def test_the_command_line_says_it_in_one_line(tmp_path):
    uri = f"hdfs://127.0.0.1:{closed_port()}/photos"
    command = [str(Path(sys.executable).parent / "manyeyes"), "ingest", uri, str(tmp_path / "out")]
    with within_seconds():
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("manyeyes: error: hdfs://127.0.0.1:")
    assert "no NameNode answers" in done.stderr
    assert "Traceback" not in done.stderr
