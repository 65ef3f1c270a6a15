"""Ingest of 500x375 JPEGs on two workers, against twice what one thread decodes. Goal: at least 0.8.

    python benchmarks/ingest.py [--images 4000] [--repeats 3] [--workers 2]

Both are measured in the same run on the same bytes, in turns, and the best of each is taken: neighbours on the machine
can only slow a run down. "Steady" leaves out the start of the worker processes and the listing: it counts from the
first finished shard to the last. The photos repeat, so near-duplicates are not looked for (`--no-group-duplicates`).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.registry import create_engine
from manyeyes.imaging.decode import decode
from manyeyes.imaging.preprocessing import Preprocessing

GOAL = 0.8
NUM_DISTINCT = 200


def make_photo(draw: np.random.Generator) -> bytes:
    """A JPEG with the statistics of a photo: large soft shapes, and texture over them."""
    shapes = cv2.resize(draw.integers(0, 256, (6, 8, 3), np.uint8), (500, 375), interpolation=cv2.INTER_CUBIC)
    detail = cv2.resize(draw.integers(0, 256, (94, 125, 3), np.uint8), (500, 375), interpolation=cv2.INTER_CUBIC)
    grain = draw.normal(0, 4, (375, 500, 1))
    image = np.clip(shapes * 0.8 + detail * 0.2 + grain, 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def rate_of(work: Callable[[bytes], object], encoded: list[bytes], seconds: float = 2.0) -> float:
    """Images/s of a function of encoded bytes, on this thread."""
    cv2.setNumThreads(1)
    count, started = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        work(encoded[count % len(encoded)])
        count += 1
    return count / elapsed


def ingest_rates(source: str, num_workers: int, settings: IngestSettings) -> tuple[float, float]:
    """Images/s of a whole ingest, and from the first finished shard to the last."""
    finished: list[tuple[float, int]] = []

    def on_progress(phase: str, done: int, total: int | None) -> None:
        if phase == "write" and done:
            finished.append((time.perf_counter(), done))

    with tempfile.TemporaryDirectory() as folder:
        engine = create_engine("local", num_workers)
        result = ingest(source, f"{folder}/dataset", settings=settings, engine=engine, on_progress=on_progress)
    # Workers begin together: with the first shard of each out, all are at full speed.
    (first_time, first_count), (last_time, last_count) = finished[num_workers - 1], finished[-num_workers]
    return result.images_per_second, (last_count - first_count) / (last_time - first_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    draw = np.random.default_rng(0)
    encoded = [make_photo(draw) for _ in range(NUM_DISTINCT)]
    cases = {
        "raw, 160 pixels": IngestSettings(size=(160, 160), encoding="raw", group_duplicates=False),
        "jpeg, originals kept": IngestSettings(encoding="jpeg", group_duplicates=False),
    }
    preprocessing = Preprocessing.for_size(160, 160)
    decoded = preprocessed = 0.0
    whole, steady = dict.fromkeys(cases, 0.0), dict.fromkeys(cases, 0.0)
    with tempfile.TemporaryDirectory() as source:
        for number in range(arguments.images):
            path = Path(source) / f"class{number % 4}" / f"{number:06d}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(encoded[number % NUM_DISTINCT])
        for _ in range(arguments.repeats):
            decoded = max(decoded, rate_of(decode, encoded))
            preprocessed = max(preprocessed, rate_of(preprocessing, encoded))
            for name, settings in cases.items():
                rates = ingest_rates(source, arguments.workers, settings)
                whole[name], steady[name] = max(whole[name], rates[0]), max(steady[name], rates[1])
    bound = arguments.workers * decoded
    table = Table(
        title=f"{arguments.images} JPEGs of 500x375, {np.mean([len(e) for e in encoded]) / 1024:.0f} KiB each"
    )
    for heading in ("", "images/s", f"of {arguments.workers} x decode", "goal"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("decode, one thread", f"{decoded:,.0f}", f"{1 / arguments.workers:.2f}", "")
    # What the decoder leaves to an ingest with a size, were all else free.
    table.add_row("decode and resize to 160, one thread", f"{preprocessed:,.0f}", f"{preprocessed / bound:.2f}", "")
    for name in cases:
        table.add_row(f"{name}: whole", f"{whole[name]:,.0f}", f"{whole[name] / bound:.2f}", "")
        table.add_row(f"{name}: steady", f"{steady[name]:,.0f}", f"{steady[name] / bound:.2f}", f"{GOAL}")
    Console().print(table)


if __name__ == "__main__":
    main()
