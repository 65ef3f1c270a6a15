from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.errors import DatasetError


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (70, 5, 4, 3), np.uint8)


@pytest.fixture
def dataset(write_dataset, images):
    """70 images in row groups of 20, 20, 20 (first shard) and 10."""
    return write_dataset(images, row_group_rows=(20, 20, 20, 10))


def test_rows_come_back_in_order_with_their_labels_and_paths(dataset, images):
    groups = [group for shard in dataset.split("train").shards for group in dataset.rows(shard)]
    assert np.array_equal(np.concatenate([group.images for group in groups]), images)
    assert np.concatenate([group.labels for group in groups]).tolist() == [i % 3 for i in range(70)]
    assert [path for group in groups for path in group.paths] == [f"images/{i:06d}.jpg" for i in range(70)]
    assert [group.groups for group in groups] == [[None] * 20] * 3 + [[None] * 10]


def test_encoded_images_come_back_as_bytes(write_dataset):
    encoded = [bytes([i]) * (i + 1) for i in range(10)]
    dataset = write_dataset(encoded, row_group_rows=(4, 6))
    (shard,) = dataset.split("train").shards
    assert [image for group in dataset.rows(shard) for image in group.images] == encoded


def test_example_indices_count_through_the_shards(dataset):
    split = dataset.split("train")
    assert split.num_examples == 70
    assert split.row_groups == ((0, 0), (0, 1), (0, 2), (1, 0))
    assert split.row_group_starts.tolist() == [0, 20, 40, 60]


def test_arrays_outlive_the_file(dataset, images):
    shard = dataset.split("train").shards[0]
    with dataset.open_shard(shard) as reader:
        group = reader.read(1)
    Path(dataset.shard_uri(shard)).unlink()
    assert np.array_equal(group.images, images[20:40])


def test_a_manifest_that_lists_files_elsewhere_is_refused(dataset, tmp_path):
    shard = dataset.manifest.shards[0]
    elsewhere = dataclasses.replace(shard, name=f"../../{Path(dataset.uri).name}/shards/{shard.name}")
    dataclasses.replace(dataset.manifest, shards=(elsewhere,)).save(str(tmp_path))
    with pytest.raises(DatasetError, match="is not a file of the dataset"):
        Dataset(str(tmp_path))


def test_a_split_that_is_not_there_names_those_that_are(dataset):
    with pytest.raises(DatasetError, match=r"no split 'test'\. It has: train"):
        dataset.split("test")


def test_a_folder_that_is_no_dataset_says_how_to_make_one(tmp_path):
    with pytest.raises(DatasetError, match="manyeyes ingest"):
        Dataset(str(tmp_path / "nothing"))
    with pytest.raises(DatasetError, match=r"has no manifest\.json"):
        Dataset(str(tmp_path))


def test_a_missing_shard_is_named(dataset):
    Path(dataset.shard_uri(dataset.manifest.shards[1])).unlink()
    with pytest.raises(DatasetError, match=r"part-00001\.parquet is missing"):
        Dataset(dataset.uri)


def test_a_shortened_shard_is_named(dataset):
    uri = dataset.shard_uri(dataset.manifest.shards[1])
    os.truncate(uri, storage.size_bytes(uri) - 1)
    with pytest.raises(DatasetError, match=r"part-00001\.parquet has \d+ bytes, the manifest says"):
        Dataset(dataset.uri)


def test_one_flipped_bit_fails_the_checksum(dataset):
    uri = dataset.shard_uri(dataset.manifest.shards[0])
    content = bytearray(storage.read_bytes(uri))
    content[len(content) // 2] ^= 1
    storage.write_bytes(uri, bytes(content))
    Dataset(dataset.uri, verify="size")
    with pytest.raises(DatasetError, match=r"part-00000\.parquet fails its checksum"):
        Dataset(dataset.uri, verify="full")
    with pytest.raises(DatasetError, match="fails its checksum"):
        Dataset(dataset.uri, verify="auto")


def test_a_dataset_of_another_decoder_is_not_called_damaged(dataset):
    of_another = {**dataset.manifest.preprocessing, "decoder": "opencv-9"}
    dataclasses.replace(dataset.manifest, preprocessing=of_another).save(dataset.uri)
    with pytest.raises(DatasetError, match=r"made with the decoder 'opencv-9'.* Use the version of Manyeyes") as caught:
        Dataset(dataset.uri)
    assert "damaged" not in str(caught.value)


def test_a_changed_preprocessing_is_noticed(dataset):
    dataclasses.replace(dataset.manifest, preprocessing_fingerprint="0" * 16).save(dataset.uri)
    with pytest.raises(DatasetError, match="fingerprint"):
        Dataset(dataset.uri)
