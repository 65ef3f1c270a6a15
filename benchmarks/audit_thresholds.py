"""Which distance of hashes and which correlation of thumbnails tell versions of a photo from other photos.

    python benchmarks/audit_thresholds.py [--photos photos.csv] [--idx FOLDER]

Takes foolbox's 20 photos, and the pictures of a table with a column `path` (scripts/demo_data.py photos TARGET). Each
is encoded again, resized and cropped: the share that is still found is the recall. Different pictures that count as the
same are the errors. --idx adds the hard case, Fashion-MNIST (a folder of IDX files): 70,000 different images of 28 x 28
that look much alike; there the sizes of clusters are shown, by hashes alone and with thumbnails.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from collections.abc import Callable
from pathlib import Path

import cv2
import foolbox
import numpy as np
from rich.console import Console
from rich.table import Table

from manyeyes.data.duplicates import DEFAULT_DISTANCE, MIN_CORRELATION, Thumbnails, thumbnails_of
from manyeyes.data.near_hashes import connected, near_pairs
from manyeyes.imaging.decode import decode
from manyeyes.imaging.phash import perceptual_hash

DISTANCES = (2, 4, 6, 8)
CORRELATIONS = (0.98, 0.99, 0.995)


def encoded_again(quality: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda image: cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], 1)


def resized(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda image: cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)


def cropped(share: float) -> Callable[[np.ndarray], np.ndarray]:
    def crop(image: np.ndarray) -> np.ndarray:
        rows, columns = (int(side * share / 2) for side in image.shape[:2])
        return image[rows : image.shape[0] - rows, columns : image.shape[1] - columns]

    return crop


VARIANTS = {
    "JPEG, quality 75": encoded_again(75),
    "JPEG, quality 40": encoded_again(40),
    "JPEG, quality 20": encoded_again(20),
    "half the size": resized(0.5),
    "half the size, JPEG 60": lambda image: encoded_again(60)(resized(0.5)(image)),
    "a third of the size": resized(0.33),
    "cropped by 1 %": cropped(0.01),
    "cropped by 2 %": cropped(0.02),
    "cropped by 3 %": cropped(0.03),
    "cropped by 4 %": cropped(0.04),
    "cropped by 10 %": cropped(0.10),
    "2 % off at one corner": lambda image: image[round(image.shape[0] * 0.02) :, round(image.shape[1] * 0.02) :],
    "20 grey values brighter": lambda image: cv2.convertScaleAbs(image, alpha=1, beta=20),
    "grey": lambda image: cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[:, :, None],
}


def hashes_of(images: list[np.ndarray]) -> np.ndarray:
    return np.array([perceptual_hash(image) for image in images], np.int64).view(np.uint64)


def looks_of(images: list[np.ndarray]) -> np.ndarray:
    return np.stack([thumbnails_of(image) for image in images])


def photos_table(images: list[np.ndarray]) -> Table:
    table = Table(title=f"{len(images)} photos: share of versions that are found")
    table.add_column("version")
    for distance in DISTANCES:
        table.add_column(f"≤ {distance} bits, ≥ {MIN_CORRELATION}", justify="right")
    for correlation in CORRELATIONS:
        table.add_column(f"≤ {DEFAULT_DISTANCE} bits, ≥ {correlation}", justify="right")
    hashes, looks = hashes_of(images), looks_of(images)
    for name, change in VARIANTS.items():
        versions = [change(image) for image in images]
        distances = np.bitwise_count(hashes ^ hashes_of(versions))
        both = Thumbnails(np.concatenate([looks, looks_of(versions)]))
        pairs = np.stack([np.arange(len(images)), np.arange(len(images)) + len(images)], axis=1)
        agree = both.agree(pairs)
        found = [(distances <= distance) & agree for distance in DISTANCES]
        found += [(distances <= DEFAULT_DISTANCE) & both.agree(pairs, least) for least in CORRELATIONS]
        table.add_row(name, *(f"{of_one.mean():.3f}" for of_one in found))
    one, other = np.triu_indices(len(images), 1)
    distances = np.bitwise_count(hashes[one] ^ hashes[other])
    near = distances <= max(DISTANCES)
    pairs, distances = np.stack([one[near], other[near]], axis=1), distances[near]
    thumbnails = Thumbnails(looks)
    table.add_section()
    within = [distances <= distance for distance in DISTANCES]
    num_pairs = len(images) * (len(images) - 1) // 2
    table.add_row(f"of {num_pairs:,} different pairs, by hash", *(str(of_one.sum()) for of_one in within))
    within = [of_one & thumbnails.agree(pairs) for of_one in within]
    within += [(distances <= DEFAULT_DISTANCE) & thumbnails.agree(pairs, least) for least in CORRELATIONS]
    table.add_row("… and by thumbnail", *(str(of_one.sum()) for of_one in within))
    return table


def idx_table(folder: Path) -> Table:
    files = sorted(folder.glob("*images-idx3-ubyte.gz"))
    contents = [gzip.decompress(file.read_bytes()) for file in files]
    pixels = np.concatenate([np.frombuffer(content, np.uint8, offset=16) for content in contents])
    images = list(pixels.reshape(-1, 28, 28, 1))
    hashes, thumbnails = hashes_of(images), Thumbnails(looks_of(images))
    unique, first = np.unique(hashes, return_index=True)
    table = Table(title=f"{len(images):,} images of {folder.name}, of which {len(unique):,} differ in their hashes")
    for heading in ("bits", "correlation", "near pairs", "images in clusters", "largest cluster"):
        table.add_column(heading, justify="right")
    for distance in DISTANCES[:3]:
        pairs = near_pairs(unique, distance)
        for correlation in (-1.0, *CORRELATIONS):
            chosen = pairs[thumbnails.agree(first[pairs], correlation)] if correlation > 0 else pairs
            sizes = np.bincount(connected(len(unique), chosen))
            in_clusters = f"{sizes[sizes > 1].sum():,}"
            least = "any" if correlation < 0 else f"≥ {correlation}"
            table.add_row(f"≤ {distance}", least, f"{len(chosen):,}", in_clusters, f"{sizes.max():,}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--idx", type=Path)
    arguments = parser.parse_args()
    paths = sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))
    if arguments.photos:
        with arguments.photos.open(newline="") as file:
            paths += [Path(row["path"]) for row in csv.DictReader(file)]
    console = Console()
    console.print(photos_table([decode(path.read_bytes()) for path in paths]))
    if arguments.idx:
        console.print(idx_table(arguments.idx))


if __name__ == "__main__":
    main()
