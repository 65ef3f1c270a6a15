"""What an ingest refuses, and that it loses nothing by it."""

from __future__ import annotations

import pytest

from ingesting import SMALL, encode, files, make, photo
from manyeyes.data.ingest import IngestSettings, parse_size, read_class_names
from manyeyes.errors import SourceError, UsageError


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "No images found"),
        ({"notes.txt": b""}, "No images found in .*1 not_an_image_name"),
        ({"a/x.jpg": b"", "a/y.jpg": b""}, "images of one class only. A classifier needs two or more"),
        ({"x.jpg": b""}, "None of the 1 images in .* has a usable label: 1 missing_label"),
    ],
)
def test_a_source_that_no_classifier_can_learn_from_is_refused(tmp_path, files, message):
    (tmp_path / "s").mkdir()
    for name, content in files.items():
        (tmp_path / "s" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "s" / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        make(tmp_path / "s", tmp_path / "d")


def test_a_destination_that_is_something_else_is_left_alone(photos, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("x")
    for settings in (SMALL, IngestSettings(size=(16, 16), overwrite=True)):
        with pytest.raises(UsageError, match="not empty and not a Manyeyes dataset"):
            make(photos, tmp_path / "full", settings)
    assert (tmp_path / "full" / "thesis.doc").exists()
    (tmp_path / "app" / "shards").mkdir(parents=True)
    (tmp_path / "app" / "manifest.json").write_text('{"name": "my app"}')
    with pytest.raises(UsageError, match="not empty and not a Manyeyes dataset"):
        make(photos, tmp_path / "app", IngestSettings(size=(16, 16), overwrite=True))
    assert (tmp_path / "app" / "manifest.json").read_text() == '{"name": "my app"}'
    damaged = tmp_path / "damaged"
    make(photos, damaged)
    (damaged / "manifest.json").write_text("{")
    assert make(photos, damaged, IngestSettings(size=(16, 16), overwrite=True)).num_written == 60
    with pytest.raises(UsageError, match="is a file"):
        make(photos, tmp_path / "full" / "thesis.doc")
    with pytest.raises(UsageError, match="can't be written"):
        make(photos, "/proc/nothing/d")
    with pytest.raises(UsageError, match="inside its source"):
        make(photos, f"{photos}/d")


def test_a_dataset_is_not_a_source(photos, tmp_path):
    make(photos, tmp_path / "d")
    with pytest.raises(SourceError, match="is a Manyeyes dataset already"):
        make(tmp_path / "d", tmp_path / "e")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoding": "raw"}, "Say which with --size"),
        ({"channels": 4}, "--channels 4"),
        ({"resize_short": 256}, "--resize-short goes with"),
        ({"val": 0.6, "test": 0.6}, "sum of at most"),
        ({"max_pixels": 0}, "--max-pixels 0"),
        ({"size": None, "max_pixels": 200_000_000}, "--max-pixels 200000000 would keep originals"),
        ({"size": (160, 120), "resize_short": 140}, "resize_short=140 leaves less.*at least 160"),
        ({"seed": -1}, "--seed -1"),
        ({"class_names": ("a", "a")}, "'a' twice"),
    ],
)
def test_impossible_settings_are_refused(photos, tmp_path, values, message):
    with pytest.raises(UsageError, match=message):
        make(photos, tmp_path / "d", IngestSettings(**values))


def test_sizes_and_class_names_are_read(tmp_path):
    assert parse_size("160") == (160, 160) and parse_size("128X96") == (128, 96)
    for text in ("", "a", "0", "-5", "1x2x3", "12.5", "x"):
        with pytest.raises(UsageError, match="is not a size"):
            parse_size(text)
    (tmp_path / "names").write_text("cat\n\n big dog \n")
    assert read_class_names(str(tmp_path / "names")) == ("cat", "big dog")
    with pytest.raises(UsageError, match="can't be read"):
        read_class_names(str(tmp_path / "none"))


def test_a_refused_source_leaves_the_destination_as_it_was(photos, tmp_path):
    (tmp_path / "s" / "a").mkdir(parents=True)
    (tmp_path / "s" / "a" / "x.jpg").write_bytes(encode(photo(0)))
    with pytest.raises(SourceError):
        make(tmp_path / "s", tmp_path / "d")
    assert not (tmp_path / "d").exists()
    make(photos, tmp_path / "d")
    before = files(tmp_path / "d")
    with pytest.raises(SourceError):
        make(tmp_path / "s", tmp_path / "d", IngestSettings(size=(16, 16), overwrite=True))
    assert files(tmp_path / "d") == before
