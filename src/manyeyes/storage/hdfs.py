"""HDFS by hdfs-native: addresses as Hadoop reads them, one client a process, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import functools
import heapq
import io
import os
import posixpath
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import IO, TYPE_CHECKING, Any

from fsspec import AbstractFileSystem

from manyeyes.errors import MissingExtraError, StorageError, UsageError
from manyeyes.storage.hadoop_settings import name_service, read_settings, settings_directory, settings_version
from manyeyes.storage.remote import (
    ASIDE_MARK,
    BUFFER_BYTES,
    Item,
    RangeReader,
    RemoteFiles,
    check_first_answer,
    without_aside,
)

if TYPE_CHECKING:
    from hdfs_native import Client, FileWriter

# A NameNode that stops answering while a job runs is tried eight times in about 25 s; then the engine tries the task
# again. (hdfs-native would wait for three minutes.) Hadoop's settings go before these.
_ATTEMPTS_KEY, _ATTEMPTS = "dfs.client.failover.max.attempts", 8
_LONGEST_SLEEP_KEY, _LONGEST_SLEEP_MS = "dfs.client.failover.sleep.max.millis", 5000

# How long a file is sent again when DataNodes fail, and the pauses between, in seconds.
_SEND_SECONDS = 60.0
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.5, 8.0
# A file that is larger waits on the local disk until it is whole.
_SPOOL_BYTES = 32 << 20

# Java's exceptions, by the ends of their names; what is not here may be mended by another attempt.
_ERRNO_OF_EXCEPTION = {
    "AccessControlException": errno.EACCES,
    "AuthorizationException": errno.EACCES,
    "ParentNotDirectoryException": errno.ENOTDIR,
    "PathIsNotEmptyDirectoryException": errno.ENOTEMPTY,
    "InvalidPathException": errno.EINVAL,
    "PathComponentTooLongException": errno.ENAMETOOLONG,
    "DSQuotaExceededException": errno.EDQUOT,
    "NSQuotaExceededException": errno.EDQUOT,
    "QuotaByStorageTypeExceededException": errno.EDQUOT,
    "SafeModeException": errno.EBUSY,
}
_ASCII = re.compile(rb"[\x00-\x7f]*")


def open_uri(uri: str) -> tuple[HdfsFiles, str]:
    """Return the file system of an hdfs:// or viewfs:// URI and the path in it.

    Raises:
        UsageError: the URI does not say which NameNode, and nor do Hadoop's settings.
        MissingExtraError: hdfs-native is not installed.
        ConnectionError: no NameNode answers.
    """
    scheme, _, rest = uri.partition("://")
    authority, slash, path = rest.partition("/")
    directory = settings_directory()
    version = settings_version(directory)
    user = os.environ.get("HADOOP_USER_NAME")
    files = _files(os.getpid(), scheme, authority, directory, version, user, os.environ.get("HADOOP_PROXY_USER"))
    return files, "/" + path.rstrip("/") if slash else "/"


# One client for all threads: each has an event loop with threads of its own. Another process needs another client.
@functools.lru_cache(maxsize=32)
def _files(pid: int, scheme: str, authority: str, directory: str, version: tuple[int, ...], *user: str) -> HdfsFiles:
    uri = f"{scheme}://{authority}"
    settings = read_settings(directory)
    if "@" in authority:
        user_name = authority.partition("@")[0]
        raise UsageError(f"{uri} names a user, which HDFS does not read there. Set HADOOP_USER_NAME={user_name}.")
    if not authority:
        default = settings.get("fs.defaultFS", "")
        authority = default.removeprefix(f"{scheme}://").partition("/")[0]
        if not default.startswith(f"{scheme}://") or not authority:
            where = f"{directory}/core-site.xml says {default or 'nothing'!r}" if directory else "it is not set"
            raise UsageError(
                f"{uri}/ stands for the file system in Hadoop's fs.defaultFS, but {where}. "
                f"Write {scheme}://HOST:PORT/…, or set HADOOP_CONF_DIR to the folder with core-site.xml."
            )
    num_name_nodes = 1
    if scheme == "hdfs":
        authority, found = name_service(authority, settings, uri)
        settings |= found
        num_name_nodes = max(1, len(found) - 1)
    patience = {_LONGEST_SLEEP_KEY: str(_LONGEST_SLEEP_MS), _ATTEMPTS_KEY: str(_ATTEMPTS * num_name_nodes)}
    try:
        from hdfs_native import Client
    except ImportError:
        raise MissingExtraError(uri, "hdfs") from None
    url = f"{scheme}://{authority}"
    try:
        impatient = Client(url, settings | {_ATTEMPTS_KEY: str(num_name_nodes)})
        client = Client(url, patience | settings)
    except Exception as error:
        raise UsageError(f"{url} can't be opened: {str(error).splitlines()[0]}.") from None
    # Some other server at that address would be asked for long.
    asking = HdfsFiles(impatient, url)
    check_first_answer(
        lambda: asking.exists("/"), url, "a NameNode", "It takes a NameNode's RPC port, not that of a web page"
    )
    return HdfsFiles(client, url)


class HdfsFiles(AbstractFileSystem, RemoteFiles):
    """fsspec's methods over an hdfs_native.Client; paths begin with a slash. To be shared between threads.

    Not hdfs-native's own fsspec class: that cuts names at `#`, replaces in two steps, and leaves Java's errors as
    RuntimeErrors.
    """

    protocol = "hdfs"
    root_marker = "/"
    cachable = False

    def __init__(self, client: Client, base: str) -> None:
        super().__init__()
        self.client = client
        self.base = base

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        if "://" in path:
            path = "/" + path.partition("://")[2].partition("/")[2]
        return "/" + path.strip("/")

    def unstrip_protocol(self, name: str) -> str:
        """Return the URI of a path."""
        return self.base + self._strip_protocol(name)

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """See fsspec; one call to the NameNode."""
        path = self._strip_protocol(path)
        with self._explained(path):
            return self._info_of(self.client.get_file_info(path))

    def exists(self, path: str, **_: Any) -> bool:
        """See fsspec; what is not known for want of permission raises."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def isdir(self, path: str) -> bool:
        """See fsspec; what is not known for want of permission raises."""
        try:
            return self.info(path)["type"] == "directory"
        except FileNotFoundError:
            return False

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        """See fsspec; all at once, so use `iterate` where there may be many."""
        path = self._strip_protocol(path)
        with self._explained(path):
            found = [self._info_of(status) for status in self.client.list_status(path)]
        return found if detail else [entry["name"] for entry in found]

    def iterate(self, path: str) -> Iterator[Item]:
        """See RemoteFiles.iterate; a call to the NameNode for every thousand or so, as dfs.ls.limit says."""
        for key, size_bytes in _in_byte_order(self._names(self._strip_protocol(path))):
            yield Item(key.rstrip(b"/").decode(), key.endswith(b"/"), size_bytes)

    def _names(self, path: str) -> Iterator[tuple[bytes, bool, int]]:
        with self._explained(path):
            for status in self.client.list_status(path):
                if status.path == path and not status.isdir:
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.unstrip_protocol(path))
                yield status.path.rpartition("/")[2].encode(), status.isdir, status.length

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """See fsspec."""
        path = self._strip_protocol(path)
        if not exist_ok and self.exists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), self.unstrip_protocol(path))
        with self._explained(path):
            self.client.mkdirs(path, 0o755, True)

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:
        """See fsspec."""
        with self._explained(path):
            self.client.mkdirs(self._strip_protocol(path), 0o755, create_parents)

    def owner(self, path: str) -> str:
        """Return the name of the user who owns a file or directory."""
        path = self._strip_protocol(path)
        with self._explained(path):
            return self.client.get_file_info(path).owner

    def chmod(self, path: str, mode: int) -> None:
        """Set the rights of a file or directory, as those of Unix."""
        path = self._strip_protocol(path)
        with self._explained(path):
            self.client.set_permission(path, mode)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove what is at exactly this path, if anything: no patterns."""
        path = self._strip_protocol(path)
        with self._explained(path):
            self.client.delete(path, recursive)

    def rm_file(self, path: str) -> None:
        """See fsspec."""
        self.rm(path)

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        """Rename a file or a directory in one operation of the NameNode; a file that is in the way is replaced."""
        with self._explained(path1):
            self.client.rename(self._strip_protocol(path1), self._strip_protocol(path2), True)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        """See fsspec; `start` and `end` count from the front."""
        reader = self.open_ranges(path)
        reader.seek(start or 0)
        return reader.read(None if end is None else max(0, end - (start or 0)))

    def open_ranges(self, path: str) -> RangeReader:
        """See RemoteFiles.open_ranges; one call to the NameNode."""
        path = self._strip_protocol(path)
        with self._explained(path):
            reader = self.client.read(path)

        def fetch(start: int, end: int) -> bytes:
            with self._explained(path):
                return reader.read_range(start, end - start)

        return RangeReader(len(reader), fetch)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> IO[bytes]:
        if mode == "rb":
            return io.BufferedReader(self.open_ranges(path), BUFFER_BYTES)
        if mode != "wb":
            raise UsageError(f"{self.unstrip_protocol(path)} can't be opened in mode {mode!r}: use 'rb' or 'wb'.")
        from hdfs_native import WriteOptions

        path = self._strip_protocol(path)
        with self._explained(path):
            return io.BufferedWriter(
                _Writer(self, path, self.client.create(path, WriteOptions(overwrite=True))), BUFFER_BYTES
            )

    @contextlib.contextmanager
    def publish(self, path: str) -> Iterator[IO[bytes]]:
        """See RemoteFiles.publish: kept here until it is whole, as it may have to be sent more than once."""
        with tempfile.SpooledTemporaryFile(_SPOOL_BYTES) as spool:
            yield spool
            deadline, pause = time.monotonic() + _SEND_SECONDS, _FIRST_PAUSE_SECONDS
            while True:
                spool.seek(0)
                try:
                    return self._send(spool, path)
                except OSError as error:
                    # hdfs-native gives a file up when a DataNode died under it, and the NameNode names that DataNode
                    # again until it has missed its heartbeats.
                    may_pass = isinstance(error, ConnectionError) or error.errno in (errno.EIO, errno.EBUSY)
                    if not may_pass or time.monotonic() + pause > deadline:
                        raise
                time.sleep(pause)
                pause = min(2 * pause, _LAST_PAUSE_SECONDS)

    def _send(self, content: IO[bytes], path: str) -> None:
        """Write aside, then rename over what is there, which is one NameNode operation."""
        parent, name = posixpath.split(self._strip_protocol(path))
        aside = posixpath.join(parent, f"{ASIDE_MARK}{uuid.uuid4().hex[:12]}-{name}")
        try:
            with self._open(aside, "wb") as file:
                shutil.copyfileobj(content, file, BUFFER_BYTES)
            try:
                self.mv(aside, path)
            except FileNotFoundError:
                # Renamed already, if the answer was lost and the client asked again; or removed by somebody.
                uri = self.unstrip_protocol(path)
                raise ConnectionError(f"{uri}: it is not known whether it was written. Try again.") from None
        except BaseException:
            with contextlib.suppress(Exception):
                self.rm(aside)
            raise

    @staticmethod
    def _info_of(status: Any) -> dict[str, Any]:
        kind = "directory" if status.isdir else "file"
        return {"name": status.path, "type": kind, "size": status.length, "mtime": status.modification_time / 1000}

    @contextlib.contextmanager
    def _explained(self, path: str) -> Iterator[None]:
        """Turn hdfs-native's errors into OSErrors with errno and URI."""
        try:
            yield
        except (OSError, RuntimeError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise _translated(error, without_aside(self.unstrip_protocol(path))) from None


def _translated(error: Exception, uri: str) -> OSError:
    text = str(error)
    java = re.match(r'\w+\("[\w.$]*?(\w+)", "', text)
    # Java's stack trace follows the first line.
    message = re.split(r"\\n|\n", text[java.end() :] if java else text, maxsplit=1)[0].replace('\\"', '"')
    if isinstance(error, FileNotFoundError):
        code = errno.EISDIR if message.startswith("Path is not a file") else errno.ENOENT
        return OSError(code, os.strerror(code), uri)
    if isinstance(error, FileExistsError):
        return OSError(errno.EEXIST, message, uri)
    if "must both be directories" in message:
        return OSError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
    if java is None:
        return ConnectionError(
            f"{uri}: HDFS does not answer as it should: {message}. Check that the address has a NameNode's RPC port."
        )
    code = _ERRNO_OF_EXCEPTION.get(java[1], errno.EIO)
    return (StorageError if code == errno.EDQUOT else OSError)(code, message, uri)


class _Writer(io.RawIOBase):
    """hdfs-native's writer as Python's buffers need it."""

    def __init__(self, files: HdfsFiles, path: str, writer: FileWriter) -> None:
        self._files = files
        self._path = path
        self._writer = writer

    def writable(self) -> bool:
        """Whether it can be written: yes."""
        return True

    def write(self, buffer: Any) -> int:
        """See io.RawIOBase.write."""
        # A memoryview would be taken apart into numbers.
        content = bytes(buffer)
        with self._files._explained(self._path):
            self._writer.write(content)
        return len(content)

    def close(self) -> None:
        """End the file; only then is its length known to others."""
        if not self.closed:
            super().close()
            with self._files._explained(self._path):
                self._writer.close()


def _in_byte_order(items: Iterable[tuple[bytes, bool, int]]) -> Iterator[tuple[bytes, int]]:
    """Bring the NameNode's order into ours; yields (name, or name/ of a directory; size).

    The NameNode compares bytes as signed numbers, so that non-ASCII bytes come before ASCII ones, and it compares a
    directory without its slash. An item waits until no later one can come before it: for ASCII names that are at most
    the directories whose names begin the present name; names that differ in a non-ASCII byte wait for the ASCII ones.
    """
    waiting: list[tuple[bytes, int]] = []
    for name, is_directory, size_bytes in items:
        heapq.heappush(waiting, (name + b"/" if is_directory else name, size_bytes))
        # Every later name is larger than this one up to its first non-ASCII byte.
        found = _ASCII.match(name)
        floor = found[0] if found else b""
        while waiting and waiting[0][0] <= floor:
            yield heapq.heappop(waiting)
    while waiting:
        yield heapq.heappop(waiting)
