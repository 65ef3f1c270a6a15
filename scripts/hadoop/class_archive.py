"""Hadoop's classes in the form in which Java maps them: with it every JVM of a minicluster starts with half the CPU.

Java does without where the archive is not there, or is of another Java or other jars.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


class ClassArchive:
    """The archive for a folder of jars and a Java, and what the JVMs of one cluster are told about it.

    Args:
        directory: of the cluster, whose JVMs read their options from conf/archive.args and conf/class-path.args.
        jars: the folder with Hadoop's jars; the archive lies beside it.
        java_home: the folder of the Java that the cluster runs on.
    """

    def __init__(self, directory: Path, jars: Path, java_home: str) -> None:
        modules = Path(java_home, "lib", "modules")
        java = f"{java_home} {modules.stat().st_mtime_ns if modules.exists() else 0}"
        self._prefix = f"classes-{jars.name}-"
        self._archive = jars.parent / f"{self._prefix}{hashlib.sha256(java.encode()).hexdigest()[:8]}.jsa"
        self._java = f"{java_home}/bin/java"
        self._jars = ":".join(map(str, sorted(jars.glob("*.jar"))))
        self._lists = directory / "classes"
        self._conf = directory / "conf"

    @contextlib.contextmanager
    def missing(self) -> Iterator[bool]:
        """Whether there is no archive; while the block runs, others hear that there is one."""
        with open(self._archive.with_suffix(".lock"), "w") as lock:
            is_free = True
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                is_free = False
            yield is_free and not self._archive.exists()

    def write_options(self, more_class_path: str, *, notes_classes: bool = False) -> None:
        """Write the files of options: JVMs use the archive, or note which classes they load."""
        # Java finds archived classes where the class path begins as the archive's did, and no folder stands in between.
        (self._conf / "jars").write_text(self._jars)
        (self._conf / "class-path.args").write_text(f'-cp "{self._jars}:{more_class_path}"\n')
        options = f'"-XX:SharedArchiveFile={self._archive}"\n-Xshare:auto\n'
        if notes_classes:
            options = f'"-XX:DumpLoadedClassList={self._lists}/%p.lst"\n'
        (self._conf / "archive.args").write_text(options)

    def make(self) -> bool:
        """Archive the classes that the cluster's JVMs have noted. Returns whether Java could."""
        classes: dict[str, None] = {}
        for path in self._lists.glob("*.lst"):
            whole, _, _ = path.read_text().rpartition("\n")  # a JVM that runs may have written half of its last line
            classes |= dict.fromkeys(line for line in whole.splitlines() if "source:" not in line)
        everything = self._lists / "all"
        everything.write_text("\n".join(classes) + "\n")
        aside = self._archive.with_name(f"{self._archive.name}-aside-{os.getpid()}")
        # Only G1 archives objects too; other collectors load them.
        options = ["-XX:+UseG1GC", "-Xmx1g", f"-XX:SharedClassListFile={everything}", f"-XX:SharedArchiveFile={aside}"]
        command = [self._java, "-Xshare:dump", *options, "-cp", self._jars]
        try:
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode or not aside.exists():
                return False
            for of_another_java in self._archive.parent.glob(f"{self._prefix}*.jsa"):
                of_another_java.unlink()
            aside.rename(self._archive)
            return True
        finally:
            aside.unlink(missing_ok=True)
