"""The same job gives the same bytes on every engine and every file system."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import pytest

from manyeyes import storage

pytestmark = pytest.mark.slow

CLASSES = ("red", "green", "blue")
# What a driver does, whatever its engine: a process of its own, as one Spark session is all that a process has.
DRIVER = """
import json, sys
import manyeyes
from manyeyes.data.ingest import IngestSettings
from manyeyes.engines.registry import create_engine

def main():
    name, workers, settings, jobs = json.loads(sys.argv[1])
    engine = create_engine(name, workers, settings)
    reports = []
    for verb, *arguments in jobs:
        if verb == "ingest":
            settings = IngestSettings(class_names=("red", "green", "blue"))
            result = manyeyes.ingest(*arguments, settings=settings, engine=engine)
            reports.append([result.num_seen, result.num_written, result.quarantined, result.skipped, result.num_moved])
        elif verb == "predict":
            result = manyeyes.predict(*arguments, engine=engine)
            reports.append([result.num_seen, result.num_predicted, result.failed, result.predicted])
        elif verb == "audit":
            report = manyeyes.audit(*arguments, engine=engine).to_dict()
            del report["dataset"]
            reports.append(report)
        else:
            metrics = manyeyes.evaluate(*arguments, engine=engine, split="train").to_dict()["metrics"]
            reports.append(metrics)
    with open(sys.argv[2], "w") as file:
        json.dump(reports, file)

if __name__ == "__main__":
    main()
"""


@dataclass(frozen=True)
class Place:
    """A folder on some file system that holds the source and takes the results."""

    name: str
    uri: str


@dataclass(frozen=True)
class Run:
    """An engine, and where it runs: everywhere, or to save time in some places only."""

    name: str
    engine: str
    workers: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    ingests_in: tuple[str, ...] = ("local", "hdfs", "s3")
    predicts_in: tuple[str, ...] = ("local", "hdfs", "s3")


def write_photos(folder):
    """345 images in three classes with bad ones and near-duplicates among them, and files that are no images."""
    draw = np.random.default_rng(7)
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for index in range(100 + 5 * label):
            image = draw.integers(0, 120, (40 + index % 7, 36, 3), dtype=np.uint8)
            image[:, :, 2 - label] += 100
            suffix = ("jpg", "png", "webp")[index % 3]
            content = cv2.imencode(f".{suffix}", image)[1].tobytes()
            if index % 17 == 3:
                content = content[: len(content) // 2]
            (folder / name / f"photo {index:03d}.{suffix}").write_bytes(content)
        for index in range(2):
            cells = draw.integers(0, 256, (9, 12, 3), dtype=np.uint8)
            image = cv2.resize(cells, (48, 36), interpolation=cv2.INTER_CUBIC)
            for quality in (95, 90, 85, 80, 75):
                content = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()
                (folder / name / f"version {index}-{quality}.jpg").write_bytes(content)
    (folder / "red" / "empty.jpg").write_bytes(b"")
    (folder / "red" / "notes.txt").write_text("not an image")
    (folder / "loose.png").write_bytes(cv2.imencode(".png", np.zeros((9, 9, 3), np.uint8))[1].tobytes())


def copy_tree(folder, uri):
    def copy(path):
        storage.write_bytes(storage.join(uri, path.relative_to(folder).as_posix()), path.read_bytes())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(copy, (path for path in sorted(folder.rglob("*")) if path.is_file())))


@pytest.fixture(scope="module")
def environment(hadoop, s3):
    """The environment of drivers: where HDFS and S3 are, and the credentials."""
    added = {**hadoop.environment, **s3.environment}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in added.items():
            patch.setenv(name, value)
        yield added


@pytest.fixture(scope="module")
def places(environment, hadoop, s3, small_bundle, tmp_path_factory):
    photos = tmp_path_factory.mktemp("photos")
    write_photos(photos)
    made = [
        Place("local", str(tmp_path_factory.mktemp("local"))),
        Place("hdfs", f"{hadoop.hdfs}/same-bytes-{os.getpid()}"),
        Place("s3", f"{s3.bucket_uri}/same-bytes-{os.getpid()}"),
    ]
    bundle = tmp_path_factory.getbasetemp() / small_bundle
    for place in made:
        copy_tree(photos, storage.join(place.uri, "photos"))
        copy_tree(bundle, storage.join(place.uri, "bundle"))
    return made


def jobs_of(run, places):
    for place in (place for place in places if place.name in run.ingests_in):
        out = storage.join(place.uri, run.name)
        dataset = storage.join(out, "dataset")
        yield place.name, ["ingest", storage.join(place.uri, "photos"), dataset]
        if place.name in run.predicts_in:
            bundle = storage.join(place.uri, "bundle")
            yield place.name, ["predict", bundle, storage.join(place.uri, "photos"), storage.join(out, "p.parquet")]
            yield place.name, ["evaluate", bundle, dataset]
        if place.name == "local" and "local" in run.predicts_in:
            yield place.name, ["audit", dataset]


def outcome_of(run, places, tmp_path, environment):
    """(place, verb) -> (digest of each file that was written, what was reported)."""
    jobs = list(jobs_of(run, places))
    request = json.dumps([run.engine, run.workers, run.settings, [job for _, job in jobs]])
    report = tmp_path / "report.json"
    # Files that land where the driver is started must not matter.
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, request, str(report)],
        cwd=tmp_path,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    outcome = {}
    for (place, (verb, *arguments)), reported in zip(jobs, json.loads(report.read_text()), strict=True):
        if verb == "ingest":
            files = digests(arguments[1])
        else:
            files = {"p.parquet": digest(arguments[2])} if verb == "predict" else {}
        outcome[place, verb] = (files, reported)
    return outcome


def digests(dataset):
    files = {}
    for folder in ("", "shards", "quarantine"):
        uri = storage.join(dataset, folder) if folder else dataset
        for name in storage.list_files(uri):
            files[f"{folder}/{name}"] = digest(storage.join(uri, name))
    assert "/manifest.json" in files and not storage.exists(storage.join(dataset, ".ingest"))
    return files


def digest(uri):
    content = storage.read_bytes(uri)
    if uri.endswith("manifest.json"):
        values = json.loads(content)
        assert values["source"].pop("uri").endswith("/photos")
        content = storage.canonical_json(values)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def expected(places, tmp_path_factory, environment):
    """What the inline engine makes, which is the plainest, in every place."""
    outcome = outcome_of(Run("inline", "inline"), places, tmp_path_factory.mktemp("inline"), environment)
    files, reported = outcome["local", "ingest"]
    num_seen, num_written, quarantined, skipped, moved = reported
    assert moved > 0  # near-duplicates had been dealt to several splits
    assert num_seen == 345 + len(("empty.jpg", "loose.png", "notes.txt"))
    assert num_seen == num_written + sum(quarantined.values()) + sum(skipped.values())
    assert quarantined == {"empty": 1, "missing_label": 1, "truncated": 6 + 6 + 7}
    assert skipped == {"not_an_image_name": 1}
    assert len(files) >= 8
    return outcome


@pytest.mark.parametrize("verb", ["ingest", "predict", "evaluate"])
def test_every_file_system_holds_the_same_bytes(expected, verb):
    local = expected["local", verb]
    for place in ("hdfs", "s3"):
        assert expected[place, verb] == local


RUNS = [
    Run("local-3", "local", 3, predicts_in=("hdfs",)),
    Run("spark-standalone", "spark", None, {"master": "SPARK"}, predicts_in=("local", "s3")),
    Run("hadoop", "hadoop", 2, ingests_in=("hdfs", "s3"), predicts_in=("hdfs",)),
]


@pytest.mark.parametrize("run", RUNS, ids=[run.name for run in RUNS])
def test_every_engine_makes_the_same_bytes_and_numbers(run, expected, places, tmp_path, environment, request):
    if run.settings.get("master") == "SPARK":
        run.settings["master"] = request.getfixturevalue("spark_cluster").master
    if run.engine in ("spark", "hadoop"):
        # Nodes of a cluster have an environment of their own; credentials are given to them on purpose.
        run.settings["pass_environment"] = ["AWS_*", "HADOOP_CONF_DIR"]
    outcome = outcome_of(run, places, tmp_path, environment)
    assert outcome == {key: expected[key] for key in outcome}
    assert len(outcome) == len(run.ingests_in) + 2 * len(run.predicts_in) + ("local" in run.predicts_in)
