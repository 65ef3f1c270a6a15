"""What an engine costs: its start-up, each task, and ingest beside the local engine, on the same cores and images.

    eval "$(scripts/spark-standalone start /tmp/spark)" "$(scripts/hadoop-minicluster start /tmp/hadoop)"
    python benchmarks/engines.py [--images 4000] [--tasks 200] [--workers 2]

An engine whose cluster is not in the environment (SPARK_MASTER, HADOOP_HOME) is left out and said. "First job" is one
empty task on a new driver: it holds the start of processes, of a Spark session, of a YARN application. "Second job" is
the same again, on the same driver. "Per task" is what each further empty task adds, per worker. Ingest keeps 500x375
JPEGs as they are, verified; its bound is the local engine in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from ingest import make_photo
from rich.console import Console
from rich.table import Table

NUM_DISTINCT = 200


def make_photos(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for index in range(NUM_DISTINCT):
        (folder / f"{index:03d}.jpg").write_bytes(make_photo(draw))


def write_table(folder: Path, num_images: int) -> Path:
    path = folder / "photos.csv"
    rows = "".join(f"{index % NUM_DISTINCT:03d}.jpg,class {index % 10}\n" for index in range(num_images))
    path.write_text(f"path,label\n{rows}")
    return path


def run_driver(name: str, workers: int, settings: dict, num_tasks: int, table: str, dataset: str) -> dict:
    """The measured process."""
    from manyeyes.data.ingest import IngestSettings, ingest
    from manyeyes.engines.registry import create_engine

    engine = create_engine(name, workers, settings)

    def seconds_of(count: int) -> float:
        started = time.perf_counter()
        assert engine.map(abs, range(count)) == list(range(count))
        return time.perf_counter() - started

    first, second, many = seconds_of(1), seconds_of(1), seconds_of(num_tasks)
    # The better of two: neighbours on the machine, and its disk, can only slow a run down.
    # The photos repeat.
    dealt = IngestSettings(group_duplicates=False)
    results = [ingest(table, f"{dataset}/{number}", settings=dealt, engine=engine) for number in range(2)]
    return {
        "first": first,
        "second": second,
        "per_task": max(0.0, many - second) / num_tasks * engine.num_workers,
        "images_per_second": max(result.images_per_second for result in results),
        "num_written": min(result.num_written for result in results),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--tasks", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--driver", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.driver:
        request = json.loads(arguments.driver)
        print(json.dumps(run_driver(*request)))
        return
    engines: list[tuple[str, str, dict]] = [("inline", "inline", {}), ("local", "local", {})]
    engines.append(("spark, local", "spark", {"master": f"local[{arguments.workers}]"}))
    console = Console()
    if "SPARK_MASTER" in os.environ:
        engines.append(("spark, standalone", "spark", {"master": os.environ["SPARK_MASTER"]}))
    else:
        console.print("Left out: Spark standalone, as SPARK_MASTER is not set.")
    if "HADOOP_HOME" in os.environ:
        engines.append(("hadoop", "hadoop", {}))
    else:
        console.print("Left out: Hadoop, as HADOOP_HOME is not set.")
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        make_photos(Path(folder))
        table = write_table(Path(folder), arguments.images)
        for label, name, settings in engines:
            with tempfile.TemporaryDirectory() as dataset:
                request = json.dumps([name, arguments.workers, settings, arguments.tasks, str(table), dataset])
                command = [sys.executable, __file__, "--driver", request]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            reports[label] = json.loads(done.stdout)
            assert reports[label]["num_written"] == arguments.images
    shown = Table(title=f"Engines, {arguments.workers} workers, ingest of {arguments.images:,} JPEGs of 500x375")
    shown.add_column("engine")
    for heading in ("first job s", "second job s", "per task ms", "ingest images/s", "ingest / local"):
        shown.add_column(heading, justify="right")
    for label, report in reports.items():
        shown.add_row(
            label,
            f"{report['first']:.2f}",
            f"{report['second']:.2f}",
            f"{1e3 * report['per_task']:.1f}",
            f"{report['images_per_second']:,.0f}",
            f"{report['images_per_second'] / reports['local']['images_per_second']:.2f}",
        )
    console.print(shown)


if __name__ == "__main__":
    main()
