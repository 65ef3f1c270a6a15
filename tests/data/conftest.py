"""Tiny datasets on disk, written with pyarrow alone, so that reading is tested apart from ingest."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingesting import encode, photo
from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.data.manifest import Counts, Manifest, ShardInfo
from manyeyes.imaging.preprocessing import Preprocessing

WriteDataset = Callable[..., Dataset]


@pytest.fixture(scope="session")
def write_dataset(tmp_path_factory: pytest.TempPathFactory) -> WriteDataset:
    """write_dataset(images, labels=None, row_group_rows=(…), …): one split "train", in shards of 3 row groups.

    `images` is a uint8 array (n, H, W, C) for the raw encoding, or a list of encoded images for jpeg.
    """
    numbers = itertools.count()

    def write(
        images: np.ndarray | Sequence[bytes],
        labels: np.ndarray | None = None,
        row_group_rows: Sequence[int] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        channels: int | None = None,
    ) -> Dataset:
        root = tmp_path_factory.mktemp(f"dataset{next(numbers)}")
        is_raw = isinstance(images, np.ndarray)
        count = len(images)
        labels = np.arange(count, dtype=np.int32) % 3 if labels is None else labels.astype(np.int32)
        row_group_rows = tuple(row_group_rows or (count,))
        assert sum(row_group_rows) == count
        if is_raw:
            image_shape = images.shape[1:]
        preprocessing = Preprocessing(channels=channels or (image_shape[2] if image_shape else 3))
        shards = []
        (root / "shards").mkdir()
        start = 0
        for number, first in enumerate(range(0, len(row_group_rows), 3)):
            groups = row_group_rows[first : first + 3]
            path = root / "shards" / f"part-{number:05d}.parquet"
            writer = None
            for rows in groups:
                table = _table(images, labels, start, start + rows)
                writer = writer or pq.ParquetWriter(
                    path, table.schema, compression="none", use_dictionary=False, write_page_checksum=True
                )
                writer.write_table(table, row_group_size=max(1, rows))
                start += rows
            writer.close()
            uri = str(path)
            shards.append(
                ShardInfo(path.name, "train", tuple(groups), storage.size_bytes(uri), storage.sha256_of_file(uri))
            )
        written = {"train": np.bincount(labels, minlength=3).tolist()}
        Manifest(
            class_names=("a", "b", "c"),
            encoding="raw" if is_raw else "jpeg",
            preprocessing=preprocessing.to_dict(),
            preprocessing_fingerprint=preprocessing.fingerprint,
            image_shape=image_shape,
            num_seen=count,
            counts=Counts(written=written),
            shards=tuple(shards),
        ).save(str(root))
        return Dataset(str(root))

    return write


def _table(images: np.ndarray | Sequence[bytes], labels: np.ndarray, start: int, stop: int) -> pa.Table:
    encoded = [image.tobytes() if isinstance(image, np.ndarray) else image for image in images[start:stop]]
    paths = [f"images/{index:06d}.jpg" for index in range(start, stop)]
    image = pa.StructArray.from_arrays(
        [pa.array(encoded, pa.binary()), pa.array(paths, pa.string())], names=["bytes", "path"]
    )
    return pa.table({"image": image, "label": pa.array(labels[start:stop], pa.int32())})


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """60 clean JPEGs in three classes."""
    root = tmp_path_factory.mktemp("photos")
    for number in range(60):
        path = root / "abc"[number % 3] / f"{number:03d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(encode(photo(number)))
    return str(root)
