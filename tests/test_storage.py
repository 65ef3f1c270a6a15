"""Files appear whole or not at all, on disk and in memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyeyes import storage
from manyeyes.errors import StorageError, UsageError


@pytest.fixture(params=["path", "file", "memory"])
def directory(request, tmp_path):
    if request.param == "memory":
        uri = f"memory://{uuid.uuid4().hex}"
        yield uri
        storage.remove(uri, recursive=True)
    else:
        yield str(tmp_path) if request.param == "path" else f"file://{tmp_path}"


def everything_under(uri: str) -> list[str]:
    fs, path = storage.filesystem(uri)
    return sorted(fs.find(path)) if fs.exists(path) else []


def test_a_published_file_is_whole_and_alone(directory):
    uri = storage.join(directory, "deep", "er", "file.bin")
    with storage.publish(uri) as file:
        file.write(b"first ")
        assert not storage.exists(uri)
        assert storage.list_files(storage.join(directory, "deep", "er")) == []
        file.write(b"second")
    assert storage.read_bytes(uri) == b"first second"
    assert storage.read_bytes(uri, 6, 9) == b"sec"
    assert storage.size_bytes(uri) == 12
    assert len(everything_under(directory)) == 1


def test_a_failed_publish_leaves_the_old_content_and_nothing_else(directory):
    uri = storage.join(directory, "file.bin")
    storage.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError, match="in the middle"), storage.publish(uri) as file:
        file.write(b"half of the new")
        raise RuntimeError("in the middle")
    assert storage.read_bytes(uri) == b"old"
    assert len(everything_under(directory)) == 1


def test_publishing_again_replaces_the_content(directory):
    uri = storage.join(directory, "file.json")
    storage.write_json(uri, {"b": 1, "a": "ä"})
    storage.write_json(uri, {"b": 2})
    assert storage.read_json(uri) == {"b": 2}
    assert storage.list_files(directory, ".json") == ["file.json"]
    assert storage.list_files(directory, ".txt") == []


def test_a_driver_killed_while_it_publishes_leaves_nothing_visible(tmp_path):
    target = tmp_path / "out" / "file.bin"
    code = (
        "import sys, time\nfrom manyeyes import storage\n"
        "with storage.publish(sys.argv[1]) as file:\n"
        "    file.write(b'x' * 1000000)\n    file.flush()\n    print('written', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"written\n"
        os.kill(writer.pid, signal.SIGKILL)
    assert not target.exists()
    assert storage.list_files(target.parent) == []
    storage.write_bytes(target, b"afterwards")
    assert target.read_bytes() == b"afterwards"


def publish_often(uri: str, letter: str) -> None:
    for _ in range(50):
        storage.write_bytes(uri, letter.encode() * 100_000)


def test_concurrent_publishers_of_one_file_never_mix(tmp_path):
    uri = str(tmp_path / "file.bin")
    storage.write_bytes(uri, b"0" * 100_000)
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=publish_often, args=(uri, letter)) for letter in "ab"]
    for writer in writers:
        writer.start()
    seen = set()
    while any(writer.is_alive() for writer in writers):
        content = Path(uri).read_bytes()
        assert len(content) == 100_000
        assert len(set(content)) == 1
        seen.add(content[:1])
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {b"0", b"a", b"b"}
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_remove_and_rename_work_on_files_and_directories(directory):
    storage.write_bytes(storage.join(directory, "one", "a"), b"1")
    storage.rename(storage.join(directory, "one"), storage.join(directory, "two"))
    assert storage.read_bytes(storage.join(directory, "two", "a")) == b"1"
    assert not storage.exists(storage.join(directory, "one", "a"))
    storage.write_bytes(storage.join(directory, "b"), b"2")
    storage.write_bytes(storage.join(directory, "c"), b"3")
    storage.rename(storage.join(directory, "b"), storage.join(directory, "c"))
    assert storage.read_bytes(storage.join(directory, "c")) == b"2"
    storage.remove(storage.join(directory, "c"))
    storage.remove(storage.join(directory, "c"))
    storage.remove(storage.join(directory, "two"), recursive=True)
    assert everything_under(directory) == []


def test_listing_a_directory_that_is_not_there_gives_nothing(directory):
    assert storage.list_files(storage.join(directory, "nowhere")) == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(directory, "nowhere", "file"))


def test_an_unknown_protocol_is_a_usage_error():
    with pytest.raises(UsageError, match="nonsense://x can't be opened"):
        storage.exists("nonsense://x")


@pytest.mark.parametrize(
    ("uri", "library", "message"),
    [
        ("s3://bucket/x", "s3fs", r"^s3://bucket/x needs an optional part .* pip install 'manyeyes\[s3\]'$"),
        ("hdfs://127.0.0.1:{port}/x", "hdfs_native", r"^hdfs://.* needs an optional part .* 'manyeyes\[hdfs\]'$"),
        ("gs://bucket/x", "gcsfs", r"^gs://bucket/x can't be opened: .*gcsfs"),
    ],
)
def test_a_protocol_whose_library_is_missing_says_in_one_line_what_it_needs(monkeypatch, uri, library, message):
    monkeypatch.setitem(sys.modules, library, None)
    for module in ("s3", "hdfs"):
        monkeypatch.delitem(sys.modules, f"manyeyes.storage.{module}", raising=False)
        monkeypatch.delattr(storage, module, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(UsageError, match=message):
        storage.exists(uri.format(port=server.getsockname()[1]))


def test_is_local_knows_paths_from_uris():
    assert storage.is_local("a/b")
    assert storage.is_local(Path("/a/b"))
    assert storage.is_local("file:///a/b")
    assert not storage.is_local("memory://a")
    assert not storage.is_local("hdfs://host:9000/a")


def test_a_directory_and_a_name_make_a_uri_and_its_parts_are_those():
    for parent in ("/a/b", "/", "hdfs:///", "hdfs:///a", "hdfs://host:9000", "s3://bucket", "file:///"):
        assert storage.split(storage.join(parent, "x y#.csv")) == (parent, "x y#.csv")
    assert storage.split("x.csv") == ("", "x.csv")


def test_the_root_of_a_file_system_stays_its_root():
    assert storage.absolute("hdfs:///") == storage.absolute("hdfs://") == "hdfs:///"
    assert storage.absolute("hdfs://host:9000/") == "hdfs://host:9000"
    assert storage.absolute("hdfs:///a/") == "hdfs:///a"
    assert storage.absolute("file:///") == storage.absolute("/") == "/"


@pytest.mark.parametrize("uri", ["hdfs:/photos", "s3:/bucket", "s3:bucket"])
def test_a_uri_that_lacks_a_slash_is_not_taken_for_a_folder_of_this_machine(uri, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for attempt in (storage.absolute, storage.exists, lambda uri: storage.write_bytes(f"{uri}/x", b"")):
        with pytest.raises(UsageError, match=rf"^{uri}.* has no // after "):
            attempt(uri)
    assert list(tmp_path.iterdir()) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children) | st.dictionaries(st.text(), children),
    max_leaves=10,
)


@given(json_values)
def test_canonical_json_says_the_same_and_does_not_depend_on_the_order_of_keys(content):
    def reverse_keys(value):
        if isinstance(value, dict):
            return {key: reverse_keys(value[key]) for key in reversed(value)}
        return [reverse_keys(item) for item in value] if isinstance(value, list) else value

    encoded = storage.canonical_json(content)
    assert json.loads(encoded) == content
    assert storage.canonical_json(reverse_keys(content)) == encoded


def test_the_checksum_is_that_of_the_bytes(directory):
    uri = storage.join(directory, "file")
    storage.write_bytes(uri, b"abc")
    assert storage.sha256_of_file(uri) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_place_that_takes_no_file_is_named_in_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"in the way")
    with pytest.raises(StorageError, match=r"file/below/x\.bin can't be written: Not a directory") as caught:
        storage.write_bytes(tmp_path / "file" / "below" / "x.bin", b"content")
    assert caught.value.exit_code == 1
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="folder can't be written: Is a directory"):
        storage.write_bytes(tmp_path / "folder", b"content")
    storage.remove(tmp_path / "file" / "below")  # there is nothing, so nothing is to be done
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path):
    script = (
        "import resource, signal, sys; from manyeyes import storage\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "storage.write_bytes(sys.argv[1], bytes(2000))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "x.bin"], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1].startswith(f"manyeyes.errors.StorageError: {tmp_path}/x.bin can't be written: ")
    assert list(tmp_path.iterdir()) == []


def test_what_the_caller_fails_to_read_while_it_publishes_stays_what_it_was(tmp_path):
    with pytest.raises(FileNotFoundError), storage.publish(tmp_path / "x.bin") as file:
        file.write((tmp_path / "source" / "none.bin").read_bytes())
