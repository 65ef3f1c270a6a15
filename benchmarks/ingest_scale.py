"""Ingest of ever longer tables of images: the driver's peak memory and the cost per image. Goal: both stay flat.

    python benchmarks/ingest_scale.py [--images 10000 200000 2000000] [--workers 2] [--distinct]

The table names 1,000 small PNG files again and again, so that a run of millions fits on a disk; to the driver each
row is an entry of its own; near-duplicates are dealt one by one (`--no-group-duplicates`). With --distinct the source
is an IDX file of as many different images, one in a hundred in a second version, and near-duplicates are looked for
and brought together, which takes the driver some memory for each image. Every size runs in a process of its own, which
reports its own peak memory (not its workers') and the CPU time that it and its workers used.
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


def write_idx(folder: Path, num_images: int) -> Path:
    """Smooth random images of 28 x 28 pixels; each hundredth is the one before it, a little brighter."""
    source = folder / str(num_images)
    source.mkdir()
    draw = np.random.default_rng(0)
    with (source / "images-idx3-ubyte").open("wb") as file:
        file.write(bytes([0, 0, 8, 3]) + np.array([num_images, 28, 28], ">u4").tobytes())
        for index in range(num_images):
            if index % 100 != 99:
                image = cv2.resize(draw.integers(0, 240, (9, 9), np.uint8), (28, 28), interpolation=cv2.INTER_CUBIC)
            file.write((image + np.uint8(index % 100 == 99)).tobytes())
    labels = (np.arange(num_images) // 100 % 10).astype(np.uint8)
    (source / "labels-idx1-ubyte").write_bytes(
        bytes([0, 0, 8, 1]) + np.array([num_images], ">u4").tobytes() + labels.tobytes()
    )
    return source


def run_driver(source: str, dataset: str, num_workers: int, group_duplicates: bool) -> None:
    """The measured process: ingest and report as JSON."""
    from manyeyes.data.ingest import IngestSettings, ingest
    from manyeyes.engines.registry import create_engine

    started = time.perf_counter()
    settings = IngestSettings(size=(28, 28), channels=1, group_duplicates=group_duplicates)
    result = ingest(source, dataset, settings=settings, engine=create_engine("local", num_workers))
    seconds = time.perf_counter() - started
    own, workers = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    report = {
        "peak_bytes": own.ru_maxrss << 10,
        "driver_seconds": own.ru_utime + own.ru_stime,
        "worker_seconds": workers.ru_utime + workers.ru_stime,
        "seconds": seconds,
        "num_written": result.num_written,
        "num_shards": result.num_shards,
        "num_moved": result.num_moved,
    }
    print(json.dumps(report))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[10_000, 200_000, 2_000_000])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--distinct", action="store_true", help="different images, and a look for near-duplicates")
    parser.add_argument("--driver", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.driver:
        run_driver(*arguments.driver, arguments.workers, arguments.distinct)
        return
    reports = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_images(folder)
        for num_images in arguments.images:
            source = write_idx(folder, num_images) if arguments.distinct else write_table(folder, num_images)
            with tempfile.TemporaryDirectory() as dataset:
                command = [
                    sys.executable,
                    __file__,
                    "--workers",
                    str(arguments.workers),
                    "--driver",
                    str(source),
                    dataset,
                    *(["--distinct"] if arguments.distinct else []),
                ]
                reports[num_images] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            assert reports[num_images]["num_written"] == num_images
    least = reports[min(reports)]
    table = Table(title=f"Ingest of 28 px images, {arguments.workers} workers")
    for heading in ("images", "shards", "driver peak MiB", f"ratio (goal <= {GOAL})"):
        table.add_column(heading, justify="right")
    for heading in ("driver us/image", "worker us/image", "images/s", "moved"):
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
            f"{report['num_moved']:,}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
