"""Packs the packages that tasks need into one archive, for nodes that have Python but not them."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import io
import logging
import os
import platform
import sys
import tarfile
import uuid
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path

import manyeyes
from manyeyes.errors import EngineError, MissingExtraError, UsageError

# The extras that tasks of ingest, evaluate and predict may need. Training's are gigabytes.
TASK_EXTRAS = ("predict", "hdfs", "s3")
# Raised when archives of the same packages are laid out otherwise than before.
_LAYOUT = 1
# Archives that are kept; the source of a package under development changes all the time.
_NUM_KEPT = 3
_log = logging.getLogger("manyeyes.engines")


def pack_environment(extras: Sequence[str] | None = None, folder: Path | None = None) -> Path:
    """Return a .tar.gz with Manyeyes, the packages that it needs and those of some of its extras, as installed here.

    A node whose Python has the minor version and the platform of this one runs Manyeyes with the unpacked archive on
    its PYTHONPATH. The archive is made once for one set of versions, and anew when Manyeyes' own source changes.

    Args:
        extras: of Manyeyes; default: those of TASK_EXTRAS that are installed here.
        folder: where archives are kept; default: ~/.cache/manyeyes/environments.

    Raises:
        UsageError: there is no such extra.
        MissingExtraError: an extra is not installed here.
        EngineError: a package can't be packed, because its files are not its own (an editable installation).
    """
    distributions = _closure(extras)
    folder = folder or _cache() / "environments"
    archive = folder / f"manyeyes-{_key(distributions)}.tar.gz"
    if archive.exists():
        os.utime(archive)
        return archive
    _log.info("Packing %d packages for the nodes, once: %s", len(distributions), archive)
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f".aside-{uuid.uuid4().hex[:12]}.tar.gz"
    try:
        with open(aside, "wb") as file:
            _write(distributions, file)
        aside.replace(archive)
    finally:
        aside.unlink(missing_ok=True)
    for old in sorted(folder.glob("manyeyes-*.tar.gz"), key=lambda path: path.stat().st_mtime)[:-_NUM_KEPT]:
        old.unlink(missing_ok=True)
    return archive


def node_python() -> str:
    """The name of a Python that can use the archive: of this minor version, from the PATH of the node."""
    return f"python{sys.version_info.major}.{sys.version_info.minor}"


def _closure(extras: Sequence[str] | None) -> dict[str, Distribution]:
    """Manyeyes and all that it requires with these extras; normalized name -> distribution, sorted."""
    found: dict[str, Distribution] = {}
    _follow("manyeyes", "", found)
    known = found["manyeyes"].metadata.get_all("Provides-Extra") or []
    for extra in TASK_EXTRAS if extras is None else extras:
        if extra not in known:
            raise UsageError(f"Manyeyes has no extra {extra!r} to send. It has: {', '.join(known)}.")
        more = dict(found)
        try:
            _follow("manyeyes", extra, more)
        except MissingExtraError:
            if extras is not None:
                raise
            continue
        found = more
    return dict(sorted(found.items()))


def _follow(name: str, extra: str, found: dict[str, Distribution]) -> None:
    """Add a distribution and what it requires for one of its extras ("" for none) to `found`."""
    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        raise MissingExtraError("Sending the environment to the nodes", "spark") from None
    waiting, done = [(name, extra)], set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in done:
            continue
        done.add((name, wanted))
        try:
            distribution = importlib.metadata.distribution(name)
        except PackageNotFoundError:
            raise MissingExtraError(f"Sending {name} to the nodes", extra or "all") from None
        found[canonicalize_name(name)] = distribution
        for text in distribution.requires or ():
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                waiting += [(canonicalize_name(requirement.name), needed) for needed in ("", *requirement.extras)]


def _key(distributions: dict[str, Distribution]) -> str:
    digest = hashlib.sha256(f"{_LAYOUT} {sys.version_info[:2]} {platform.machine()} {platform.libc_ver()}".encode())
    for name, distribution in distributions.items():
        digest.update(f"{name} {distribution.version}\n".encode())
    for target, path in _own_files():
        digest.update(f"{target}\n".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _write(distributions: dict[str, Distribution], file: io.BufferedIOBase) -> None:
    """Write the archive; the same files give the same bytes."""
    # Level 1: libraries shrink to two fifths at any level, and the others take minutes.
    with (
        gzip.GzipFile("", "wb", compresslevel=1, fileobj=file, mtime=0) as stream,
        tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
    ):
        for distribution in distributions.values():
            for target, path in _files(distribution):
                entry = tarfile.TarInfo(target)
                entry.size = path.stat().st_size
                entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
                with open(path, "rb") as content:
                    tar.addfile(entry, content)


def _files(distribution: Distribution) -> Iterator[tuple[str, Path]]:
    """Every file of a distribution: its name in the archive, and where it is."""
    name = distribution.metadata["Name"]
    is_own = name == "manyeyes"
    if is_own:
        yield from _own_files()
    elif '"editable": true' in (distribution.read_text("direct_url.json") or ""):
        raise EngineError(f"{name} is installed from its source folder, so it can't be sent. Install it without -e.")
    for entry in sorted(distribution.files or (), key=str):
        # Scripts lie outside of the folder; caches are written anew by each Python.
        if ".." in entry.parts or entry.is_absolute() or entry.suffix in (".pyc", ".pth"):
            continue
        if is_own and not entry.parts[0].endswith(".dist-info"):
            continue
        path = Path(str(entry.locate()))
        if path.is_file():
            yield str(entry), path


def _own_files() -> Iterator[tuple[str, Path]]:
    package = Path(manyeyes.__file__).parent
    for path in sorted(package.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            yield str(path.relative_to(package.parent)), path


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "manyeyes"
