"""What goes wrong or is done twice on the way from photos to predictions, where everything lies on HDFS or on S3."""

from __future__ import annotations

import io
import uuid

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from manyeyes import storage
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.registry import create_engine
from manyeyes.recognition.batch import predict
from manyeyes.recognition.bundle import Bundle
from manyeyes.training import checkpoint
from manyeyes.training.events import EpochEnd, Event
from manyeyes.training.export import export
from manyeyes.training.settings import TrainSettings
from manyeyes.training.trainer import train

SETTINGS = (
    "model.options={width=4, stages=2, convolutions=1}",
    "train.epochs=2",
    "train.global_batch_size=16",
    "train.precision=float32",
    "optimizer.learning_rate=0.02",
)


def stop_after_an_epoch(event: Event) -> None:
    if isinstance(event, EpochEnd):
        raise InterruptedError


@pytest.mark.slow
@pytest.mark.parametrize("place", ["hdfs", "s3"])
def test_interruptions_and_replacements_on_a_remote_file_system_leave_nothing_behind(
    place, request, monkeypatch, tmp_path
):
    server = request.getfixturevalue("hadoop" if place == "hdfs" else "s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    base = storage.join(server.hdfs if place == "hdfs" else server.bucket_uri, f"journey {uuid.uuid4().hex}")
    monkeypatch.chdir(tmp_path)
    inline = create_engine("inline")
    photos, dataset, run, bundle = (storage.join(base, name) for name in ("photos", "dataset", "run", "bundle"))
    for number in range(60):
        pixels = np.random.default_rng(number).integers(0, 120, (24, 20, 3), dtype=np.uint8)
        pixels[:, :, number % 3] += 100
        uri = storage.join(photos, ("blue", "green", "red")[number % 3], f"photo {number:02d}.png")
        storage.write_bytes(uri, cv2.imencode(".png", pixels)[1].tobytes())

    ingested = ingest(photos, dataset, settings=IngestSettings(size=(24, 20), val=0.2, test=0.2), engine=inline)
    assert ingested.num_written == 60
    with pytest.raises(InterruptedError):
        train(dataset, run, TrainSettings.load(None, list(SETTINGS)), on_event=stop_after_an_epoch)
    train(dataset, run, TrainSettings.load(None, list(SETTINGS)), resume=True)
    epochs = [
        line for line in storage.read_bytes(storage.join(run, "metrics.jsonl")).splitlines() if b'"epoch"' in line
    ]
    assert len(epochs) == 2
    assert checkpoint.names(storage.join(run, "checkpoints"))
    export(run, bundle)
    export(run, bundle)  # in the place of the older one
    assert Bundle.load(bundle).info.class_names == ("blue", "green", "red")
    out = storage.join(base, "predictions", "all.parquet")
    predicted = predict(bundle, photos, out, engine=create_engine("local", 2))
    assert predicted.num_predicted == 60
    assert len(pq.read_table(io.BytesIO(storage.read_bytes(out)))) == 60
    again = predict(bundle, storage.join(photos, "*", "photo 0*.png"), storage.join(base, "some.jsonl"), engine=inline)
    assert again.num_predicted == 10
    assert len(storage.read_bytes(storage.join(base, "some.jsonl")).splitlines()) == 10
    assert sorted(item.name for item in storage.iterate_directory(base)) == [
        "bundle",
        "dataset",
        "photos",
        "predictions",
        "run",
        "some.jsonl",
    ]
    assert list(tmp_path.iterdir()) == []
    storage.remove(base, recursive=True)
