"""The door for Spark users: DataFrames as sources, and prediction from DataFrame to DataFrame."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pyspark = pytest.importorskip("pyspark")
pytest.importorskip("pandas", reason="Spark's Arrow functions need pandas")

from pyspark.sql import functions  # noqa: E402

from manyeyes import storage  # noqa: E402
from manyeyes.data.dataset import Dataset  # noqa: E402
from manyeyes.data.ingest import IngestSettings, ingest  # noqa: E402
from manyeyes.engines.registry import create_engine  # noqa: E402
from manyeyes.errors import UsageError  # noqa: E402
from manyeyes.recognition.batch import predict  # noqa: E402
from manyeyes.spark import ingest_dataframe, predict_dataframe  # noqa: E402

SETTINGS = IngestSettings(size=(20, 24), fit="stretch")


@pytest.fixture(scope="module")
def session():
    # The engine's own session on this machine, as other tests use it.
    create_engine("spark", 2, {"master": "local[2]"}).context  # noqa: B018
    return pyspark.sql.SparkSession.builder.getOrCreate()


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Ninety PNG files in three classes, and one that is none."""
    folder = tmp_path_factory.mktemp("images")
    draw = np.random.default_rng(5)
    for index in range(90):
        path = folder / ("red", "green", "blue")[index % 3] / f"{index:02d} ü.png"
        path.parent.mkdir(exist_ok=True)
        pixels = draw.integers(0, 120, (20, 24, 3), np.uint8)
        pixels[:, :, 2 - index % 3] += 100
        cv2.imwrite(str(path), pixels)
    (folder / "red" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    return folder


@pytest.fixture
def frame(session, images):
    """As a user makes it: binaryFile, and the folder's name as the label."""
    files = session.read.format("binaryFile").option("recursiveFileLookup", "true").load(str(images))
    return files.withColumn("label", functions.regexp_extract("path", r"([^/]+)/[^/]+$", 1))


def fingerprints(dataset: str) -> dict[str, str]:
    shards = sorted((Path(dataset) / "shards").iterdir())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in shards}


def test_bytes_of_a_frame_become_a_dataset(frame, tmp_path):
    dataset = str(tmp_path / "dataset")
    result = ingest_dataframe(frame, dataset, settings=SETTINGS)
    assert (result.num_seen, result.num_written, result.quarantined) == (91, 90, {"corrupt": 1})
    assert Dataset(dataset).class_names == ("blue", "green", "red")
    assert not storage.exists(f"{dataset}.staged")
    assert ingest_dataframe(frame, dataset, settings=SETTINGS).was_complete


def test_the_same_rows_make_the_same_bytes_in_any_order(frame, tmp_path):
    ingest_dataframe(frame, str(tmp_path / "a"), settings=SETTINGS)
    shuffled = frame.repartition(7, functions.rand(seed=1))
    ingest_dataframe(shuffled, str(tmp_path / "b"), settings=SETTINGS, engine=create_engine("local", 2))
    assert fingerprints(str(tmp_path / "a")) == fingerprints(str(tmp_path / "b"))


def test_images_without_names_are_named_by_their_content(frame, tmp_path):
    nameless = frame.select(functions.col("content").alias("image"), "label")
    result = ingest_dataframe(nameless, str(tmp_path / "dataset"), settings=SETTINGS)
    assert result.num_written == 90


def test_paths_of_a_frame_become_the_dataset_of_its_files(frame, images, tmp_path):
    paths = frame.select("path", "label")
    result = ingest_dataframe(paths, str(tmp_path / "dataset"), settings=SETTINGS)
    assert (result.num_seen, result.num_written) == (91, 90)
    assert result.written == ingest(str(images), str(tmp_path / "folder"), settings=SETTINGS).written


def test_groups_and_splits_of_a_frame_are_kept(frame, tmp_path):
    rows = frame.withColumn("part", functions.when(functions.col("path").contains("/0"), "test").otherwise("train"))
    rows = rows.withColumn("patient", functions.length("path"))
    dataset = str(tmp_path / "dataset")
    result = ingest_dataframe(rows, dataset, split_column="part", group_column="patient", settings=SETTINGS)
    assert result.written["test"] == 10
    shard = next((tmp_path / "dataset" / "shards").iterdir())
    assert pq.read_table(shard).column("group").null_count == 0


def test_an_interrupted_ingest_goes_on_without_staging_again(frame, tmp_path):
    dataset = str(tmp_path / "dataset")

    class InterruptedIngestError(Exception):
        pass

    def interrupt(phase: str, done: int, total: int | None) -> None:
        if phase == "write" and done:
            raise InterruptedIngestError

    with pytest.raises(InterruptedIngestError):
        ingest_dataframe(frame, dataset, settings=SETTINGS, on_progress=interrupt)
    staged = {path: path.stat().st_mtime_ns for path in Path(f"{dataset}.staged").iterdir()}
    # A copy to interrupt in the same way, and to go on from with other rows.
    shutil.copytree(f"{dataset}.staged", tmp_path / "other.staged")
    fewer = frame.where("label != 'red'")
    assert ingest_dataframe(fewer, str(tmp_path / "other"), settings=SETTINGS).num_written == 60
    seen = {}

    def watch(phase: str, done: int, total: int | None) -> None:
        seen.update({path: path.stat().st_mtime_ns for path in Path(f"{dataset}.staged").iterdir()})

    assert ingest_dataframe(frame, dataset, settings=SETTINGS, on_progress=watch).num_written == 90
    assert seen == staged


def test_a_frame_without_the_columns_is_told_so(frame, session):
    with pytest.raises(UsageError, match=r"no column 'wether'. It has: path, modificationTime"):
        ingest_dataframe(frame, "nowhere", label_column="wether")
    with pytest.raises(UsageError, match="Column 'length' is bigint; expected binary"):
        ingest_dataframe(frame, "nowhere", image_column="length")
    with pytest.raises(UsageError, match="no column content, image or path"):
        ingest_dataframe(session.range(3), "nowhere")


def test_predictions_of_a_frame_are_those_of_predict(frame, images, small_bundle, tmp_path):
    rows = predict_dataframe(frame.drop("label"), small_bundle, top_k=2).collect()
    predict(small_bundle, str(images), str(tmp_path / "out.parquet"), engine=create_engine("inline"), top_k=2)
    expected = {row["path"]: row for row in pq.read_table(tmp_path / "out.parquet").to_pylist()}
    assert len(rows) == len(expected) == 91
    for row in rows:
        values = row.asDict(recursive=True)
        path = str(Path(values["path"].removeprefix("file:")).relative_to(images))
        assert "content" not in values
        wanted = expected.get(path) or expected[str(images / path)]
        assert {name: values[name] for name in wanted if name != "path"} == {
            name: value for name, value in wanted.items() if name != "path"
        }
    assert [row["reason"] for row in rows if row["reason"]] == ["corrupt"]


def test_paths_are_predicted_as_bytes_are(frame, small_bundle):
    by_bytes = predict_dataframe(frame, small_bundle, prefix="predicted_")
    by_path = predict_dataframe(frame.drop("content"), small_bundle, image_column="path", prefix="predicted_")
    columns = ["path", "label", "predicted_label", "predicted_probability", "predicted_reason"]
    assert by_bytes.select(columns).sort("path").collect() == by_path.select(columns).sort("path").collect()
    right = by_path.where("label = predicted_class_name").count()
    assert right == 90


def test_a_null_image_has_a_reason(frame, small_bundle):
    empty = frame.select(functions.lit(None).cast("binary").alias("content"))
    assert {row["reason"] for row in predict_dataframe(empty, small_bundle).collect()} == {"empty"}


def test_a_python_worker_loads_the_bundle_once(frame, session, small_bundle):
    predictions = predict_dataframe(frame.repartition(8), small_bundle, prefix="predicted_")
    assert predictions.count() == predictions.count() == 91

    def loads(batches):
        from manyeyes.recognition.batch import predictor_of

        for _ in batches:
            values = {"process": [os.getpid()], "loads": [predictor_of.cache_info().misses]}
            yield pa.RecordBatch.from_pydict(values)

    found = session.range(40).repartition(40).mapInArrow(loads, "process long, loads long").distinct().collect()
    assert {row["loads"] for row in found} == {1}
    assert len(found) <= 2


def test_columns_that_would_be_there_twice_are_refused(frame, small_bundle):
    with pytest.raises(UsageError, match=r"has a column 'label' already. Give a prefix"):
        predict_dataframe(frame, small_bundle)


def test_importing_the_package_loads_no_spark():
    assert os.system(f"{sys.executable} -c 'import manyeyes.spark, sys; sys.exit(\"pyspark\" in sys.modules)'") == 0
