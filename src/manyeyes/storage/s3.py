"""S3 by s3fs: one client a process, no cached listings, one PUT a file, and errors that say what to do."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import IO, Any

import aiohttp
import s3fs
from botocore.exceptions import BotoCoreError, HTTPClientError, NoCredentialsError
from botocore.exceptions import ConnectionError as NoConnectionError
from fsspec.asyn import sync_wrapper

from manyeyes.errors import StorageError, UsageError
from manyeyes.storage.remote import BUFFER_BYTES, Item, RangeReader, RemoteFiles, check_first_answer, first_that_answers

# The limit of S3 for one PUT.
MAX_PUT_BYTES = 5 << 30
_CREDENTIALS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
# What a server says by number only, as it does to HEAD requests.
_MEANING_OF_CODE = {
    "400": "the server refuses the request: is the session token of another time?",
    "403": f"access is denied. {_CREDENTIALS}, and look at the rights on the bucket",
    "301": "the bucket is in another region. Set AWS_REGION or AWS_ENDPOINT_URL",
}


def open_uri(uri: str) -> tuple[S3Files, str]:
    """Return the file system of an s3:// or s3a:// URI and the path in it.

    Raises:
        UsageError: the profile is unknown, or the URI names no bucket.
        ConnectionError: the server does not answer.
    """
    # boto's own variables decide; another set of them is another client.
    environment = tuple(sorted((key, value) for key, value in os.environ.items() if key.startswith("AWS_")))
    path = S3Files._strip_protocol(uri)
    if not path.strip("/"):
        raise UsageError(f"{uri} names no bucket. Write s3://BUCKET/FOLDER.")
    return _files(os.getpid(), environment, uri if "://" not in uri else f"s3://{path.partition('/')[0]}"), path


# For all threads: s3fs runs in a thread of its own. Another process needs another client.
@functools.lru_cache(maxsize=32)
def _files(pid: int, environment: tuple[tuple[str, str], ...], uri: str) -> S3Files:
    # Three attempts at a request, in which a server that is too busy is asked later; engines try tasks again.
    settings = {} if "AWS_RETRY_MODE" in os.environ else {"retries": {"mode": "standard"}}
    files = S3Files(
        use_listings_cache=False, skip_instance_cache=True, max_concurrency=1, anon=False, config_kwargs=settings
    )
    try:
        endpoint = files.s3.meta.endpoint_url
        parsed = urllib.parse.urlparse(endpoint)
        port = parsed.port or (443 if parsed.scheme == "https" else 80)
    except BotoCoreError as error:
        raise UsageError(f"{uri} can't be opened: {str(error).rstrip('.')}. {_CREDENTIALS}.") from None
    except ValueError as error:  # an address without http://, or with a port that is no number
        raise UsageError(f"{uri} can't be opened: {error}. Set AWS_ENDPOINT_URL=http://HOST:PORT.") from None
    files.endpoint = endpoint
    proxy = urllib.request.getproxies().get(parsed.scheme)
    # Behind a proxy it is the proxy that must answer, which the client finds out.
    if parsed.hostname and (not proxy or urllib.request.proxy_bypass(parsed.hostname)):
        first_that_answers([(parsed.hostname, port)], f"{uri} can't be opened: no S3 server answers")
    bucket = files._strip_protocol(uri)
    hint = f"It is {endpoint}, as AWS_ENDPOINT_URL or ~/.aws/config say"
    check_first_answer(lambda: files.call_s3("head_bucket", Bucket=bucket), uri, "an S3 server", hint)
    return files


class S3Files(s3fs.S3FileSystem, RemoteFiles):
    """s3fs with storage's rules; paths are bucket/key. To be shared between threads.

    Beyond RemoteFiles it differs from s3fs in this: it makes no bucket, takes no path for a pattern, tells of errors of
    bulk deletions, and asks whether a directory exists without listing it.
    """

    cachable = False
    endpoint = ""

    async def _call_s3(self, method: str, *akwarglist: Any, **kwargs: Any) -> Any:
        place = f"s3://{kwargs.get('Bucket', '')}/{kwargs.get('Key', kwargs.get('Prefix', ''))}".rstrip("/")
        try:
            return await super()._call_s3(method, *akwarglist, **kwargs)
        except NoCredentialsError:
            raise UsageError(f"{place}: there are no credentials for S3. {_CREDENTIALS}.") from None
        except (NoConnectionError, HTTPClientError, aiohttp.ClientError) as error:
            raise ConnectionError(f"{place}: the S3 server at {self.endpoint} does not answer: {error}") from None
        except BotoCoreError as error:
            raise UsageError(f"{place} can't be opened: {error}") from None
        except OSError as error:
            raise _explained(error, place) from error.__cause__

    call_s3 = sync_wrapper(_call_s3)

    async def _cat_file(self, path: str, **kwargs: Any) -> bytes:  # type: ignore[override]
        try:
            return await super()._cat_file(path, **kwargs)
        except (BotoCoreError, aiohttp.ClientError) as error:
            raise ConnectionError(f"s3://{path}: the S3 server at {self.endpoint} broke off: {error}") from None
        except _EmptyRangeError:
            return b""

    def exists(self, path: str, **_: Any) -> bool:
        """See fsspec; what is not known for want of permission raises."""
        try:
            self.info(path)
        except FileNotFoundError:
            return False
        return True

    def isdir(self, path: str) -> bool:
        """See fsspec: there are keys below it, or it is a bucket. What is not known for want of permission raises."""
        bucket, key, _ = self.split_path(path)
        try:
            if not key:
                self.call_s3("head_bucket", Bucket=bucket)
                return True
            found = self.call_s3("list_objects_v2", Bucket=bucket, Prefix=key + "/", MaxKeys=1)
        except FileNotFoundError:
            return False
        return bool(found.get("Contents"))

    def iterate(self, path: str) -> Iterator[Item]:
        """See RemoteFiles.iterate; a request for every thousand. S3 has our order by itself.

        Keys with two slashes in a row lie in a directory whose name is empty.
        """
        bucket, key, _ = self.split_path(path)
        prefix = key + "/" if key else ""
        before, num_found = b"", 0
        for page in self._pages(bucket, prefix, "/"):
            found = [(entry["Prefix"].removeprefix(prefix).encode(), 0) for entry in page.get("CommonPrefixes", ())]
            found += [(entry["Key"].removeprefix(prefix).encode(), entry["Size"]) for entry in page.get("Contents", ())]
            num_found += len(found)
            for name, size_bytes in sorted(found):
                if not name:  # the mark that some programs set for an empty directory
                    continue
                if name < before:
                    raise StorageError(
                        f"s3://{path}: the server does not list by name ({name.decode()!r} comes late), as "
                        "directory buckets do not. Copy the files to a general purpose bucket."
                    )
                before = name
                yield Item(name[: -1 if name.endswith(b"/") else None].decode(), name.endswith(b"/"), size_bytes)
        if not num_found and key:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"s3://{path}")

    def _pages(self, bucket: str, prefix: str, delimiter: str = "") -> Iterator[dict[str, Any]]:
        more: dict[str, Any] = {"Delimiter": delimiter} if delimiter else {}
        while True:
            page = self.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
            yield page
            if not page.get("IsTruncated"):
                return
            more["ContinuationToken"] = page["NextContinuationToken"]

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Find out that the bucket exists, which alone is needed for a file to be written there."""
        bucket, _, _ = self.split_path(path)
        try:
            self.call_s3("head_bucket", Bucket=bucket)
        except FileNotFoundError:
            reason = f"the bucket {bucket} does not exist, and is not made"
            raise FileNotFoundError(errno.ENOENT, reason, f"s3://{path}") from None

    def mkdir(self, path: str, create_parents: bool = True, **_: Any) -> None:  # type: ignore[override]
        """See makedirs."""
        self.makedirs(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove the object at exactly this path, if any, and with `recursive` all below it: no patterns."""
        bucket, key, _ = self.split_path(path)
        for page in self._pages(bucket, key + "/" if key else "") if recursive else ():
            keys = [{"Key": entry["Key"]} for entry in page.get("Contents", ())]
            if not keys:
                continue
            done = self.call_s3("delete_objects", Bucket=bucket, Delete={"Objects": keys, "Quiet": True})
            for failed in done.get("Errors", ()):
                code = errno.EACCES if failed.get("Code") == "AccessDenied" else errno.EIO
                raise OSError(code, f"not removed: {failed.get('Message')}", f"s3://{bucket}/{failed.get('Key')}")
        if key:
            self.call_s3("delete_object", Bucket=bucket, Key=key)

    def mv(self, path1: str, path2: str, **_: Any) -> None:  # type: ignore[override]
        """Copy, then remove: a file or all below a directory. Not in one step: S3 has no rename."""
        bucket, key, _version = self.split_path(path1)
        if key and self.isfile(path1):
            self.cp_file(path1, path2)
            self.rm(path1)
            return
        num_moved = 0
        for page in self._pages(bucket, key + "/"):
            for entry in page.get("Contents", ()):
                self.cp_file(f"{bucket}/{entry['Key']}", f"{path2}/{entry['Key'].removeprefix(key + '/')}")
                num_moved += 1
        if not num_moved:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"s3://{path1}")
        self.rm(path1, recursive=True)

    def open_ranges(self, path: str) -> RangeReader:
        """See RemoteFiles.open_ranges; one request for the size."""
        path = self._strip_protocol(path)
        info = self.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), f"s3://{path}")
        return RangeReader(info["size"], lambda start, end: self.cat_file(path, start=start, end=end))

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> IO[bytes]:  # type: ignore[override]
        # s3fs reads 50 MiB ahead, which is a lot for a row group.
        if mode == "rb":
            return io.BufferedReader(self.open_ranges(path), BUFFER_BYTES)
        return super()._open(path, mode, **kwargs)

    @contextlib.contextmanager
    def publish(self, path: str) -> Iterator[IO[bytes]]:
        """See RemoteFiles.publish: kept in memory, then sent by one PUT, after which readers see all of it."""
        buffer = io.BytesIO()
        yield buffer
        num_bytes = buffer.seek(0, os.SEEK_END)
        if num_bytes > MAX_PUT_BYTES:
            raise StorageError(
                errno.EFBIG,
                f"it has {num_bytes:,} bytes and S3 takes {MAX_PUT_BYTES:,} in one PUT, which is what makes it "
                "appear whole or not at all",
                f"s3://{path}",
            )
        bucket, key, _ = self.split_path(path)
        self.call_s3("put_object", Bucket=bucket, Key=key, Body=buffer.getvalue())


class _EmptyRangeError(Exception):
    """A range that begins at the end of the object or behind it."""


def _explained(error: OSError, uri: str) -> Exception:
    """Give an error of s3fs its number and its URI."""
    response = getattr(error.__cause__, "response", None) or {}
    code = str(response.get("Error", {}).get("Code", ""))
    if code in ("InvalidRange", "416"):
        return _EmptyRangeError()
    if error.filename is not None:
        return error
    number = error.errno
    if number is None:
        kinds = (
            (FileNotFoundError, errno.ENOENT),
            (PermissionError, errno.EACCES),
            (FileExistsError, errno.EEXIST),
            (TimeoutError, errno.ETIMEDOUT),
        )
        number = next((number for kind, number in kinds if isinstance(error, kind)), errno.EIO)
    text = _MEANING_OF_CODE.get(code) or error.strerror or str(error) or os.strerror(number)
    return OSError(number, text.rstrip("."), uri)
