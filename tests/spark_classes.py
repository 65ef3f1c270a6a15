"""Spark's classes as Java maps them: with this archive every JVM of Spark in the tests starts with half the CPU.

    python tests/spark_classes.py     makes it, unless it is there for this Java and this pyspark

Java does without where the archive is of another Java or other jars, and so do the tests where there is none.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).parent.parent / ".cache" / "spark"
QUICK = "-XX:+UseSerialGC -XX:TieredStopAtLevel=1"
SESSION = """
from pyspark.sql import SparkSession
spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
assert spark.sparkContext.parallelize(range(4), 2).map(lambda number: number + 1).sum() == 10
assert len(spark.range(4).selectExpr("id + 1 as next").collect()) == 4
spark.stop()
"""


def options() -> str:
    """What a JVM of Spark is told, without a word about an archive that does not fit."""
    archive = _archive()
    # Options are cut at blanks, and there is no way to quote one.
    if not archive.exists() or " " in str(archive):
        return ""
    return f"-XX:SharedArchiveFile={archive} -Xshare:auto -Xlog:disable -Xlog:all=error:stderr"


def make() -> None:
    """Make the archive by running a session."""
    archive = _archive()
    archive.parent.mkdir(parents=True, exist_ok=True)
    with open(archive.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if archive.exists():
            return
        aside = archive.with_suffix(".aside")
        aside.unlink(missing_ok=True)
        environment = os.environ | {"SPARK_SUBMIT_OPTS": f"{QUICK} -XX:ArchiveClassesAtExit={aside}"}
        done = subprocess.run([sys.executable, "-c", SESSION], env=environment, capture_output=True, check=False)
        if done.returncode or not aside.exists():
            print("spark_classes: Java made no archive of classes; the tests run without", file=sys.stderr)
            return
        for of_another in archive.parent.glob("*.jsa"):
            of_another.unlink()
        aside.rename(archive)


def _archive() -> Path:
    java = Path(shutil.which("java") or "java").resolve()
    modules = java.parent.parent / "lib" / "modules"
    spark = importlib.util.find_spec("pyspark")
    where = list(spark.submodule_search_locations or ()) if spark else []
    seen = [str(java), modules.stat().st_mtime_ns if modules.exists() else 0]
    seen += [
        (path.name, path.stat().st_size) for folder in where for path in sorted(Path(folder, "jars").glob("*.jar"))
    ]
    return CACHE / f"classes-{hashlib.sha256(repr([seen, where]).encode()).hexdigest()[:8]}.jsa"


if __name__ == "__main__":
    if shutil.which("java") and importlib.util.find_spec("pyspark"):
        make()
