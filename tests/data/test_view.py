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
from manyeyes.engines.inline import InlineEngine
from manyeyes.errors import DatasetError
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.folds import FoldSettings, divide
from manyeyes.report.pictures import draw as draw_pictures
from manyeyes.report.thumbnails import data_uri


def _labels(dataset: Dataset, shard: object) -> np.ndarray:
    return np.concatenate([rows.labels for rows in dataset.rows(shard)])  # type: ignore[arg-type]


def _paths(dataset: Dataset, split: str) -> list[str]:
    return [path for shard in dataset.split(split).shards for rows in dataset.rows(shard) for path in rows.paths]


def _number(path: str) -> int:
    """Of the image in its file; the small dataset's label is its rest by 3."""
    return int(Path(path).stem)


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


@pytest.fixture(scope="module")
def images_of(small_dataset: str) -> dict[str, np.ndarray]:
    """Path -> image, of all examples of the dataset."""
    dataset = Dataset(small_dataset)
    groups = [rows for shard in dataset.manifest.shards for rows in dataset.rows(shard)]
    return {path: image for rows in groups for path, image in zip(rows.paths, rows.images, strict=True)}


@pytest.fixture(scope="module")
def moved(small_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A view that has moved a third of train to val, and of val to train, as mending does."""
    dataset = Dataset(small_dataset)
    train, val = _paths(dataset, "train"), _paths(dataset, "val")
    split_of = dict.fromkeys(train, "train") | dict.fromkeys(val, "val")
    split_of |= dict.fromkeys(train[1::3], "val") | dict.fromkeys(val[1::3], "train")
    return _write(dataset, str(tmp_path_factory.mktemp("moved") / "view"), split_of)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10_000))
def test_a_view_of_a_view_that_moved_rows_has_each_row_where_it_was_put_and_each_file_once_a_split(
    moved: Dataset, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    every_path = _paths(moved, "train") + _paths(moved, "val")
    split_of = {path: str(draw.choice(["", "train", "test"])) for path in every_path}
    view = _write(moved, str(tmp_path_factory.mktemp("view")), split_of)
    assert view.manifest.balances
    for name in ("train", "test"):
        paths = [path for path in every_path if split_of[path] == name]
        # In the order of the files, as if it were a view of the dataset itself.
        assert _paths(view, name) == sorted(paths, key=lambda path: (path.split("/")[0], _number(path)))
        labels = np.concatenate([_labels(view, shard) for shard in view.split(name).shards])
        assert np.bincount(labels, minlength=3).tolist() == view.manifest.counts.written[name]
        assert len({shard.name for shard in view.split(name).shards}) == len(view.split(name).shards)


def test_a_row_that_would_be_in_a_split_twice_is_refused(small_dataset: str, tmp_path: Path) -> None:
    dataset = Dataset(small_dataset)
    shard = dataset.split("val").shards[0]
    rows = ViewRows(shard, _labels(dataset, shard), np.full(shard.num_rows, "train"))
    with pytest.raises(ValueError, match=r"val-00000\.parquet twice in train"):
        write_view(dataset, str(tmp_path / "view"), [rows, rows])


def test_a_dataset_that_lists_a_file_twice_in_a_split_is_refused(moved: Dataset, tmp_path: Path) -> None:
    manifest = json.loads(Path(moved.uri, "manifest.json").read_text())
    for shard in manifest["shards"]:
        shard["split"] = "train"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DatasetError, match=r"train-00000\.parquet twice in train\. Make the view again"):
        Dataset(str(tmp_path))


def test_folds_of_a_mended_dataset_train_on_and_show_the_images_that_they_name(
    moved: Dataset, images_of: dict[str, np.ndarray], small_run: str, tmp_path: Path
) -> None:
    folds = divide(moved, FoldSettings(folds=2, group_duplicates=False, val=0), InlineEngine())
    held_out: list[str] = []
    for fold in range(2):
        uri = str(tmp_path / f"fold-{fold}")
        folds.write_view(moved, uri, 0, fold)
        view = Dataset(uri)
        trained = [
            (image.tobytes(), label)
            for batch in InputPipeline(view, "train", global_batch_size=16).batches(0)
            for image, label in zip(batch.images, batch.labels.tolist(), strict=True)
        ]
        expected = [(images_of[path].tobytes(), _number(path) % 3) for path in _paths(view, "train")]
        assert sorted(trained) == sorted(expected)
        result = evaluate(small_run, uri, engine=InlineEngine(), out=str(tmp_path / f"out-{fold}"))
        notable = result.notable
        assert len(notable.uncertain) == 24
        shown = draw_pictures(
            uri, view.manifest.fingerprint, "test", "no model", "", notable.mistakes, notable.uncertain
        )
        pictures = (*shown.mistakes, *shown.uncertain)
        assert len(pictures) == len(notable.mistakes) + 24
        assert all(picture.image == data_uri(images_of[picture.example.path]) for picture in pictures)
        held_out += _paths(view, "test")
    assert sorted(held_out) == sorted(_paths(moved, "train") + _paths(moved, "val"))


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
