"""A job's folder on HDFS, through which everything between the driver and its tasks goes.

    JOB/
      work           the pickled functions of the job
      items          the pickled items, one after the other
      index          one line an item: its number, where it starts and ends in `items`; the input of the MapReduce job
      records/       what attempts came to, published by tasks while they run: MAP-ATTEMPT-NUMBER
      partials/      of a map_reduce: results that one map reduced, named in the same way
      begun/         tasks that attempts after the first began: INDEX-ATTEMPT
      reduced        of a map_reduce: the result

All are pickles that live no longer than their job. Only the user may read them, as functions and items may hold
credentials, and only the user may write them, as who writes a pickle runs code where it is read.
"""

from __future__ import annotations

import os
import pickle
import re
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from manyeyes import storage
from manyeyes.engines.failures import Failure
from manyeyes.errors import UsageError
from manyeyes.storage.hdfs import HdfsFiles

# Small items that stand side by side are read at once, up to this.
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Work:
    """What the tasks of a job do.

    Attributes:
        fn: the pickled function of an item.
        reduce_fn: the pickled function of two results, or None.
        num_threads: that a task may use.
    """

    fn: bytes
    reduce_fn: bytes | None
    num_threads: int


@dataclass(frozen=True)
class Record:
    """What an attempt came to.

    Attributes:
        indexes: of the tasks; one, or those of a partial result; none where reducing failed.
        outcome: the pickled result; or what was raised; or, as text, how the worker process died.
    """

    indexes: tuple[int, ...]
    outcome: bytes | Failure | str


@dataclass(frozen=True)
class Entry:
    """A line of the index: task `index` is the bytes [start, end) of the items."""

    index: int
    start: int
    end: int

    @classmethod
    def parse(cls, line: bytes) -> Entry:
        """Read a line as Hadoop Streaming hands it to a mapper."""
        return cls(*map(int, line.split()))


@dataclass(frozen=True)
class Attempt:
    """One attempt at one map or reduce task of Hadoop: its task's name, and its number from 0."""

    task: str
    number: int

    @classmethod
    def from_environment(cls) -> Attempt:
        """The attempt that this process is, e.g. attempt_1700000000000_0007_m_000003_1."""
        found = re.fullmatch(r"attempt_\d+_\d+_([mr]_\d+)_(\d+)", os.environ["mapreduce_task_attempt_id"])  # noqa: SIM112
        assert found is not None
        return cls(found[1].replace("_", ""), int(found[2]))


class JobFolder:
    """The folder at `uri`."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @classmethod
    def new(cls, work_dir: str, is_own: bool = False) -> JobFolder:
        """Make a new folder, which only this user can read where the file system knows users.

        Args:
            work_dir: where the folder is made.
            is_own: whether nobody but the user is meant to have made the `work_dir`.

        Raises:
            UsageError: the `work_dir` is not where tasks reach it, or is somebody else's.
        """
        if storage.is_local(work_dir):
            raise UsageError(f"The setting work_dir is {work_dir}; expected a folder on HDFS: hdfs://NAMENODE/FOLDER.")
        folder = cls(storage.join(work_dir, f"job-{uuid.uuid4().hex}"))
        storage.make_directory(folder.uri)
        files, path = storage.filesystem(folder.uri)
        if isinstance(files, HdfsFiles):
            owner, other = (files.owner(place) for place in (path, path.rpartition("/")[0]))
            if is_own and owner != other:
                storage.remove(folder.uri, recursive=True)
                raise UsageError(
                    f"{work_dir} is {other}'s and not {owner}'s. Name another folder by the setting work_dir."
                )
            files.chmod(path, 0o700)
        return folder

    @property
    def index(self) -> str:
        """The URI of the index."""
        return storage.join(self.uri, "index")

    @property
    def output(self) -> str:
        """The URI of the folder for what Hadoop itself wants to write."""
        return storage.join(self.uri, "output")

    def write_work(self, work: Work) -> None:
        """Write what the tasks do."""
        storage.write_bytes(self._path("work"), pickle.dumps(work))

    def read_work(self) -> Work:
        """What the tasks do."""
        return pickle.loads(storage.read_bytes(self._path("work")))

    def write_items(self, items: Iterable[bytes]) -> int:
        """Write pickled items as they are drawn, and their index; returns their number."""
        position = num_items = 0
        with storage.publish(self._path("items")) as content, storage.publish(self.index) as index:
            for num_items, item in enumerate(items, start=1):
                content.write(item)
                index.write(f"{num_items - 1}\t{position}\t{position + len(item)}\n".encode())
                position += len(item)
        return num_items

    def read_items(self, entries: Sequence[Entry]) -> Iterator[tuple[int, bytes]]:
        """Yield (index, pickled item) of the entries, which stand side by side mostly."""
        first = 0
        while first < len(entries):
            last = first + 1
            while (
                last < len(entries)
                and entries[last].start == entries[last - 1].end
                and entries[last].end - entries[first].start <= _READ_BYTES
            ):
                last += 1
            start = entries[first].start
            content = storage.read_bytes(self._path("items"), start, entries[last - 1].end)
            for entry in entries[first:last]:
                yield entry.index, content[entry.start - start : entry.end - start]
            first = last

    def mark_begun(self, attempt: Attempt, index: int) -> None:
        """Leave a mark that an attempt begins a task, as its container may be ended before it can tell."""
        storage.write_bytes(self._path("begun", f"{index}-{attempt.number}"), b"")

    def begun(self) -> dict[int, int]:
        """How many attempts left a mark at each task."""
        counts: dict[int, int] = {}
        for name in storage.list_files(self._path("begun")):
            index = int(name.partition("-")[0])
            counts[index] = counts.get(index, 0) + 1
        return counts

    def publish(self, folder: str, attempt: Attempt, number: int, records: Sequence[Record]) -> str:
        """Write records of an attempt; returns the name of the file in `folder`, which is records or partials."""
        name = f"{attempt.task}-{attempt.number}-{number}"
        storage.write_bytes(self._path(folder, name), pickle.dumps(list(records)))
        return name

    def names(self, folder: str, task: str = "") -> list[str]:
        """The names of the files of records in `folder`, all or those of one task of Hadoop."""
        prefix = f"{task}-" if task else ""
        return [name for name in storage.list_files(self._path(folder)) if name.startswith(prefix)]

    def read(self, folder: str, name: str) -> list[Record]:
        """The records in a file."""
        return pickle.loads(storage.read_bytes(self._path(folder, name)))

    def write_reduced(self, content: bytes) -> None:
        """Write the pickled result of a map_reduce."""
        storage.write_bytes(self._path("reduced"), content)

    def read_reduced(self) -> bytes:
        """The pickled result of a map_reduce."""
        return storage.read_bytes(self._path("reduced"))

    def _path(self, *parts: str) -> str:
        return storage.join(self.uri, *parts)
