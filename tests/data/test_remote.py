"""Sources and datasets on HDFS and S3 are what they are on local disk, and cost as few requests as they can."""

from __future__ import annotations

import json
import threading
import time
import tracemalloc
import urllib.request
import uuid
import xml.etree.ElementTree
from pathlib import Path

import cv2
import numpy as np
import pytest

from manyeyes import storage
from manyeyes.data import reading
from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.data.sources import open_source
from manyeyes.data.sources.base import Skipped
from manyeyes.engines.registry import create_engine
from manyeyes.errors import UsageError
from manyeyes.recognition.batch import predict
from manyeyes.storage.remote import RangeReader

PLACES = ("local", "hdfs", "s3")
MANY = 20_000
# A server of Hadoop shows its counts anew after ten seconds.
METRICS_SECONDS = 11


@pytest.fixture
def places(hadoop, s3, tmp_path, monkeypatch):
    """A folder on each kind of file system."""
    for name, value in {**hadoop.environment, **s3.environment}.items():
        monkeypatch.setenv(name, value)
    name = f"remote-{uuid.uuid4().hex}"
    found = {"local": str(tmp_path / name), "hdfs": f"{hadoop.hdfs}/{name}", "s3": f"{s3.bucket_uri}/{name}"}
    yield found
    monkeypatch.delenv("HADOOP_USER_NAME", raising=False)
    for uri in found.values():
        storage.remove(uri, recursive=True)


def jpeg(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (32, 24, 3), dtype=np.uint8)
    return cv2.imencode(".jpg", pixels)[1].tobytes()


def tree() -> dict[str, bytes]:
    """Photos of three classes whose folders begin one another, and what is passed over or can't be used."""
    files = {
        f"{folder}/{name}": jpeg(1000 * a + b)
        for a, folder in enumerate(("cat", "cat big", "cat.small/deep", "Größe"))
        for b, name in enumerate(
            ["1.jpg", "é.jpg", "a#b.jpg", "a%20b.jpg", "z z.jpg", *(f"n{i:02d}.jpg" for i in range(8))]
        )
    }
    files |= {
        "cat/.hidden.jpg": b"x",
        "cat/notes.txt": b"about",
        ".git/config": b"x",
        "cat!.jpg": jpeg(7),
        "cat/broken.jpg": b"\xff\xd8\xff",
        "cat/empty.jpg": b"",
    }
    return files


@pytest.fixture
def trees(places):
    for uri in places.values():
        for path, content in tree().items():
            storage.write_bytes(storage.join(uri, "photos", path), content)
    return {place: storage.join(uri, "photos") for place, uri in places.items()}


def test_a_folder_has_the_same_entries_in_the_same_order_everywhere(trees):
    found = {}
    for place, uri in trees.items():
        source = open_source(uri)
        assert source.kind == "folder"
        found[place] = [
            (item.path, item.reason)
            if isinstance(item, Skipped)
            else (item.path, item.uri.removeprefix(uri), item.label, item.size_bytes, item.problem)
            for item in source.entries()
        ]
    assert found["hdfs"] == found["local"]
    assert found["s3"] == found["local"]
    paths = [path for path, *_ in found["local"]]
    assert paths == sorted(paths, key=str.encode)
    assert {path for path in paths if not path.startswith(".git")} == {path for path in tree() if path[:4] != ".git"}


def test_ingest_from_any_place_to_any_place_gives_the_same_bytes(places, trees):
    settings = IngestSettings(size=(16, 16), val=0.2, test=0.2)
    seen = {}
    for source in PLACES:
        for target in PLACES:
            dataset = storage.join(places[target], f"from-{source}")
            result = ingest(trees[source], dataset, settings=settings, engine=create_engine("inline"))
            assert result.num_seen == len(tree())
            assert not storage.exists(storage.join(dataset, ".ingest"))
            files = {
                f"{folder}/{name}": storage.sha256_of_file(storage.join(dataset, folder, name))
                for folder in ("shards", "quarantine")
                for name in storage.list_files(storage.join(dataset, folder))
            }
            manifest = storage.read_json(storage.join(dataset, "manifest.json"))
            assert manifest["source"].pop("uri") == trees[source]
            seen[source, target] = files, manifest
            # Complete: a second run finds that there is nothing to do.
            assert ingest(trees[source], dataset, settings=settings, engine=create_engine("inline")).was_complete
    first = seen["local", "local"]
    assert len(first[0]) >= 4
    assert all(found == first for found in seen.values())


def test_a_dataset_reads_the_same_from_everywhere(places, trees):
    rows = {}
    for place, uri in places.items():
        dataset_uri = storage.join(uri, "dataset")
        ingest(trees["local"], dataset_uri, settings=IngestSettings(size=(16, 16)), engine=create_engine("inline"))
        dataset = Dataset(dataset_uri, verify="full")
        split = dataset.split("train")
        resident = reading.ResidentRows(dataset, split)
        groups = [reading.read_row_group(dataset, split, number) for number in range(len(split.row_groups))]
        images = np.concatenate([group.images for group in groups])
        assert np.array_equal(images, np.stack([resident.image(index) for index in range(split.num_examples)]))
        rows[place] = images, [path for group in groups for path in group.paths]
    for place in ("hdfs", "s3"):
        assert np.array_equal(rows[place][0], rows["local"][0])
        assert rows[place][1] == rows["local"][1]


def test_a_row_group_of_a_shard_that_is_open_is_one_request(places, write_dataset, monkeypatch):
    images = np.random.default_rng(0).integers(0, 255, (600, 32, 32, 3), dtype=np.uint8)
    local = write_dataset(images, row_group_rows=(200, 200, 200))
    requests = []
    read = RangeReader.read

    def counted(self: RangeReader, size: int | None = -1) -> bytes:
        content = read(self, size)
        requests.append(len(content))
        return content

    monkeypatch.setattr(RangeReader, "read", counted)
    for place in ("hdfs", "s3"):
        uri = storage.join(places[place], "copied")
        for name in ("manifest.json", *(f"shards/{shard.name}" for shard in local.manifest.shards)):
            storage.write_bytes(storage.join(uri, name), storage.read_bytes(storage.join(local.uri, name)))
        dataset = Dataset(uri)
        split = dataset.split("train")
        requests.clear()
        for number in range(3):
            group = reading.read_row_group(dataset, split, number)
            assert np.array_equal(group.images, images[200 * number : 200 * (number + 1)])
        # The footer, then every row group; not much more than its bytes.
        assert len(requests) == 4
        assert sum(requests) < images.nbytes + 300_000


def test_a_destination_that_can_not_be_written_is_said_before_the_source_is_listed(trees, hadoop, monkeypatch):
    listed = []
    monkeypatch.setattr("manyeyes.data.ingest.list_source", lambda *_: listed.append(1))
    with pytest.raises(UsageError, match=r"^s3://no-such-bucket/x can't be written: .*\. Choose another place\.$"):
        ingest(trees["local"], "s3://no-such-bucket/x", engine=create_engine("inline"))
    monkeypatch.setenv("HADOOP_USER_NAME", "mallory")
    with pytest.raises(UsageError, match=r"can't be written: Permission denied: user=mallory"):
        ingest(trees["local"], f"{hadoop.hdfs}/mine", engine=create_engine("inline"))
    assert not listed


def test_a_table_and_predictions_may_lie_in_the_root_of_a_file_system(
    places, trees, small_bundle, tmp_path, monkeypatch
):
    bundle = storage.absolute(small_bundle)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    folder, name = storage.split(places["hdfs"])[1], f"{uuid.uuid4().hex}.csv"
    rows = "".join(f"{folder}/photos/cat/n{number:02d}.jpg,{number % 2}\n" for number in range(8))
    storage.write_bytes(f"hdfs:///{name}", f"path,label\n{rows}".encode())
    out = f"hdfs:///{name}.jsonl"
    try:
        dataset = storage.join(places["local"], "from-root")
        assert ingest(f"hdfs:///{name}", dataset, engine=create_engine("inline")).num_written == 8
        assert predict(bundle, trees["hdfs"], out, engine=create_engine("inline")).num_predicted > 0
        assert storage.exists(out)
    finally:
        storage.remove(f"hdfs:///{name}")
        storage.remove(out)
    assert list((tmp_path / "here").iterdir()) == []


def test_predictions_that_can_not_be_written_are_said_before_any_image_is_read(trees, small_bundle, monkeypatch):
    monkeypatch.setattr("manyeyes.recognition.batch._predict_partition", lambda *_: pytest.fail("it began"))
    with pytest.raises(UsageError, match=r"^s3://no-such-bucket can't be written: the bucket .* does not exist"):
        predict(small_bundle, trees["local"], "s3://no-such-bucket/p.jsonl", engine=create_engine("inline"))


def namenode_calls(hadoop) -> int:
    """The listings and the questions for single files that the NameNode has answered so far."""
    time.sleep(METRICS_SECONDS)
    properties = xml.etree.ElementTree.parse(Path(hadoop.environment["HADOOP_CONF_DIR"]) / "hdfs-site.xml").iter(
        "property"
    )
    address = next(
        entry.findtext("value") for entry in properties if entry.findtext("name") == "dfs.namenode.http-address"
    )
    query = f"http://{address}/jmx?qry=Hadoop:service=NameNode,name=NameNodeActivity"
    with urllib.request.urlopen(query) as answer:
        values = json.load(answer)["beans"][0]
    return values["GetListingOps"] + values["FileInfoOps"] + values["GetBlockLocations"]


@pytest.mark.slow
def test_a_folder_of_many_small_files_on_hdfs_is_listed_in_pages_and_never_held(places, hadoop):
    from hdfs_native import Client

    uri = places["hdfs"]
    path = storage.filesystem(uri)[1]

    def create(first: int) -> None:
        client = Client(hadoop.hdfs)
        for number in range(first, MANY, 16):
            client.create(f"{path}/class {number % 2}/{number:06d}.jpg").close()

    threads = [threading.Thread(target=create, args=(first,)) for first in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    source = open_source(uri)
    before = namenode_calls(hadoop)
    tracemalloc.start()
    try:
        num_entries = sum(1 for _ in source.entries())
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert num_entries == MANY
    # A page holds a thousand names; three folders are listed, the top one twice.
    assert MANY // 1000 <= namenode_calls(hadoop) - before <= MANY // 1000 + 8
    assert peak_bytes < 1_000_000
