"""What an audit measures of every example: the map function over the shards, and what it brings back in columns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from manyeyes.auditing.order import in_order
from manyeyes.data.dataset import Dataset, Split
from manyeyes.data.duplicates import pixels_of
from manyeyes.data.splits import group_number
from manyeyes.engines.base import Engine
from manyeyes.evaluation.tasks import Part, cut
from manyeyes.imaging.phash import perceptual_hash

# Sharpness is measured at this shorter side in pixels, so that a camera of more pixels is not sharper for that.
_SHARPNESS_SIDE = 96
_ROW = np.dtype(
    [
        ("label", "<i4"),
        ("group", "<i8"),
        ("phash", "<i8"),
        ("pixels", "<f4"),
        ("aspect", "<f4"),
        ("brightness", "<f4"),
        ("sharpness", "<f4"),
    ]
)


@dataclass(frozen=True)
class Measured:
    """Of all n examples, numbered through the shards of the manifest.

    Attributes:
        split_names: of the dataset, in their usual order.
        splits: int8 (n,): positions in split_names.
        labels: int32 (n,).
        groups: int64 (n,): equal where the group's name is; -1 without a group.
        hashes: int64 (n,): perceptual hashes.
        pixels: float32 (n,): of the source image where the dataset knows its size, else as it is stored.
        aspect: float32 (n,): width divided by height.
        brightness: float32 (n,): mean grey value, 0 to 255.
        sharpness: float32 (n,): variance of the Laplacian of grey values at a shorter side of 96 pixels at most.
    """

    split_names: tuple[str, ...]
    splits: np.ndarray
    labels: np.ndarray
    groups: np.ndarray
    hashes: np.ndarray
    pixels: np.ndarray
    aspect: np.ndarray
    brightness: np.ndarray
    sharpness: np.ndarray


def measure(dataset: Dataset, engine: Engine, on_progress: Callable[[int, int], None]) -> Measured:
    """Read every example once; 36 bytes of each come back.

    Args:
        on_progress: called with the number of examples that were handed out so far, and the number of all.

    Raises:
        DatasetError: a shard is damaged, or an image can't be decoded.
    """
    shards = dataset.manifest.shards
    total = sum(shard.num_rows for shard in shards)

    def parts() -> Iterator[Part]:
        done = 0
        for part in cut(Split("", shards)):
            on_progress(done, total)
            yield part
            done += part.num_examples
        on_progress(total, total)

    rows = np.frombuffer(b"".join(engine.map(functools.partial(_measure_part, dataset), parts())), _ROW)
    names = in_order({shard.split for shard in shards})
    splits = np.array([names.index(shard.split) for shard in shards], np.int8)
    return Measured(
        names,
        np.repeat(splits, [shard.num_rows for shard in shards]),
        *(np.ascontiguousarray(rows[name]) for name in ("label", "group", "phash")),
        *(np.ascontiguousarray(rows[name]) for name in ("pixels", "aspect", "brightness", "sharpness")),
    )


def _measure_part(dataset: Dataset, part: Part) -> bytes:
    measured = np.zeros(part.num_examples, _ROW)
    at = 0
    with dataset.open_shard(part.shard) as reader:
        for index in part.row_groups:
            group = reader.read(index)
            table = reader.read_table(index, ("width", "height", "phash"))
            # A dataset that was written by other means than an ingest may lack them.
            known = {name: table.column(name).to_pylist() for name in table.column_names}
            for row, image in enumerate(group.images):
                pixels, height, width = pixels_of(dataset, image, group.paths[row])
                if "width" in known and "height" in known:
                    height, width = known["height"][row], known["width"][row]
                phash = known["phash"][row] if "phash" in known else perceptual_hash(pixels)
                looks = (width * height, width / height, *_look(pixels))
                measured[at] = (int(group.labels[row]), group_number(group.groups[row]), phash, *looks)
                at += 1
    return measured.tobytes()


def _look(image: np.ndarray) -> tuple[float, float]:
    """The brightness and the sharpness of uint8 pixels (height, width, channels)."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) if image.shape[2] == 3 else image[:, :, 0]
    brightness = float(grey.mean())
    factor = _SHARPNESS_SIDE / min(grey.shape)
    if factor < 1:
        size = [max(1, round(side * factor)) for side in grey.shape[::-1]]
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return brightness, float(cv2.Laplacian(grey, cv2.CV_32F).var())
