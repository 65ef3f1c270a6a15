"""Views: other splits of a dataset without a copy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from manyeyes.data.dataset import Dataset
from manyeyes.data.pipeline import InputPipeline
from manyeyes.data.view import ViewRows, write_view
from manyeyes.errors import DatasetError


def _labels(dataset: Dataset, shard: object) -> np.ndarray:
    return np.concatenate([rows.labels for rows in dataset.rows(shard)])  # type: ignore[arg-type]


def _paths(dataset: Dataset, split: str) -> list[str]:
    return [path for shard in dataset.split(split).shards for rows in dataset.rows(shard) for path in rows.paths]


def _write(dataset: Dataset, out: str, split_of: dict[str, str]) -> Dataset:
    """A view that puts each path where `split_of` says, or nowhere."""
    rows = []
    for shard in dataset.manifest.shards:
        paths = [path for group in dataset.rows(shard) for path in group.paths]
        splits = np.array([split_of.get(path, "") for path in paths])
        rows.append(ViewRows(shard, _labels(dataset, shard), splits))
    write_view(dataset, out, rows)
    return Dataset(out, verify="full")


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10_000), num_splits=st.integers(1, 4))
def test_a_view_has_each_row_where_it_was_put_and_its_counts_balance(
    small_dataset: str, tmp_path_factory: pytest.TempPathFactory, seed: int, num_splits: int
) -> None:
    dataset = Dataset(small_dataset)
    draw = np.random.default_rng(seed)
    names = ["", *(f"fold-{i}" for i in range(num_splits))]
    by_name = sorted(dataset.manifest.shards, key=lambda shard: shard.name)
    every_path = [path for shard in by_name for rows in dataset.rows(shard) for path in rows.paths]
    split_of = {path: str(draw.choice(names)) for path in every_path}
    view = _write(dataset, str(tmp_path_factory.mktemp("view")), split_of)
    assert view.manifest.balances
    for name in view.split_names:
        assert _paths(view, name) == [path for path in every_path if split_of[path] == name]
        labels = np.concatenate([_labels(view, shard) for shard in view.split(name).shards])
        assert np.bincount(labels, minlength=3).tolist() == view.manifest.counts.written[name]
    left_out = sum(name == "" for name in split_of.values())
    assert view.manifest.counts.skipped == ({"left_out": left_out} if left_out else {})


def test_training_reads_a_view_as_a_dataset(small_dataset: str, tmp_path: Path) -> None:
    dataset = Dataset(small_dataset)
    paths = _paths(dataset, "train")
    kept = set(paths[::3])
    view = _write(dataset, str(tmp_path / "view"), dict.fromkeys(kept, "train"))
    pipeline = InputPipeline(view, "train", global_batch_size=5)
    seen = [batch.images.copy() for batch in pipeline.batches(0)]
    expected = np.concatenate([rows.images for shard in dataset.split("train").shards for rows in dataset.rows(shard)])
    images = np.concatenate(seen)
    assert len(images) == len(kept)
    assert {image.tobytes() for image in images} == {expected[i].tobytes() for i in range(0, len(paths), 3)}


def test_a_view_of_a_view_reads_the_dataset_itself(small_dataset: str, tmp_path: Path) -> None:
    dataset = Dataset(small_dataset)
    paths = _paths(dataset, "train")
    first = _write(dataset, str(tmp_path / "first"), dict.fromkeys(paths[10:50], "train"))
    second = _write(first, str(tmp_path / "second"), dict.fromkeys(paths[20:30], "val"))
    assert second.manifest.view_of == str(small_dataset)
    shutil.rmtree(tmp_path / "first")
    assert _paths(second, "val") == paths[20:30]


def test_a_view_whose_dataset_was_changed_is_refused(small_dataset: str, tmp_path: Path) -> None:
    copy = str(tmp_path / "dataset")
    shutil.copytree(small_dataset, copy)
    dataset = Dataset(copy)
    view = _write(dataset, str(tmp_path / "view"), dict.fromkeys(_paths(dataset, "train"), "train"))
    shard = Path(copy, "shards", dataset.manifest.shards[0].name)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))
    with pytest.raises(DatasetError, match="checksum"):
        Dataset(view.uri, verify="full")
    shutil.rmtree(copy)
    with pytest.raises(DatasetError, match="view of that dataset, which was moved or deleted"):
        Dataset(view.uri)


def test_datasets_without_views_keep_their_manifest_and_fingerprint(small_dataset: str) -> None:
    written = json.loads(Path(small_dataset, "manifest.json").read_text())
    assert "view_of" not in written
    assert all(set(shard) == {"name", "split", "row_group_rows", "size_bytes", "sha256"} for shard in written["shards"])
