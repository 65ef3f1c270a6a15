"""What the tests of ingest share: pictures, an ingest on the inline engine, and a look at what it wrote."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.inline import InlineEngine

SMALL = IngestSettings(size=(16, 16))


def photo(seed: int, height: int = 20, width: int = 30) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return cv2.resize(draw.integers(0, 256, (4, 5, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)


def encode(image: np.ndarray, suffix: str = ".jpg") -> bytes:
    return cv2.imencode(suffix, image[:, :, ::-1])[1].tobytes()


def make(source, dataset, settings=SMALL, engine=None):
    return ingest(str(source), str(dataset), settings=settings, engine=engine or InlineEngine())


def examples(dataset: str):
    """(split, path, label, image, group) of every row."""
    opened = Dataset(dataset, verify="full")
    for shard in opened.manifest.shards:
        for rows in opened.rows(shard):
            for i in range(len(rows)):
                yield shard.split, rows.paths[i], int(rows.labels[i]), rows.images[i], rows.groups[i]


def quarantine(dataset) -> dict[str, dict]:
    tables = [pq.read_table(path) for path in sorted(Path(dataset, "quarantine").glob("*.parquet"))]
    return {row["path"]: row for table in tables for row in table.to_pylist()}


def files(dataset) -> dict[str, bytes]:
    return {str(p.relative_to(dataset)): p.read_bytes() for p in sorted(Path(dataset).rglob("*")) if p.is_file()}
