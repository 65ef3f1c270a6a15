"""The search for near duplicates among millions of perceptual hashes, beside reading and sorting them once.

    python benchmarks/audit.py [--hashes 1000000 10000000] [--distance 6]

Of the generated hashes one in 50 has a near one planted, at exactly the distance. A search that compared all pairs
would take 5e11 comparisons for a million. The bound is what any search has to do: read the column from Parquet and
sort it. Every size runs in a process of its own, which reports its own peak memory. Goal: at most 5 times the bound for
each of the ways in which two bands of bits are chosen (28 for a distance of 6), as each way is a sort of its own, with
bits moved before and after and the comparisons within runs.

The second table times the measuring of an audit (brightness, sharpness, sizes) on one core beside the decoding alone.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

GOAL = 5.0
PLANTED_SHARE = 50
NUM_PHOTOS = 400


def generate(num: int, distance: int) -> np.ndarray:
    """`num` hashes with 32 bits set each, as of photos; the last ones are near the first ones."""
    draw = np.random.default_rng(0)
    hashes = np.zeros(num, np.uint64)
    for start in range(0, num, 1 << 18):
        # Which 32 of 64 bits: those of the lowest of 64 random numbers.
        ranks = np.argpartition(draw.random((min(1 << 18, num - start), 64), np.float32), 32, axis=1)[:, :32]
        hashes[start : start + len(ranks)] = np.bitwise_or.reduce(np.uint64(1) << ranks.astype(np.uint64), axis=1)
    planted = num // PLANTED_SHARE
    flips = np.argpartition(draw.random((planted, 64), np.float32), distance, axis=1)[:, :distance].astype(np.uint64)
    hashes[-planted:] = hashes[:planted] ^ np.bitwise_or.reduce(np.uint64(1) << flips, axis=1)
    return hashes


def search(path: str, distance: int) -> None:
    """The measured process: read, sort, search; report as JSON."""
    from manyeyes.data.near_hashes import connected, near_pairs

    for _ in range(2):  # the first time also loads what reads Parquet
        started = time.perf_counter()
        hashes = np.frombuffer(pq.read_table(path).column("phash").combine_chunks().buffers()[1], np.uint64)
        np.sort(hashes)
        bound = time.perf_counter() - started
    base = peak_bytes()
    started = time.perf_counter()
    unique, which = np.unique(hashes, return_inverse=True)
    pairs = near_pairs(unique, distance)
    clusters = connected(len(unique), pairs)
    seconds = time.perf_counter() - started
    planted = len(hashes) // PLANTED_SHARE
    assert np.array_equal(clusters[which[:planted]], clusters[which[-planted:]]), "a planted pair was not found"
    report = {"bound": bound, "seconds": seconds, "pairs": len(pairs), "base": base, "peak": peak_bytes()}
    print(json.dumps(report))


def peak_bytes() -> int:
    """Of this process alone: what getrusage says a process inherits from the one that started it."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def hashes_table(sizes: list[int], distance: int) -> Table:
    ways = math.comb(distance + 2, 2)
    table = Table(title=f"Near pairs of hashes, distance {distance}, {ways} sorts, one core")
    for heading in ("hashes", "bound, s", "search, s", f"ratio a sort (<= {GOAL:g})", "pairs"):
        table.add_column(heading, justify="right")
    for heading in ("before, MB", "peak, MB", "bytes a hash"):
        table.add_column(heading, justify="right")
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "hashes.parquet")
            pq.write_table(pa.table({"phash": generate(size, distance).view(np.int64)}), path)
            command = [sys.executable, __file__, "--search", path, "--distance", str(distance)]
            report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        table.add_row(
            f"{size:,}",
            f"{report['bound']:.2f}",
            f"{report['seconds']:.1f}",
            f"{report['seconds'] / report['bound'] / ways:.2f}",
            f"{report['pairs']:,}",
            f"{report['base'] / 1e6:,.0f}",
            f"{report['peak'] / 1e6:,.0f}",
            f"{(report['peak'] - report['base']) / size:,.0f}",
        )
    return table


def measuring_table() -> Table:
    from manyeyes.auditing.measuring import measure
    from manyeyes.data.dataset import Dataset
    from manyeyes.data.ingest import IngestSettings, ingest
    from manyeyes.engines.registry import create_engine
    from manyeyes.imaging.decode import inspect

    draw = np.random.default_rng(0)
    engine = create_engine("inline")
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        encoded = []
        for index in range(NUM_PHOTOS):
            image = cv2.resize(draw.integers(0, 256, (48, 64, 3), np.uint8), (500, 375), interpolation=cv2.INTER_CUBIC)
            encoded.append(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
            path = Path(folder) / "source" / "ab"[index % 2] / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded[-1])
        ingest(f"{folder}/source", f"{folder}/dataset", settings=IngestSettings(), engine=engine)
        dataset = Dataset(f"{folder}/dataset")
        rates = {}
        for name, run in (
            ("decoding", lambda: [inspect(content) for content in encoded]),
            ("measuring", lambda: measure(dataset, engine, lambda done, total: None)),
        ):
            run()
            started = time.perf_counter()
            run()
            rates[name] = NUM_PHOTOS / (time.perf_counter() - started)
    table = Table(title="Images/s of an audit, JPEG of 500 x 375, one core")
    for heading in ("decoding alone", "reading, decoding and measuring", "share (goal >= 0.7)"):
        table.add_column(heading, justify="right")
    table.add_row(
        f"{rates['decoding']:,.0f}", f"{rates['measuring']:,.0f}", f"{rates['measuring'] / rates['decoding']:.2f}"
    )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hashes", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--distance", type=int, default=6)
    parser.add_argument("--search", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.search:
        search(arguments.search, arguments.distance)
        return
    console = Console()
    console.print(hashes_table(arguments.hashes, arguments.distance))
    console.print(measuring_table())


if __name__ == "__main__":
    main()
