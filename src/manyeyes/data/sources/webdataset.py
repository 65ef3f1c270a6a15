"""WebDataset: tar files whose consecutive members with one key make a sample (key.jpg + key.cls or key.json)."""

from __future__ import annotations

import json
import posixpath
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from manyeyes import storage
from manyeyes.data.sources.base import (
    Skipped,
    SourceEntry,
    check_split,
    has_image_name,
    label_text,
    read_image_file,
    split_of_file,
)
from manyeyes.errors import ImageError, Reason, SourceError

_LABEL_SUFFIXES = ("cls", "json", "txt")
# Longer label files are not labels; they are not read into memory.
_MAX_LABEL_BYTES = 1 << 20


@dataclass
class _Sample:
    key: str
    image: tarfile.TarInfo | None = None
    label_files: dict[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class WebDatasetSource:
    """One tar, a directory of tars, or a pattern with {000..011}, * or ?."""

    uri: str
    kind: str = "webdataset"
    class_names: tuple[str, ...] | None = None
    image_shape: tuple[int, int, int] | None = None

    def entries(self) -> Iterator[SourceEntry | Skipped]:
        """See Source.entries; tars by name, members in their order."""
        block = 0
        for tar_uri in self._tars():
            for found in _read_tar(tar_uri):
                if isinstance(found, Skipped):
                    yield found
                else:
                    yield _with_block(found, block)
                    block += 1

    def read(self, entry: SourceEntry) -> bytes:
        """See Source.read."""
        offset, size = entry.locator
        content = read_image_file(entry.uri, offset, offset + size)
        if len(content) != size:
            raise ImageError(Reason.TRUNCATED, f"{entry.uri} ends in the middle of {entry.path}")
        return content

    def _tars(self) -> list[str]:
        if not is_pattern(self.uri):
            if not storage.is_directory(self.uri):
                return [self.uri]
            names = storage.list_files(self.uri, ".tar")
            if not names:
                raise SourceError(f"{self.uri} has no .tar file.")
            return [storage.join(self.uri, name) for name in names]
        found: list[str] = []
        for pattern in expand_braces(self.uri):
            fs, path = storage.filesystem(pattern)
            matches = sorted(fs.glob(path)) if re.search(r"[*?]", pattern) else [path] if fs.exists(path) else []
            if not matches:
                raise SourceError(f"There is no file {pattern} (from {self.uri}).")
            found += [fs.unstrip_protocol(match) if "://" in pattern else str(match) for match in matches]
        return found


def is_pattern(uri: str) -> bool:
    """Whether `uri` stands for several files."""
    return re.search(r"[*?]|\{[^{}]*(\.\.|,)[^{}]*\}", posixpath.basename(uri)) is not None


def expand_braces(pattern: str) -> list[str]:
    """Expand {000..011} and {a,b} as a shell does."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if not match:
        return [pattern]
    body = match[1]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if numbers:
        width = len(numbers[1])
        options = [f"{number:0{width}d}" for number in range(int(numbers[1]), int(numbers[2]) + 1)]
    else:
        options = body.split(",")
    return [
        expanded
        for option in options
        for expanded in expand_braces(pattern[: match.start()] + option + pattern[match.end() :])
    ]


def _read_tar(uri: str) -> Iterator[SourceEntry | Skipped]:
    split = split_of_file(posixpath.basename(uri))
    sample: _Sample | None = None
    with storage.open_read(uri) as file:
        try:
            # "r:" refuses compressed tars: they have no random access.
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps all headers otherwise
                    if member.isdir():
                        continue
                    name = member.name.removeprefix("./")
                    if not member.isfile():
                        yield Skipped(name, "not_a_file")
                        continue
                    folder, _, base = name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    if not stem:
                        yield Skipped(name, "hidden_file")
                        continue
                    key = f"{folder}/{stem}"
                    if sample is None or key != sample.key:
                        yield from _finish(sample, uri, split)
                        sample = _Sample(key)
                    if has_image_name(base) and sample.image is None:
                        sample.image = member
                    elif has_image_name(base):
                        yield Skipped(name, "second_image_of_sample")
                    elif suffix in _LABEL_SUFFIXES and member.size <= _MAX_LABEL_BYTES:
                        content = tar.extractfile(member)
                        sample.label_files[suffix] = content.read() if content else b""
                    else:
                        yield Skipped(name, "not_an_image_name")
                # Where a header is damaged or cut short, tarfile just ends; a whole archive ends with blocks of zeros.
                file.seek(tar.offset)  # type: ignore[attr-defined]
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no header and no end of the archive at byte {tar.offset}")  # type: ignore[attr-defined]
                yield from _finish(sample, uri, split)
        except tarfile.TarError as error:
            if sample is None:
                raise SourceError(
                    f"{uri} is not a tar file that can be read in place: {error}. Unpack a .tar.gz first."
                ) from None
            yield from _finish(sample, uri, split)
            yield SourceEntry(
                uri,
                f"{posixpath.basename(uri)}#rest",
                (0, 0),
                problem=Reason.TRUNCATED,
                detail=f"{error} after {sample.key}",
            )


def _finish(sample: _Sample | None, uri: str, split: str | None) -> Iterator[SourceEntry | Skipped]:
    if sample is None:
        return
    if sample.image is None:
        if sample.label_files:
            yield Skipped(sample.key, "no_image_in_sample")
        return
    path = f"{posixpath.basename(uri)}/{sample.image.name.removeprefix('./')}"
    label, group, own_split, detail = None, None, None, "no .cls, .json or .txt beside the image"
    try:
        if "cls" in sample.label_files:
            label = label_text(sample.label_files["cls"].decode())
        if "json" in sample.label_files:
            values = json.loads(sample.label_files["json"])
            if isinstance(values, dict):
                label = label or label_text(values.get("label"))
                group = label_text(values.get("group"))
                own_split = check_split(values.get("split"), f"{uri}, {sample.key}.json")
        if label is None and "txt" in sample.label_files:
            label = label_text(sample.label_files["txt"].decode())
    except ValueError as error:
        detail = f"the label file can't be read: {error}"
    yield SourceEntry(
        uri=uri,
        path=path,
        locator=(sample.image.offset_data, sample.image.size),
        label=label,
        group=group,
        split=own_split or split,
        size_bytes=sample.image.size,
        problem=Reason.MISSING_LABEL if label is None else None,
        detail=detail if label is None else "",
    )


def _with_block(entry: SourceEntry, block: int) -> SourceEntry:
    values = entry.to_json()
    values[7] = block
    return SourceEntry.from_json(values)
