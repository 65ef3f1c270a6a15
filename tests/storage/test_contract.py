"""What storage promises, on every kind of file system that it has."""

from __future__ import annotations

import errno
import functools
import hashlib
import subprocess
import sys
import threading
import time
import uuid

import pytest

from manyeyes import storage
from manyeyes.errors import StorageError

# What file systems, URIs and patterns give a meaning; and letters that sort differently by signed bytes.
NASTY_NAMES = [
    "a b.jpg",
    "a!.jpg",
    "a#b?c=d",
    "a%20b+c",
    "a&b;c",
    "a[1]*.jpg",
    "a{1,2}",
    "a.b.jpg",
    "aä.jpg",
    "az.jpg",
    "ä.jpg",
    "𝄞.jpg",
    "\uffee.jpg",
    "Z.jpg",
    "zz",
]
# Folders whose names begin one another, beside files that sort between them.
NASTY_FOLDERS = ["a", "a.b", "aa", "a!", "ä", "b"]


@pytest.fixture(params=["local", "memory", "hdfs", "s3"])
def directory(request, tmp_path, monkeypatch):
    if request.param == "local":
        yield str(tmp_path)
        return
    if request.param == "memory":
        uri = f"memory://{uuid.uuid4().hex}"
    else:
        server = request.getfixturevalue("hadoop" if request.param == "hdfs" else "s3")
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        uri = storage.join(
            server.hdfs if request.param == "hdfs" else server.bucket_uri, f"contract-{uuid.uuid4().hex}"
        )
    yield uri
    storage.remove(uri, recursive=True)


def everything_under(uri: str) -> list[str]:
    """The paths of all files below `uri`, in the order in which a walk gives them."""

    def walk(at: str, prefix: str) -> list[str]:
        found = []
        for item in storage.iterate_directory(at):
            below = storage.join(at, item.name)
            found += walk(below, f"{prefix}{item.name}/") if item.is_directory else [prefix + item.name]
        return found

    return walk(uri, "") if storage.exists(uri) else []


def test_a_published_file_is_whole_and_alone(directory):
    uri = storage.join(directory, "deep", "er", "file.bin")
    with storage.publish(uri) as file:
        file.write(b"first ")
        assert not storage.exists(uri)
        assert storage.list_files(storage.join(directory, "deep", "er")) == []
        file.write(bytearray(b"second"))
    assert storage.read_bytes(uri) == b"first second"
    assert storage.size_bytes(uri) == 12
    assert everything_under(directory) == ["deep/er/file.bin"]


def test_a_failed_publish_leaves_the_old_content_and_nothing_else(directory):
    uri = storage.join(directory, "file.bin")
    storage.write_bytes(uri, b"old")
    with pytest.raises(RuntimeError, match="in the middle"), storage.publish(uri) as file:
        file.write(b"half of the new" * 1_000_000)
        raise RuntimeError("in the middle")
    assert storage.read_bytes(uri) == b"old"
    assert everything_under(directory) == ["file.bin"]


def test_an_error_of_what_the_caller_reads_while_it_publishes_stays_what_it_was(directory):
    with pytest.raises(FileNotFoundError), storage.publish(storage.join(directory, "x")) as file:
        file.write(storage.read_bytes(storage.join(directory, "none")))
    assert everything_under(directory) == []


def answered(call):
    """What a call returns. The tests' S3 server now and then answers 500 to two writers of one key: then once more."""
    for _ in range(100):
        try:
            return call()
        except OSError as error:
            if error.errno != errno.EREMOTEIO:
                raise
    return call()


def test_a_reader_sees_the_old_or_the_new_and_never_nothing_or_a_half(directory):
    uri = storage.join(directory, "file.bin")
    contents = [letter * 300_000 for letter in (b"a", b"b")]
    storage.write_bytes(uri, contents[0])
    stop = threading.Event()
    problems = []

    def write() -> None:
        try:
            number = 0
            while not stop.is_set():
                number += 1
                answered(functools.partial(storage.write_bytes, uri, contents[number % 2]))
        except BaseException as error:
            problems.append(error)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        seen = set()
        until = time.monotonic() + 3
        while time.monotonic() < until or (len(seen) < 2 and not problems):
            assert answered(lambda: storage.exists(uri))
            content = answered(lambda: storage.read_bytes(uri))
            assert content in contents
            seen.add(content[:1])
            assert answered(lambda: storage.list_files(directory)) == ["file.bin"]
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert not problems
    assert seen == {b"a", b"b"}
    assert everything_under(directory) == ["file.bin"]


def test_a_writer_that_is_killed_leaves_nothing_that_is_seen(directory):
    if directory.startswith("memory"):
        return  # it dies with the writer
    uri = storage.join(directory, "file.bin")
    code = (
        "import sys, time\nfrom manyeyes import storage\n"
        "with storage.publish(sys.argv[1]) as file:\n"
        "    file.write(b'x' * 3_000_000)\n    file.flush()\n    print('written', flush=True)\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, uri], stdout=subprocess.PIPE) as writer:
        assert writer.stdout.readline() == b"written\n"
        writer.kill()
    assert not storage.exists(uri)
    assert storage.list_files(directory) == []
    storage.write_bytes(uri, b"afterwards")
    assert storage.list_files(directory) == ["file.bin"]


def test_ranges_are_those_of_the_bytes(directory):
    uri = storage.join(directory, "file.bin")
    content = bytes(range(256)) * 10
    storage.write_bytes(uri, content)
    for start, end in [(0, 10), (5, 5), (None, 7), (2550, None), (2550, 9999), (2560, 2570), (9999, 10_000)]:
        assert storage.read_bytes(uri, start, end) == content[start:end]
    for opened in (storage.open_read(uri), storage.open_ranges(uri)):
        with opened as file:
            file.seek(-10, 2)
            assert (file.tell(), file.read(4), file.read(), file.read(1)) == (
                2550,
                content[2550:2554],
                content[2554:],
                b"",
            )
            file.seek(300)
            file.seek(5, 1)
            assert file.read(3) == content[305:308]


def test_a_text_file_is_read_line_by_line(directory):
    uri = storage.join(directory, "lines.txt")
    lines = [f"line {i}\n".encode() for i in range(100_000)]
    storage.write_bytes(uri, b"".join(lines))
    with storage.open_read(uri) as file:
        assert list(file) == lines


def test_empty_files_are_files(directory):
    uri = storage.join(directory, "empty")
    storage.write_bytes(uri, b"")
    assert storage.exists(uri)
    assert not storage.is_directory(uri)
    assert storage.size_bytes(uri) == 0
    assert storage.read_bytes(uri) == storage.read_bytes(uri, 0, 10) == b""
    assert storage.list_files(directory) == ["empty"]
    with storage.open_read(uri) as file:
        assert file.read() == b""


def test_names_mean_themselves(directory):
    if directory.startswith("memory"):
        return  # fsspec's memory takes ? and * for patterns
    for number, name in enumerate(NASTY_NAMES):
        storage.write_bytes(storage.join(directory, name), b"x" * number)
    assert storage.list_files(directory) == sorted(NASTY_NAMES)
    for number, name in enumerate(NASTY_NAMES):
        uri = storage.join(directory, name)
        assert (storage.size_bytes(uri), storage.read_bytes(uri)) == (number, b"x" * number), name
    storage.remove(storage.join(directory, "a[1]*.jpg"))
    storage.rename(storage.join(directory, "a#b?c=d"), storage.join(directory, "ä#%?"))
    expected = {*NASTY_NAMES, "ä#%?"} - {"a[1]*.jpg", "a#b?c=d"}
    assert storage.list_files(directory) == sorted(expected)


def test_a_walk_gives_the_order_of_the_bytes_of_the_paths(directory):
    if directory.startswith("memory"):
        return
    paths = NASTY_NAMES + [f"{folder}/{name}" for folder in NASTY_FOLDERS for name in ("z", "é", "a.b")]
    for number, path in enumerate(paths):
        storage.write_bytes(storage.join(directory, path), b"x" * number)
    assert everything_under(directory) == sorted(paths, key=str.encode)
    sizes = {item.name: item.size_bytes for item in storage.iterate_directory(directory) if not item.is_directory}
    assert sizes == {name: number for number, name in enumerate(NASTY_NAMES)}


def test_a_listing_is_of_now(directory):
    uri = storage.join(directory, "file")
    for number in range(3):
        assert storage.list_files(directory) == []
        assert not storage.exists(uri)
        storage.write_bytes(uri, b"x" * number)
        assert storage.list_files(directory) == ["file"]
        assert storage.size_bytes(uri) == number
        storage.remove(uri)


def test_more_files_than_a_page_of_a_listing(directory):
    names = [f"{i:05d}.txt" for i in range(1203)]

    def create(some: list[str]) -> None:
        for name in some:
            storage.write_bytes(storage.join(directory, name), b"")

    threads = [threading.Thread(target=create, args=(names[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert storage.list_files(directory) == names
    storage.remove(directory, recursive=True)
    assert storage.list_files(directory) == []


def test_what_is_not_there_is_said_to_be_missing(directory):
    nowhere = storage.join(directory, "nowhere")
    assert storage.list_files(nowhere) == []
    assert not storage.exists(nowhere)
    assert not storage.is_directory(nowhere)
    for attempt in (
        lambda: storage.read_bytes(nowhere),
        lambda: storage.size_bytes(nowhere),
        lambda: storage.open_read(nowhere),
        lambda: list(storage.iterate_directory(nowhere)),
    ):
        with pytest.raises(FileNotFoundError):
            attempt()
    storage.remove(nowhere)
    storage.remove(nowhere, recursive=True)


def test_a_file_is_no_directory(directory):
    uri = storage.join(directory, "file")
    storage.write_bytes(uri, b"x")
    assert not storage.is_directory(uri)
    assert storage.is_directory(directory)
    assert storage.list_files(uri) == []
    # To S3 this is just a directory that is not there.
    with pytest.raises((NotADirectoryError, FileNotFoundError)):
        list(storage.iterate_directory(uri))


def test_a_directory_is_made_with_its_parents_and_may_exist(directory):
    uri = storage.join(directory, "one", "two")
    storage.make_directory(uri)
    storage.make_directory(uri)
    assert storage.list_files(uri) == []
    # S3 knows files only.
    assert storage.is_directory(uri) or directory.startswith("s3://")


def test_remove_and_rename_work_on_files_and_directories(directory):
    storage.write_bytes(storage.join(directory, "one", "a"), b"1")
    storage.write_bytes(storage.join(directory, "one", "b", "c"), b"11")
    storage.write_bytes(storage.join(directory, "one more"), b"111")
    storage.rename(storage.join(directory, "one"), storage.join(directory, "two"))
    assert everything_under(directory) == ["one more", "two/a", "two/b/c"]
    storage.write_bytes(storage.join(directory, "c"), b"3")
    storage.rename(storage.join(directory, "one more"), storage.join(directory, "c"))
    assert storage.read_bytes(storage.join(directory, "c")) == b"111"
    storage.remove(storage.join(directory, "c"))
    storage.remove(storage.join(directory, "two"), recursive=True)
    assert everything_under(directory) == []


def test_the_checksum_is_that_of_the_bytes(directory):
    uri = storage.join(directory, "file")
    content = bytes(range(251)) * 40_000
    storage.write_bytes(uri, content)
    assert storage.sha256_of_file(uri) == hashlib.sha256(content).hexdigest()


def test_a_place_that_takes_no_file_is_named_in_one_line(directory):
    if directory.startswith(("memory", "s3")):
        return  # there a file can lie below a file
    storage.write_bytes(storage.join(directory, "file"), b"in the way")
    below = storage.join(directory, "file", "below", "x.bin")
    with pytest.raises(StorageError, match=r"file/below/x\.bin can't be written: .*ot a directory.*\.$") as caught:
        storage.write_bytes(below, b"content")
    assert "\n" not in str(caught.value)
    storage.make_directory(storage.join(directory, "folder"))
    with pytest.raises(StorageError, match="folder can't be written: Is a directory"):
        storage.write_bytes(storage.join(directory, "folder"), b"content")
    assert everything_under(directory) == ["file"]


def test_other_processes_and_threads_use_the_same_addresses(directory):
    if directory.startswith("memory"):
        return
    uri = storage.join(directory, "file")
    storage.write_bytes(uri, b"content")
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(storage.read_bytes(uri))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [b"content"] * 8
    code = (
        "import multiprocessing, sys\nfrom manyeyes import storage\n"
        "if __name__ == '__main__':\n"
        "    storage.exists(sys.argv[1])\n"
        "    for way in ('spawn', 'fork'):\n"
        "        with multiprocessing.get_context(way).Pool(2) as pool:\n"
        "            print(pool.map(storage.read_bytes, [sys.argv[1]] * 4))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.splitlines() == [str([b"content"] * 4)] * 2, done.stderr
