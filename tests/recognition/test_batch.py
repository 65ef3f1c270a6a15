from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.inline import InlineEngine
from manyeyes.engines.registry import create_engine
from manyeyes.errors import DatasetError, SourceError, UsageError
from manyeyes.imaging.preprocessing import Preprocessing, Step
from manyeyes.recognition.batch import predict
from manyeyes.recognition.inputs import PARTITION_IMAGES, remaining_preprocessing
from manyeyes.recognition.predictor import Predictor


@pytest.fixture
def inline() -> Any:
    return create_engine("inline")


def _write(path: Path, label: int, seed: int = 0) -> None:
    pixels = np.random.default_rng(seed).integers(0, 120, (30, 26, 3), dtype=np.uint8)
    pixels[:, :, 2 - label] += 100
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def _rows(out: Path) -> list[dict[str, Any]]:
    return pq.read_table(out).to_pylist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 readable images, nested and without labels; 5 that are not; 2 other files."""
    folder = tmp_path / "photos"
    for index in range(40):
        _write(
            folder / ("deep/er" if index % 2 else ".") / f"{index:03d}.{'png' if index % 3 else 'jpg'}",
            index % 3,
            index,
        )
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "deep/cut.png").write_bytes((folder / "002.png").read_bytes()[:60])
    (folder / "deep/noise.jpg").write_bytes(b"\xff\xd8\xff" + bytes(range(256)))
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "README.txt").write_text("about the photos")
    (folder / ".hidden.png").touch()
    return folder


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_counts_balance_over_a_folder_with_corrupt_files(
    small_bundle: str, folder: Path, tmp_path: Path, inline: Any, suffix: str
) -> None:
    out = tmp_path / f"out{suffix}"
    result = predict(small_bundle, str(folder), str(out), engine=inline, top_k=2)
    assert (result.num_seen, result.num_predicted, result.num_failed) == (45, 40, 5)
    assert sum(result.failed.values()) == 5
    assert sum(result.predicted.values()) == 40
    assert sum(result.skipped.values()) == 2
    rows = _rows(out) if suffix == ".parquet" else [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 45
    for row in rows:
        assert (row.get("class_name") is None) != (row.get("reason") is None)
    reasons = {row["path"]: row["reason"] for row in rows if row.get("reason")}
    assert set(reasons) == {"empty.png", "text.jpg", "deep/cut.png", "deep/noise.jpg", "gone.png"}
    assert reasons["empty.png"] == "empty"
    assert reasons["text.jpg"] == "not_an_image"
    assert all(len(row["top_k"]) == 2 for row in rows if row.get("class_name"))


def test_a_row_says_what_the_predictor_says(small_bundle: str, folder: Path, tmp_path: Path, inline: Any) -> None:
    out = tmp_path / "out.parquet"
    predict(small_bundle, str(folder), str(out), engine=inline, batch_size=7)
    predictor = Predictor.load(small_bundle)
    for row in _rows(out):
        if row["reason"] is None:
            (wanted,) = predictor.predict([(folder / row["path"]).read_bytes()])
            assert row["class_name"] == wanted.class_name
            assert row["probability"] == pytest.approx(wanted.probability, abs=1e-5)
            assert [candidate["label"] for candidate in row["top_k"]] == [each.label for each in wanted.top_k]


def test_one_two_and_three_workers_write_the_same_bytes(small_bundle: str, tmp_path: Path, inline: Any) -> None:
    folder = tmp_path / "many"
    for index in range(2 * PARTITION_IMAGES + 10):
        _write(folder / f"{index:04d}.png", index % 3, index)
    outs = []
    for name, engine in (("inline", inline), ("two", create_engine("local", 2)), ("three", create_engine("local", 3))):
        outs.append(tmp_path / f"{name}.parquet")
        predict(small_bundle, str(folder), str(outs[-1]), engine=engine)
    assert [row["path"] for row in _rows(outs[0])] == sorted(path.name for path in folder.iterdir())
    assert outs[0].read_bytes() == outs[1].read_bytes() == outs[2].read_bytes()


class ElsewhereEngine(InlineEngine):
    """Runs tasks in another working directory, as the nodes of a cluster do."""

    def map(self, fn, items, *, on_result=None):
        def run(item):
            with contextlib.chdir("/"):
                return fn(item)

        return super().map(run, items, on_result=on_result)


def test_relative_paths_mean_the_same_where_tasks_run(
    small_bundle: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_bundle, tmp_path / "bundle")
    monkeypatch.chdir(tmp_path)
    source = os.path.relpath(folder)
    predict("bundle", source, "near.parquet", engine=InlineEngine())
    predict("bundle", source, "far.parquet", engine=ElsewhereEngine())
    assert Path("far.parquet").read_bytes() == Path("near.parquet").read_bytes()


def test_progress_counts_every_input_and_nothing_is_left_beside_the_result(
    small_bundle: str, folder: Path, tmp_path: Path, inline: Any
) -> None:
    seen: list[int] = []
    predict(small_bundle, str(folder), str(tmp_path / "o.jsonl"), engine=inline, on_progress=seen.append)
    assert seen[-1] == 45
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "photos"]


def test_a_single_image_and_a_pattern_are_sources_too(
    small_bundle: str, folder: Path, tmp_path: Path, inline: Any
) -> None:
    out = tmp_path / "out.parquet"
    one = predict(small_bundle, str(folder / "002.png"), str(out), engine=inline)
    assert (one.num_seen, one.num_predicted) == (1, 1)
    assert one.predicted == {"blue": 1}
    several = predict(small_bundle, str(folder / "**" / "*.jpg"), str(out), engine=inline)
    assert several.num_seen == len(list(folder.rglob("*.jpg")))


def test_a_table_of_paths_is_a_source_that_needs_no_labels(
    small_bundle: str, folder: Path, tmp_path: Path, inline: Any
) -> None:
    table = tmp_path / "list.csv"
    table.write_text("path,label\nphotos/000.jpg,\nphotos/002.png,zebra\nphotos/nowhere.png,\n")
    out = tmp_path / "out.parquet"
    result = predict(small_bundle, str(table), str(out), engine=inline)
    assert (result.num_seen, result.num_predicted, result.num_failed) == (3, 2, 1)
    assert [row["path"] for row in _rows(out)] == ["photos/000.jpg", "photos/002.png", "photos/nowhere.png"]
    table.write_text("path\nphotos/000.jpg\n")
    assert predict(small_bundle, str(table), str(out), engine=inline).num_predicted == 1


def test_the_stored_images_of_a_dataset_are_recognised_as_they_are(
    small_bundle: str, small_dataset: str, tmp_path: Path, inline: Any
) -> None:
    out = tmp_path / "out.parquet"
    result = predict(small_bundle, small_dataset, str(out), engine=inline, split="val")
    dataset = Dataset(small_dataset)
    groups = [rows for shard in dataset.split("val").shards for rows in dataset.rows(shard)]
    stored, labels = np.concatenate([rows.images for rows in groups]), np.concatenate([rows.labels for rows in groups])
    wanted = Predictor.load(small_bundle).predict_pixels(stored)
    rows = _rows(out)
    assert [row["path"] for row in rows] == [path for group in groups for path in group.paths]
    assert [row["label"] for row in rows] == [each.label for each in wanted]
    np.testing.assert_allclose([row["probability"] for row in rows], [each.probability for each in wanted], atol=1e-5)
    assert np.mean([row["label"] == label for row, label in zip(rows, labels, strict=True)]) > 0.9
    assert result.num_seen == 45
    assert predict(small_bundle, small_dataset, str(out), engine=inline).num_seen == 171


def test_the_manifest_of_a_dataset_is_read_once_however_many_tasks_there_are(
    small_bundle: str, small_dataset: str, tmp_path: Path, inline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    verify = Dataset.verify
    monkeypatch.setattr(
        Dataset, "verify", lambda dataset, how="full": (opened.append(dataset.uri), verify(dataset, how))
    )
    assert predict(small_bundle, small_dataset, str(tmp_path / "out.parquet"), engine=inline).num_seen == 171
    assert opened == [small_dataset]


def test_a_dataset_of_original_bytes_is_answered_as_the_folder_it_was_made_of(
    small_bundle: str, tmp_path: Path, inline: Any
) -> None:
    folder = tmp_path / "source"
    for index in range(20):
        _write(folder / ("red", "green")[index % 2] / f"{index}.{'jpg' if index % 3 else 'png'}", index % 2, index)
    dataset = str(tmp_path / "dataset")
    ingest(str(folder), dataset, settings=IngestSettings(encoding="jpeg"), engine=inline)
    answers = []
    for source in (str(folder), dataset):
        predict(small_bundle, source, str(tmp_path / "out.parquet"), engine=inline)
        answers.append({row["path"]: row["top_k"] for row in _rows(tmp_path / "out.parquet")})
    from_folder, from_dataset = answers
    assert from_folder.keys() == from_dataset.keys()
    for path, top_k in from_folder.items():
        for one, other in zip(top_k, from_dataset[path], strict=True):
            assert one["label"] == other["label"]
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-5)


def test_only_the_steps_that_ingest_has_not_done_are_left() -> None:
    stored = Preprocessing.for_size(256, 256)
    chain = stored.then(Preprocessing.for_size(224, 224))
    left = remaining_preprocessing(chain, stored)
    assert left.steps == (Step("cover", 224, 224), Step("crop", 224, 224))
    image = np.random.default_rng(0).integers(0, 255, (300, 280, 3), dtype=np.uint8)
    np.testing.assert_array_equal(left.apply(stored.apply(image)), chain.apply(image))
    assert remaining_preprocessing(stored, stored).steps == ()
    other = Preprocessing.for_size(64, 64, "pad")
    assert remaining_preprocessing(chain, other) == chain


def test_bad_arguments_get_one_clear_line(small_bundle: str, folder: Path, small_dataset: str, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for error, source, out, options, words in (
        (UsageError, folder, "out.csv", {}, ".parquet or .jsonl"),
        (UsageError, folder, "out.jsonl", {"top_k": 0}, "top_k=0"),
        (SourceError, tmp_path / "nowhere", "out.jsonl", {}, "nothing at"),
        (SourceError, tmp_path / "nothing", "out.jsonl", {}, "holds no image"),
        (SourceError, f"{tmp_path}/*.bmp", "out.jsonl", {}, "No file matches"),
        (SourceError, folder, "out.jsonl", {"split": "val"}, "not a dataset"),
        (DatasetError, small_dataset, "out.jsonl", {"split": "later"}, "no split 'later'"),
    ):
        with pytest.raises(error) as caught:
            predict(small_bundle, str(source), str(tmp_path / out), engine=create_engine("inline"), **options)
        assert words in str(caught.value)
        assert not (tmp_path / out).exists()
