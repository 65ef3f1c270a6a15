"""Unpack Debian packages without root, uninstalled: `python3 scripts/debian_package.py NAME … TARGET`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def debian_packages(names: Sequence[str], target: Path) -> Path | None:
    """Unpack the Debian packages `names`, and none that they depend on, below `target`; None where none can be had."""
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        return None
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="manyeyes-apt-") as scratch:
        for update_first in (False, True):
            options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
            if update_first:  # this machine's package lists are absent or old: fetch private ones
                for part in ("lists/partial", "cache/archives/partial"):
                    (Path(scratch) / part).mkdir(parents=True)
                options += ["-o", f"Dir::State::Lists={scratch}/lists", "-o", f"Dir::Cache={scratch}/cache"]
                if subprocess.run(["apt-get", "-qq", *options, "update"], capture_output=True).returncode:
                    return None
            if not subprocess.run(
                ["apt-get", "-qq", *options, "download", *names], cwd=scratch, capture_output=True
            ).returncode:
                for archive in Path(scratch).glob("*.deb"):
                    subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)
                return target
    return None


if __name__ == "__main__":
    *names, target = sys.argv[1:]
    if debian_packages(names, Path(target)) is None:
        sys.exit(f"Not all of these Debian packages can be had here: {' '.join(names)}.")
