"""Ingest of ever longer tables of images: the driver's peak memory and the cost per image. Goal: both stay flat.

    python benchmarks/ingest_scale.py [--images 10000 200000 2000000] [--workers 2]

The table names 1,000 small PNG files again and again, so that a run of millions fits on a disk; to the driver each
row is an entry of its own; near-duplicates are dealt one by one (`--no-group-duplicates`; the search for them has
benchmarks/audit.py). Every size runs in a process of its own, which reports its own peak memory (not its
workers') and the CPU time that it and its workers used.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

NUM_DISTINCT = 1000
GOAL = 1.5


def make_images(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for index in range(NUM_DISTINCT):
        cv2.imwrite(str(folder / f"{index:03d}.png"), draw.integers(0, 256, (28, 28), np.uint8))


def write_table(folder: Path, num_images: int) -> Path:
    path = folder / f"{num_images}.csv"
    with path.open("w") as file:
        file.write("path,label\n")
        file.writelines(f"{index % NUM_DISTINCT:03d}.png,class {index * 7919 % 10}\n" for index in range(num_images))
    return path


def run_driver(table: str, dataset: str, num_workers: int) -> None:
    """The measured process: ingest and report as JSON."""
    from manyeyes.data.ingest import IngestSettings, ingest
    from manyeyes.engines.registry import create_engine

    started = time.perf_counter()
    settings = IngestSettings(size=(28, 28), channels=1, group_duplicates=False)
    result = ingest(table, dataset, settings=settings, engine=create_engine("local", num_workers))
    seconds = time.perf_counter() - started
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {
        "peak_bytes": own.ru_maxrss << 10,
        "driver_seconds": own.ru_utime + own.ru_stime,
        "worker_seconds": workers.ru_utime + workers.ru_stime,
        "seconds": seconds,
        "num_written": result.num_written,
        "num_shards": result.num_shards,
    }
    print(json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 200_000, 2_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--driver", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.driver:
        run_driver(*arguments.driver, arguments.workers)
        return
    reports = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder)
        for num_images in arguments.images:
            table = write_table(folder, num_images)
            with tempfile.TemporaryDirectory() as dataset:
                command = [
                    sys.executable,
                    __file__,
                    "--workers",
                    str(arguments.workers),
                    "--driver",
                    str(table),
                    dataset,
                ]
                reports[num_images] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            assert reports[num_images]["num_written"] == num_images
    least = reports[min(reports)]
    table = Table(title=f"Ingest of 28 px PNGs by a table, {arguments.workers} workers")
    for heading in ("images", "shards", "driver peak MiB", f"ratio (goal <= {GOAL})"):
        table.add_column(heading, justify="right")
    for heading in ("driver us/image", "worker us/image", "images/s"):
        table.add_column(heading, justify="right")
    for num_images, report in reports.items():
        table.add_row(
            f"{num_images:,}",
            str(report["num_shards"]),
            f"{report['peak_bytes'] / 2**20:.0f}",
            f"{report['peak_bytes'] / least['peak_bytes']:.2f}",
            f"{report['driver_seconds'] / num_images * 1e6:.0f}",
            f"{report['worker_seconds'] / num_images * 1e6:.0f}",
            f"{num_images / report['seconds']:,.0f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
