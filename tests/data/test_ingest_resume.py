"""An ingest that is killed at any moment goes on to the bytes of one that was not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from manyeyes import storage
from manyeyes.data import ingest as module
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.data.shards import write_shard
from manyeyes.engines.inline import InlineEngine
from manyeyes.errors import DatasetError, UsageError

SETTINGS = IngestSettings(size=(96, 96))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """1,200 images in three classes, one in ten bad: 19 shards."""
    root = tmp_path_factory.mktemp("photos")
    draw = np.random.default_rng(0)
    encoded = [cv2.imencode(".jpg", draw.integers(0, 256, (100, 120, 3), np.uint8))[1].tobytes() for _ in range(40)]
    for number in range(1200):
        path = root / "abc"[number % 3] / f"{number:04d}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"bad" if number % 10 == 0 else encoded[number % 40])
    return str(root)


@pytest.fixture(scope="module")
def uninterrupted(photos, tmp_path_factory):
    dataset = tmp_path_factory.mktemp("reference") / "d"
    ingest(photos, str(dataset), settings=SETTINGS, engine=InlineEngine())
    return files(dataset)


def files(dataset) -> dict[str, bytes]:
    return {str(p.relative_to(dataset)): p.read_bytes() for p in sorted(Path(dataset).rglob("*")) if p.is_file()}


class StopsAfter(InlineEngine):
    """Fails as the driver would if the machine went down after some tasks."""

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks

    def map(self, fn, items, *, on_result=None):
        def stop_in_time(index, result):
            on_result(index, result)
            if index + 1 == self.num_tasks:
                raise KeyboardInterrupt

        return super().map(fn, items, on_result=stop_in_time)


class Counts(InlineEngine):
    """Counts the tasks whose shard was not there before."""

    def __init__(self) -> None:
        self.num_written = 0

    def map(self, fn, items, *, on_result=None):
        if fn is not write_shard:
            return super().map(fn, items, on_result=on_result)

        def counted(task):
            record = Path(task.writer.dataset, ".ingest", f"{task.name}.json")
            self.num_written += not record.exists()
            return fn(task)

        return super().map(counted, items, on_result=on_result)


def test_a_resumed_ingest_does_only_what_is_missing(photos, uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ingest(photos, str(tmp_path / "d"), settings=SETTINGS, engine=StopsAfter(5))
    assert not (tmp_path / "d" / "manifest.json").exists()
    engine, from_the_start = Counts(), Counts()
    ingest(photos, str(tmp_path / "d"), settings=SETTINGS, engine=engine)
    assert files(tmp_path / "d") == uninterrupted
    ingest(photos, str(tmp_path / "e"), settings=SETTINGS, engine=from_the_start)
    assert 5 + engine.num_written == from_the_start.num_written > 10


def test_an_unfinished_ingest_is_not_a_dataset_and_takes_no_other_arguments(photos, tmp_path):
    from manyeyes.data.dataset import Dataset

    with pytest.raises(KeyboardInterrupt):
        ingest(photos, str(tmp_path / "d"), settings=SETTINGS, engine=StopsAfter(2))
    with pytest.raises(DatasetError, match="its ingest did not finish"):
        Dataset(str(tmp_path / "d"))
    with pytest.raises(UsageError, match=r"unfinished ingest with other arguments \(seed: 0, now 1\)"):
        ingest(photos, str(tmp_path / "d"), settings=IngestSettings(size=(96, 96), seed=1), engine=InlineEngine())


def test_half_written_and_foreign_files_are_cleared_away(photos, uninterrupted, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        ingest(photos, str(tmp_path / "d"), settings=SETTINGS, engine=StopsAfter(3))
    shards = tmp_path / "d" / "shards"
    first = sorted(shards.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-10])
    (shards / ".aside-0123456789ab-train-00007.parquet").write_bytes(b"half")
    (shards / "train-99999.parquet").write_bytes(b"of an older source")
    ingest(photos, str(tmp_path / "d"), settings=SETTINGS, engine=InlineEngine())
    assert files(tmp_path / "d") == uninterrupted


def test_a_source_that_grew_between_two_attempts_is_read_as_it_is_now(photos, tmp_path):
    source = tmp_path / "s"
    for label in "abc":
        (source / label).mkdir(parents=True)
    for path in sorted(Path(photos).rglob("*.jpg"))[:300:2]:
        os.link(path, source / path.relative_to(photos))
        os.link(path, source / "b" / f"again-{path.name}")
    with pytest.raises(KeyboardInterrupt):
        ingest(str(source), str(tmp_path / "d"), settings=SETTINGS, engine=StopsAfter(2))
    os.link(Path(photos, "b", "0001.jpg"), source / "b" / "new.jpg")
    result = ingest(str(source), str(tmp_path / "d"), settings=SETTINGS, engine=InlineEngine())
    assert result.num_seen == 301
    ingest(str(source), str(tmp_path / "e"), settings=SETTINGS, engine=InlineEngine())
    assert files(tmp_path / "d") == files(tmp_path / "e")


def test_a_crash_between_manifest_and_cleaning_leaves_a_whole_dataset(photos, uninterrupted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module.storage, "remove", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            ingest(photos, str(tmp_path / "d"), settings=SETTINGS, engine=InlineEngine())
    assert (tmp_path / "d" / ".ingest").exists()
    assert ingest(photos, str(tmp_path / "d"), settings=SETTINGS, engine=InlineEngine()).was_complete
    assert files(tmp_path / "d") == uninterrupted


@pytest.mark.parametrize("last", ["manifest.json", "shards", "quarantine"])
@pytest.mark.parametrize("again", [IngestSettings(size=(5, 5), overwrite=True), IngestSettings(size=(5, 5))])
def test_an_interrupted_overwrite_goes_on(tmp_path, monkeypatch, last, again):
    for value, name in enumerate(("a/0.png", "a/1.png", "b/0.png", "b/1.png")):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((6, 6, 3), value, np.uint8))
    arguments = str(tmp_path / "photos"), str(tmp_path / "d")
    ingest(*arguments, settings=IngestSettings(size=(4, 4)), engine=InlineEngine())
    remove = storage.remove

    def remove_and_die(uri, **options):
        remove(uri, **options)
        if uri.endswith(last):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(storage, "remove", remove_and_die)
        ingest(*arguments, settings=IngestSettings(size=(5, 5), overwrite=True), engine=InlineEngine())
    result = ingest(*arguments, settings=again, engine=InlineEngine())
    assert (result.num_written, result.image_shape) == (4, (5, 5, 3))


def test_a_task_that_runs_twice_gives_the_same_record(photos, tmp_path):
    tasks = []

    class Collects(InlineEngine):
        def map(self, fn, items, *, on_result=None):
            tasks.extend(items)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(photos, str(tmp_path / "d"), settings=SETTINGS, engine=Collects())
    first = write_shard(tasks[0])
    before = files(tmp_path / "d")
    assert write_shard(tasks[0]) == first and files(tmp_path / "d") == before
    for record in (tmp_path / "d" / ".ingest").glob("train-*.json"):
        record.unlink()
    assert write_shard(tasks[0]) == first and files(tmp_path / "d") == before


def command(photos, dataset) -> list[str]:
    arguments = ["ingest", photos, str(dataset), "--size", "96", "--workers", "2", "--json"]
    return [sys.executable, "-m", "manyeyes.cli.main", *arguments]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "num_files"), [(signal.SIGKILL, 1), (signal.SIGKILL, 8), (signal.SIGINT, 0), (signal.SIGINT, 8)]
)
def test_a_killed_command_goes_on_to_the_same_bytes(photos, uninterrupted, tmp_path, how, num_files):
    dataset = tmp_path / "d"
    process = subprocess.Popen(
        command(photos, dataset), stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (dataset / ".ingest" / "job.json").exists() and len(list(dataset.glob("shards/*"))) >= num_files:
            break
        time.sleep(0.005)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if how == signal.SIGKILL else 130), errors
    if how == signal.SIGINT:
        assert b"Traceback" not in errors and b"goes on where it stopped" in errors
    assert not (dataset / "manifest.json").exists()
    wait_for_the_end_of_workers(dataset)
    finished = subprocess.run(command(photos, dataset), capture_output=True, check=True)
    assert json.loads(finished.stdout)["num_written"] == 1080
    assert files(dataset) == uninterrupted


def wait_for_the_end_of_workers(dataset: Path) -> None:
    """Workers die with their driver; a moment later they write no more."""
    previous, current = None, files(dataset)
    while previous != current:
        time.sleep(0.5)
        previous, current = current, files(dataset)
