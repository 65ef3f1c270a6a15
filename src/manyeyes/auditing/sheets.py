"""Contact sheets: the images that an audit names, for people to judge, as PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from manyeyes import storage
from manyeyes.auditing.findings import AuditResult, Cluster, Example
from manyeyes.auditing.lookup import read_pixels
from manyeyes.data.dataset import Dataset

_TILE = 112
_GAP = 8
_LINE = 14
_COLUMNS = 8
_MAX_ROWS = 24
_FONT, _SCALE, _INK = cv2.FONT_HERSHEY_SIMPLEX, 0.36, (40, 40, 40)
# As wide as a tile allows in that font.
_MAX_LETTERS = 19


@dataclass(frozen=True)
class Numbers:
    """Of the examples that a result names, in its order: clusters of them, outliers, label errors."""

    clusters: Sequence[Sequence[int]]
    outliers: Sequence[int]
    label_errors: Sequence[int]


@dataclass(frozen=True)
class _Row:
    """One line of a sheet: a title, and for each tile the number of its example and two lines of text."""

    title: str
    tiles: Sequence[tuple[int, str, str]]


def write_sheets(dataset: Dataset, result: AuditResult, numbers: Numbers, out: str) -> list[str]:
    """Write a sheet for each kind of finding that there is; of very many only the first are shown.

    Returns:
        The URIs of the sheets.
    """
    clusters = list(zip(result.clusters, numbers.clusters, strict=True))
    found = {
        "leaks.png": [_cluster(*pair) for pair in clusters if pair[0].is_leak],
        "duplicates.png": [_cluster(*pair) for pair in clusters if not pair[0].is_leak],
        "outliers.png": list(_outliers(result, numbers.outliers)),
        "label_errors.png": list(_label_errors(result, numbers.label_errors)),
    }
    files = []
    for name, rows in found.items():
        if rows:
            uri = storage.join(out, name)
            storage.write_bytes(uri, sheet_png(dataset, rows[:_MAX_ROWS]))
            files.append(uri)
    return files


def _cluster(cluster: Cluster, numbers: Sequence[int]) -> _Row:
    what = "exact copies" if cluster.all_copies else "near duplicates"
    labels = ", conflicting labels" if cluster.conflicting_labels else ""
    title = f"{len(cluster.examples)} {what} in {' and '.join(cluster.splits)}{labels}"
    chosen = _one_of_each_split_first(cluster.examples)[:_COLUMNS]
    return _Row(
        title,
        [
            (numbers[i], f"{example.split}: {example.class_name}", _name(example.path))
            for i, example in ((i, cluster.examples[i]) for i in chosen)
        ],
    )


def _one_of_each_split_first(examples: Sequence[Example]) -> list[int]:
    """So that a leak is seen also where only the first of many are shown."""
    seen: dict[str, int] = {}
    for i, example in enumerate(examples):
        seen.setdefault(example.split, i)
    return [*seen.values(), *(i for i in range(len(examples)) if i not in seen.values())]


def _outliers(result: AuditResult, numbers: Sequence[int]) -> Iterator[_Row]:
    for kind in dict.fromkeys(outlier.kind for outlier in result.outliers):
        of_kind = [(outlier, n) for outlier, n in zip(result.outliers, numbers, strict=True) if outlier.kind == kind]
        tiles = [(n, f"{outlier.value:,.4g}", _name(outlier.example.path)) for outlier, n in of_kind[: 3 * _COLUMNS]]
        yield from _rows(f"{len(of_kind):,} {kind}, the farthest out first", tiles)


def _label_errors(result: AuditResult, numbers: Sequence[int]) -> Iterator[_Row]:
    tiles = [
        (n, f"{error.example.class_name}?", f"-> {error.predicted}")
        for error, n in zip(result.label_errors, numbers, strict=True)
    ]
    yield from _rows(
        f"{len(tiles):,} probable label errors: the label, and what the model says", tiles[: _MAX_ROWS * _COLUMNS]
    )


def _rows(title: str, tiles: Sequence[tuple[int, str, str]]) -> Iterator[_Row]:
    for start in range(0, len(tiles), _COLUMNS):
        yield _Row(title if start == 0 else "", tiles[start : start + _COLUMNS])


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def sheet_png(dataset: Dataset, rows: Sequence[_Row]) -> bytes:
    """Draw a sheet; letters that the font lacks become question marks."""
    pixels = read_pixels(dataset, {number for row in rows for number, _, _ in row.tiles})
    width = _GAP + _COLUMNS * (_TILE + _GAP)
    row_height = _LINE + _GAP + _TILE + 2 * _LINE + _GAP
    sheet = np.full((_GAP + len(rows) * row_height, width, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        top = _GAP + i * row_height
        _write(sheet, row.title, _GAP, top + _LINE - 3, 200)
        for j, (number, first, second) in enumerate(row.tiles):
            left, upper = _GAP + j * (_TILE + _GAP), top + _LINE + _GAP // 2
            tile = _tile(pixels[number])
            y, x = upper + (_TILE - tile.shape[0]) // 2, left + (_TILE - tile.shape[1]) // 2
            sheet[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
            for line, text in enumerate((first, second), 1):
                _write(sheet, text, left, upper + _TILE + line * _LINE - 3, _MAX_LETTERS)
    return cv2.imencode(".png", sheet)[1].tobytes()


def _tile(image: np.ndarray) -> np.ndarray:
    """BGR, the longer side _TILE pixels; small images stay crisp."""
    image = cv2.cvtColor(image, cv2.COLOR_RGB2BGR if image.shape[2] == 3 else cv2.COLOR_GRAY2BGR)
    factor = _TILE / max(image.shape[:2])
    size = [max(1, round(side * factor)) for side in image.shape[1::-1]]
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_NEAREST)


def _write(sheet: np.ndarray, text: str, x: int, y: int, most: int) -> None:
    text = text.encode("ascii", "replace").decode()
    if len(text) > most:
        text = text[: most - 2] + ".."
    cv2.putText(sheet, text, (x, y), _FONT, _SCALE, _INK, 1, cv2.LINE_AA)
