"""Files on any URI that fsspec knows: open, list, and publish whole (write aside, then rename).

HDFS and S3 have files of their own here (`hdfs`, `s3`), loaded when the first URI of theirs is opened.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import posixpath
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import fsspec
from fsspec.core import url_to_fs

from manyeyes.errors import MissingExtraError, StorageError, UsageError
from manyeyes.storage.remote import ASIDE_MARK, Item, RemoteFiles, without_aside

# How much is read at once to compute a checksum: on remote file systems every read is a request.
_CHECKSUM_CHUNK_BYTES = 1 << 23
_HDFS_SCHEMES = ("hdfs", "viewfs")
_S3_SCHEMES = ("s3", "s3a")


def is_local(uri: str | os.PathLike[str]) -> bool:
    """Whether `uri` is a path on this machine."""
    text = os.fspath(uri)
    return "://" not in text or text.startswith("file://")


def filesystem(uri: str | os.PathLike[str]) -> tuple[fsspec.AbstractFileSystem, str]:
    """Return the fsspec file system of `uri` and the path in it.

    Raises:
        UsageError: the protocol is unknown, its library is not installed, or the address can't be right.
        ConnectionError: the server does not answer.
    """
    text = os.fspath(uri)
    scheme = _scheme(text)
    if scheme in _HDFS_SCHEMES:
        from manyeyes.storage import hdfs

        return hdfs.open_uri(text)
    if scheme in _S3_SCHEMES:
        try:
            from manyeyes.storage import s3
        except ImportError:
            raise MissingExtraError(text, "s3") from None
        return s3.open_uri(text)
    try:
        fs, path = url_to_fs(text)
    except (ImportError, ValueError, OSError) as error:
        # fsspec says which library a protocol needs; some of those say more than a line.
        raise UsageError(f"{text} can't be opened: {(str(error) or repr(error)).splitlines()[0]}.") from None
    return fs, path


def _scheme(text: str) -> str:
    scheme, mark, _ = text.partition("://")
    if mark:
        return scheme
    scheme, colon, _ = text.partition(":")
    # Hadoop reads hdfs:/folder as hdfs:///folder; here it would be a folder `hdfs:` on this machine.
    if colon and scheme in _HDFS_SCHEMES + _S3_SCHEMES:
        raise UsageError(f"{text} has no // after {scheme}:. Write hdfs:///folder or s3://bucket/folder.")
    return ""


def is_transient(error: Exception, uri: str | os.PathLike[str]) -> bool:
    """Whether another attempt may do after `error`, which reading `uri` through some library has raised.

    That is so for what a remote file system says, but not for what the library finds in the bytes (an OSError of
    pyarrow has no number), nor for a file that is missing.
    """
    of_storage = isinstance(error, ConnectionError) or (isinstance(error, OSError) and error.errno is not None)
    return of_storage and not is_local(uri) and not isinstance(error, FileNotFoundError)


def absolute(uri: str | os.PathLike[str]) -> str:
    """Return `uri` in a form that means the same from every working directory.

    Raises:
        UsageError: it was meant for a URI but lacks a slash.
    """
    text = os.fspath(uri)
    scheme = _scheme(text)
    if not is_local(text):
        # The root of the default file system keeps its slash: hdfs:///.
        return text.rstrip("/") if text.removeprefix(f"{scheme}://").strip("/") else f"{scheme}:///"
    # Not Path.resolve: a link that the user gives stays the name that the user knows.
    return os.path.abspath(text.removeprefix("file://"))  # noqa: PTH100


def join(uri: str | os.PathLike[str], *parts: str) -> str:
    """Join path parts to a URI with forward slashes."""
    return posixpath.join(os.fspath(uri), *parts)


def split(uri: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the URI of the directory that `uri` lies in, and its name there; the parent of hdfs:///x is hdfs:///."""
    parent, slash, name = os.fspath(uri).rpartition("/")
    return parent + slash if not parent or parent.endswith("/") else parent, name


def is_file_name(text: str) -> bool:
    """Whether `text` names a file in a directory, and nothing outside of it: what an artifact lists is not trusted."""
    return text not in ("", ".", "..") and not set(text) & set("/\\")


def exists(uri: str | os.PathLike[str]) -> bool:
    """Whether a file or a directory is at `uri`."""
    fs, path = filesystem(uri)
    return bool(fs.exists(path))


def is_directory(uri: str | os.PathLike[str]) -> bool:
    """Whether a directory is at `uri`."""
    fs, path = filesystem(uri)
    return bool(fs.isdir(path))


def size_bytes(uri: str | os.PathLike[str]) -> int:
    """Return the size of the file at `uri`, in bytes. Raises FileNotFoundError."""
    fs, path = filesystem(uri)
    return int(fs.size(path))


def open_read(uri: str | os.PathLike[str]) -> IO[bytes]:
    """Open the file at `uri` for reading bytes."""
    fs, path = filesystem(uri)
    return fs.open(path, "rb")


def open_ranges(uri: str | os.PathLike[str]) -> IO[bytes]:
    """Open the file at `uri` for reads here and there: on HDFS and S3 each is one request for just its bytes."""
    fs, path = filesystem(uri)
    return cast(IO[bytes], fs.open_ranges(path)) if isinstance(fs, RemoteFiles) else fs.open(path, "rb")


def read_bytes(uri: str | os.PathLike[str], start: int | None = None, end: int | None = None) -> bytes:
    """Return the bytes [start, end) of the file at `uri`, or all of them."""
    fs, path = filesystem(uri)
    if end is not None and end <= (start or 0):
        return b""
    return fs.cat_file(path, start=start, end=end)


def read_json(uri: str | os.PathLike[str]) -> Any:
    """Parse the JSON file at `uri`."""
    return json.loads(read_bytes(uri))


def iterate_directory(uri: str | os.PathLike[str]) -> Iterator[Item]:
    """Yield what is directly in the directory `uri`, on HDFS and S3 as the pages of the listing come.

    The order is that of the UTF-8 bytes of the names, where a directory's name ends with a slash, on all file systems:
    then a tree that is walked down at every directory gives its files in the order of their paths' bytes. On local disk
    a link is what it points to, and what is neither file nor directory is passed over.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such directory.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, RemoteFiles):
        yield from fs.iterate(path)
        return
    if is_local(uri):
        # Their sizes are asked one by one as they are taken.
        yield from (item for item in (_local_item(path, os.fsdecode(name)) for name in local_names(path)) if item)
        return
    if fs.isfile(path):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(uri))
    found = []
    for entry in fs.ls(path, detail=True):
        name, is_directory = posixpath.basename(entry["name"].rstrip("/")), entry["type"] == "directory"
        found.append((os.fsencode(f"{name}/" if is_directory else name), Item(name, is_directory, entry["size"] or 0)))
    yield from (item for _, item in sorted(found))


def local_names(folder: str) -> list[bytes]:
    """Return what is directly in a folder of this machine, directories with a slash, in our order of listings.

    Names only, and as bytes, because there may be millions.
    """
    with os.scandir(folder) as entries:
        return sorted(os.fsencode(f"{entry.name}/" if entry.is_dir() else entry.name) for entry in entries)


def _local_item(folder: str, name: str) -> Item | None:
    if name.endswith("/"):
        return Item(name[:-1], True, 0)
    try:
        status = os.stat(os.path.join(folder, name))  # noqa: PTH116, PTH118
    except OSError:  # a link to nothing, or it has gone meanwhile
        return None
    return Item(name, False, status.st_size) if stat.S_ISREG(status.st_mode) else None


def list_files(uri: str | os.PathLike[str], suffix: str = "") -> list[str]:
    """Return the sorted names of the files directly in the directory `uri` (empty if it does not exist)."""
    try:
        return sorted(
            item.name
            for item in iterate_directory(uri)
            if not item.is_directory and item.name.endswith(suffix) and ASIDE_MARK not in item.name
        )
    except (FileNotFoundError, NotADirectoryError):
        return []


def make_directory(uri: str | os.PathLike[str]) -> None:
    """Create the directory `uri` and its parents; do nothing if it exists.

    S3 has no directories: there this only finds out that the bucket exists.
    """
    fs, path = filesystem(uri)
    fs.makedirs(path, exist_ok=True)


def check_writable(directory: str | os.PathLike[str]) -> None:
    """Find out, before work that takes long, whether files can lie in `directory`; on HDFS it is made, and tried.

    Raises:
        UsageError: they can't.
    """
    if not is_local(directory):
        try:
            make_directory(directory)
            if os.fspath(directory).startswith(("hdfs://", "viewfs://")):
                # To make a directory that exists asks for no rights.
                probe = join(directory, f"{ASIDE_MARK}probe-{uuid.uuid4().hex[:12]}")
                write_bytes(probe, b"")
                remove(probe)
        except OSError as error:
            reason = (error.strerror or str(error)).rstrip(".")
            raise UsageError(f"{os.fspath(directory)} can't be written: {reason}. Choose another place.") from None
        return
    parent = Path(absolute(directory))
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UsageError(f"{os.fspath(directory)} can't be written: {parent} takes no files. Choose another place.")


def remove(uri: str | os.PathLike[str], *, recursive: bool = False) -> None:
    """Remove what is at `uri`, if anything."""
    fs, path = filesystem(uri)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        fs.rm(path, recursive=recursive)


def rename(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Rename a file or directory within one file system; on local disk and HDFS in one step.

    A file that is in the way is replaced. On S3 every file is copied and then removed.
    """
    fs, source_path = filesystem(source)
    _, target_path = filesystem(target)
    if is_local(source):
        Path(source_path).replace(target_path)
    else:
        fs.mv(source_path, target_path, recursive=not isinstance(fs, RemoteFiles) and fs.isdir(source_path))


@contextlib.contextmanager
def publish(uri: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Write a file that appears whole or not at all.

    The bytes go to a file beside `uri`, which is renamed on a clean exit and removed on an exception. An object store
    (S3) has no rename: there the bytes are kept in memory and sent by one PUT, which is as atomic.

    Raises:
        StorageError: the file can't be written and another attempt will not mend it. (What else a remote file system
            raises may be mended, so it stays the OSError that it is, which engines retry.)
    """
    fs, path = filesystem(uri)
    parent = posixpath.dirname(path)
    if isinstance(fs, RemoteFiles):
        try:
            with fs.publish(path) as remote_file:
                yield remote_file
        except (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            # Where it names a file elsewhere, it is of what the caller was reading.
            if without_aside(error.filename or "") != without_aside(fs.unstrip_protocol(path)):
                raise
            raise StorageError(error.errno, error.strerror, without_aside(os.fspath(uri))) from error
        return
    if fs.protocol == "memory":
        buffer = io.BytesIO()
        yield buffer
        fs.makedirs(parent, exist_ok=True)
        fs.pipe_file(path, buffer.getvalue())
        return
    aside = posixpath.join(parent, f"{ASIDE_MARK}{uuid.uuid4().hex[:12]}-{posixpath.basename(path)}")
    try:
        fs.makedirs(parent, exist_ok=True)
        if is_local(uri):
            with open(aside, "wb") as local_file:
                yield local_file
                local_file.flush()
                os.fsync(local_file.fileno())
            Path(aside).replace(path)
        else:
            with fs.open(aside, "wb") as other_file:
                yield other_file
            with contextlib.suppress(FileNotFoundError):
                fs.rm(path)
            fs.mv(aside, path)
    except BaseException as error:
        with contextlib.suppress(Exception):
            fs.rm(aside)
        if not isinstance(error, OSError) or isinstance(error, StorageError):
            raise
        # Where it names a file elsewhere, it is of what the caller was reading.
        if is_local(uri) and error.errno and error.filename in (None, aside, *map(str, Path(aside).parents)):
            raise StorageError(error.errno, error.strerror, without_aside(os.fspath(uri))) from error
        raise


def write_bytes(uri: str | os.PathLike[str], content: bytes) -> None:
    """Publish `content` at `uri`."""
    with publish(uri) as file:
        file.write(content)


def write_json(uri: str | os.PathLike[str], content: Any) -> None:
    """Publish `content` as JSON with sorted keys, so that equal content has equal bytes."""
    write_bytes(uri, canonical_json(content, indent=1))


def canonical_json(content: Any, indent: int | None = None) -> bytes:
    """Return `content` as JSON bytes that depend on nothing but the content."""
    separators = (",", ":") if indent is None else (",", ": ")
    text = json.dumps(
        content, sort_keys=True, ensure_ascii=False, indent=indent, separators=separators, allow_nan=False
    )
    return (text + ("\n" if indent is not None else "")).encode()


def sha256_of_file(uri: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of the file at `uri`, in hex."""
    digest = hashlib.sha256()
    with open_read(uri) as file:
        while chunk := file.read(_CHECKSUM_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
