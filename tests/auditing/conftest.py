"""A dataset with known faults, made by a real ingest, and one without."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.registry import create_engine

SIDE = 120


def photo(seed: int, height: int = SIDE, width: int = SIDE) -> np.ndarray:
    """A picture with structure on all scales, unlike any of another seed."""
    draw = np.random.default_rng(seed)
    image = np.zeros((height, width, 3), np.float32)
    for cells in (3, 6, 12, 40):
        image += cv2.resize(draw.normal(size=(cells, cells, 3)).astype(np.float32), (width, height)) * 40 / cells**0.5
    return np.clip(image + 128, 0, 255).astype(np.uint8)


def write_source(folder: Path, rows: list[tuple[str, np.ndarray, str, str, str]]) -> str:
    """Write (name, image, label, split, group) as files and the table that names them; .jpg is of quality 40."""
    folder.mkdir(parents=True)
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split", "group"])
        for name, image, label, split, group in rows:
            options = [cv2.IMWRITE_JPEG_QUALITY, 40] if name.endswith(".jpg") else []
            (folder / name).write_bytes(cv2.imencode(Path(name).suffix, image, options)[1].tobytes())
            writer.writerow([name, label, split, group])
    return str(folder / "table.csv")


def clean_rows() -> list[tuple[str, np.ndarray, str, str, str]]:
    """48 photos of two classes: 36 in train, 6 in val, 6 in test."""
    splits = ["train"] * 6 + ["val", "test"]
    return [(f"{i:02d}.png", photo(i), ("cat", "dog")[i % 2], splits[i // 2 % 8], "") for i in range(48)]


def messy_rows() -> list[tuple[str, np.ndarray, str, str, str]]:
    rows = clean_rows()
    assert [rows[i][3] for i in (0, 2, 4, 12, 14)] == ["train", "train", "train", "val", "test"]
    black = np.zeros((SIDE, SIDE, 3), np.uint8)
    rows += [
        # A leak: 00.png is in train.
        ("copy.png", photo(0), "cat", "test", ""),
        # A leak that is no copy: 02.png is in train.
        ("again.jpg", photo(2), "cat", "val", ""),
        # The same content with two labels, both in train.
        ("other label é.png", photo(4), "dog", "train", ""),
        # Flat images: copies of each other, near nothing.
        ("flat 1.png", black + 125, "cat", "train", ""),
        ("flat 2.png", black + 125, "cat", "train", ""),
        ("flat 3.png", black + 131, "cat", "train", ""),
        # A group in two splits.
        ("scene 1.png", photo(101), "cat", "train", "scene"),
        ("scene 2.png", photo(102), "dog", "test", "scene"),
        # A class with three examples, none of them in val and test.
        *((f"bird {i}.png", photo(110 + i), "bird", "train", "") for i in range(3)),
        # Odd ones.
        ("dark.png", photo(120) // 16, "cat", "train", ""),
        ("blurred.png", cv2.GaussianBlur(photo(121), (0, 0), 15), "dog", "train", ""),
        ("wide.png", photo(122, 30, 480), "dog", "train", ""),
        ("small.png", photo(123, 12, 12), "dog", "train", ""),
    ]
    return rows


def relisted_rows() -> list[tuple[str, np.ndarray, str, str, str]]:
    """Files that are listed twice: with another label in the same or another split, and in two splits."""
    rows = clean_rows()
    assert [rows[i][3] for i in (0, 5, 14, 20)] == ["train", "train", "test", "train"]
    listed_again = [(0, "dog", "train"), (5, "cat", "test"), (14, "dog", "train"), (20, "cat", "test")]
    return rows + [(f"{i:02d}.png", photo(i), label, split, "") for i, label, split in listed_again]


def conflicting_rows() -> list[tuple[str, np.ndarray, str, str, str]]:
    """Each of 4 photos is a cat and a dog."""
    return [(f"{label} {i}.png", photo(i), label, "train", "") for i in range(4) for label in ("cat", "dog")]


def emptying_rows() -> list[tuple[str, np.ndarray, str, str, str]]:
    """Cats and dogs of which those in test, and all birds of train and val, are also listed as something else."""
    birds = [(f"bird {i}.png", photo(60 + i), "bird", ("train", "val")[i % 2], "") for i in range(4)]
    rows = clean_rows() + birds
    doubted = [row for row in rows if row[3] == "test"] + birds
    return rows + [(f"again {name}", image, "fish", "val", "") for name, image, *_ in doubted]


def make(folder: Path, rows: list[tuple[str, np.ndarray, str, str, str]], **settings: object) -> str:
    source = write_source(folder / "source", rows)
    dataset = str(folder / "dataset")
    ingest(source, dataset, settings=IngestSettings(**settings), engine=create_engine("inline"))
    return dataset


@pytest.fixture(scope="session")
def messy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset with the faults of `messy_rows`. Only to be read."""
    return make(tmp_path_factory.mktemp("messy"), messy_rows())


@pytest.fixture(scope="session")
def clean(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset without a fault, stored as raw pixels. Only to be read."""
    return make(tmp_path_factory.mktemp("clean"), clean_rows(), size=(48, 48))


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """make_dataset(kind, **settings of the ingest): a dataset of "messy", "clean" or other rows."""
    rows = {
        "messy": messy_rows,
        "clean": clean_rows,
        "relisted": relisted_rows,
        "conflicting": conflicting_rows,
        "emptying": emptying_rows,
    }
    return lambda kind, **settings: make(tmp_path_factory.mktemp(kind), rows[kind](), **settings)
