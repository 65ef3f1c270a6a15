from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manyeyes.data.sources import Skipped, detect_kind, open_source
from manyeyes.data.sources.webdataset import expand_braces
from manyeyes.errors import ImageError, Reason, SourceError, UsageError


def png(value: int = 0) -> bytes:
    return cv2.imencode(".png", np.full((4, 5, 3), value, np.uint8))[1].tobytes()


def put(root: Path, files: dict[str, bytes | str]) -> str:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def read_all(source):
    found = list(source.entries())
    skipped = {item.path: item.reason for item in found if isinstance(item, Skipped)}
    return [item for item in found if not isinstance(item, Skipped)], skipped


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


def make_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


# Folder


def test_folders_are_classes_and_folders_below_belong_to_them(tmp_path):
    source = open_source(
        put(tmp_path, {"cat/a.jpg": b"1", "cat/deep/er/b.PNG": b"2", "dög house/c d.jpeg": b"3", "root.jpg": b"4"})
    )
    entries, _ = read_all(source)
    assert [(e.path, e.label, e.split, e.problem) for e in entries] == [
        ("cat/a.jpg", "cat", None, None),
        ("cat/deep/er/b.PNG", "cat", None, None),
        ("dög house/c d.jpeg", "dög house", None, None),
        ("root.jpg", None, None, Reason.MISSING_LABEL),
    ]
    assert [source.read(e) for e in entries] == [b"1", b"2", b"3", b"4"]
    assert [e.size_bytes for e in entries] == [1, 1, 1, 1]


def test_a_first_level_of_split_names_is_the_split(tmp_path):
    source = open_source(
        put(tmp_path, {"train/cat/a.jpg": b"", "valid/cat/b.jpg": b"", "Testing/cat/c.jpg": b"", "train/d.jpg": b""})
    )
    entries, _ = read_all(source)
    assert [(e.split, e.label) for e in entries] == [("test", "cat"), ("train", "cat"), ("train", None), ("val", "cat")]


def test_a_class_may_be_called_train(tmp_path):
    entries, _ = read_all(open_source(put(tmp_path, {"train/a.jpg": b"", "car/b.jpg": b"", "plane/c.jpg": b""})))
    assert [(e.split, e.label) for e in entries] == [(None, "car"), (None, "plane"), (None, "train")]


def test_what_is_passed_over_is_counted_with_its_reason(tmp_path):
    put(tmp_path, {"a/x.jpg": b"", "a/.DS_Store": b"", "a/notes.txt": b"", "a/Makefile": b"", ".git/x.jpg": b""})
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    _, skipped = read_all(open_source(str(tmp_path)))
    assert skipped == {
        ".git": "hidden_folder",
        "a/.DS_Store": "hidden_file",
        "a/notes.txt": "not_an_image_name",
        "a/Makefile": "not_an_image_name",
        "a/pipe.jpg": "not_a_file",
    }


def test_links_are_followed_and_loops_end(tmp_path):
    put(tmp_path / "elsewhere", {"x.jpg": b"x"})
    root = put(tmp_path / "root", {"cat/a.jpg": b"a"})
    (tmp_path / "root" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "cat" / "up").symlink_to(tmp_path / "root")
    (tmp_path / "root" / "cat" / "broken.jpg").symlink_to(tmp_path / "nowhere")
    source = open_source(root)
    entries, skipped = read_all(source)
    assert [(e.path, e.label) for e in entries] == [
        ("cat/a.jpg", "cat"),
        ("cat/broken.jpg", "cat"),
        ("dog/x.jpg", "dog"),
    ]
    assert skipped == {"cat/up": "link_to_a_folder_above"}
    assert source.read(entries[2]) == b"x"
    with pytest.raises(ImageError, match="unreadable"):
        source.read(entries[1])


def test_folders_that_link_to_each_other_are_read_once_on_each_way(tmp_path):
    root = put(tmp_path, {"cat/a.jpg": b"a", "dog/b.jpg": b"b"})
    (tmp_path / "cat" / "dogs").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "cats").symlink_to(tmp_path / "cat")
    entries, skipped = read_all(open_source(root))
    assert [e.path for e in entries] == ["cat/a.jpg", "cat/dogs/b.jpg", "dog/b.jpg", "dog/cats/a.jpg"]
    assert skipped == dict.fromkeys(("cat/dogs/cats", "dog/cats/dogs"), "link_to_a_folder_above")


def test_a_name_that_is_not_utf8_is_read(tmp_path):
    (tmp_path / "cat").mkdir()
    (Path(os.fsencode(tmp_path).decode()) / "cat" / os.fsdecode(b"\xff.jpg")).write_bytes(b"x")
    source = open_source(str(tmp_path))
    (entry,), _ = read_all(source)
    entry.path.encode("utf-8")
    assert source.read(entry) == b"x"


# Table


def test_a_csv_names_paths_labels_groups_and_splits(tmp_path):
    put(tmp_path, {"img/a b.jpg": b"1", "ü.jpg": b"2", "elsewhere.jpg": b"3"})
    table = '\ufeffpath, label,group,split\n"img/a b.jpg",cat,g1,train\nü.jpg,dog,,valid\n'
    table += f"{tmp_path}/elsewhere.jpg,cat,g2,\nnone.jpg,,g2,\n,cat,,\n"
    source = open_source(put(tmp_path, {"t.csv": table}) + "/t.csv")
    entries, _ = read_all(source)
    assert [(e.label, e.group, e.split, e.problem) for e in entries] == [
        ("cat", "g1", "train", None),
        ("dog", None, "val", None),
        ("cat", "g2", None, None),
        (None, "g2", None, Reason.MISSING_LABEL),
        ("cat", None, None, Reason.UNREADABLE),
    ]
    assert [source.read(e) for e in entries[:3]] == [b"1", b"2", b"3"]
    with pytest.raises(ImageError, match="unreadable"):
        source.read(entries[3])


def test_json_lines_may_have_integer_labels(tmp_path):
    lines = '{"path": "a.jpg", "label": 3}\n\n{"path": "b.jpg", "label": null, "group": 7}\n'
    entries, _ = read_all(open_source(put(tmp_path, {"t.jsonl": lines}) + "/t.jsonl"))
    assert [(e.path, e.label, e.group) for e in entries] == [("a.jpg", "3", None), ("b.jpg", None, "7")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "a.jpg,cat\n", "first line must name the columns path and label.*Found: a.jpg, cat"),
        ("t.csv", "", "Found: nothing"),
        ("t.csv", "path,label,split\na.jpg,cat,traim\n", "line 2: split 'traim' is unknown"),
        ("t.csv", "path,label\na,b.jpg,cat\n", "line 2: more cells than columns"),
        ("t.csv", b"path,label\n\xff\xfe,cat\n", "not a UTF-8 CSV table"),
        ("t.jsonl", '{"path": "a"}\n{bad\n', "line 2: not JSON"),
        ("t.jsonl", "[1]\n", "line 1: expected an object"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, name, content, message):
    source = open_source(put(tmp_path, {name: content}) + f"/{name}")
    with pytest.raises(SourceError, match=message):
        list(source.entries())


# IDX


@pytest.fixture
def digits():
    return np.random.default_rng(0).integers(0, 256, (7, 3, 4), np.uint8)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("channels", [None, 1, 3])
def test_idx_pairs_become_pixels(tmp_path, digits, suffix, channels):
    images = digits if channels is None else np.repeat(digits[..., None], channels, axis=3)
    pack = gzip.compress if suffix else bytes
    labels = np.arange(7, dtype=np.uint8)
    put(tmp_path, {f"train-images-idx{images.ndim}-ubyte{suffix}": pack(idx(images))})
    put(tmp_path, {f"train-labels-idx1-ubyte{suffix}": pack(idx(labels)), "LICENSE": b""})
    put(tmp_path, {"t10k-images-idx3-ubyte": idx(digits[:2]), "t10k-labels-idx1-ubyte": idx(labels[:2])})
    source = open_source(str(tmp_path))
    assert source.kind == "idx"
    entries, skipped = read_all(source)
    assert [e.split for e in entries] == ["test"] * 2 + ["train"] * 7
    assert [e.label for e in entries[2:]] == list("0123456")
    assert skipped == {"LICENSE": "not_an_idx_pair"}
    for index, entry in enumerate(entries[2:]):
        assert np.array_equal(source.read(entry), images[index].reshape(3, 4, -1))
    assert source.image_shape == ((3, 4, 1) if channels != 3 else None)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (lambda x: x, lambda y: y[:-1], "damaged|asks for"),
        (lambda x: x[:-1], lambda y: y, "asks for"),
        (lambda x: b"\x89PNG" + x[4:], lambda y: y, "not an IDX file: it begins with 89504e47"),
        (lambda x: x[:7], lambda y: y, "cut short"),
        (lambda x: x, lambda y: idx(np.zeros(6, np.uint8)), "says 7 images, but .* has 6 labels"),
        (lambda x: x, lambda y: None, "has no labels"),
    ],
)
def test_a_damaged_idx_pair_is_refused(tmp_path, digits, images, labels, message):
    contents = {
        "train-images-idx3-ubyte": images(idx(digits)),
        "train-labels-idx1-ubyte": labels(idx(np.zeros(7, np.uint8))),
    }
    put(tmp_path, {name: content for name, content in contents.items() if content is not None})
    with pytest.raises(SourceError, match=message):
        list(open_source(str(tmp_path)).entries())


def test_a_gzipped_idx_file_that_is_cut_short_is_refused(tmp_path, digits):
    put(tmp_path, {"train-images-idx3-ubyte.gz": gzip.compress(idx(digits))})
    put(tmp_path, {"train-labels-idx1-ubyte.gz": gzip.compress(idx(np.zeros(7, np.uint8)))[:-9]})
    with pytest.raises(SourceError, match="cut short"):
        list(open_source(str(tmp_path)).entries())


@pytest.mark.parametrize("name", ["train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "a.parquet"])
def test_a_container_that_was_written_anew_is_read_anew(tmp_path, digits, name):
    for images in (digits, digits[:, ::-1].copy(), np.concatenate([digits] * 2, axis=1)):
        if name.endswith(".parquet"):
            pq.write_table(
                pa.table({"image": [image.tobytes() for image in images], "label": range(7)}), tmp_path / name
            )
        else:
            pack = gzip.compress if name.endswith(".gz") else bytes
            put(tmp_path, {name: pack(idx(images)), "train-labels-idx1-ubyte": idx(np.arange(7, dtype=np.uint8))})
        source = open_source(str(tmp_path))
        for entry, image in zip(read_all(source)[0], images, strict=True):
            assert bytes(source.read(entry)) == image.tobytes()


# WebDataset


def test_webdataset_samples_are_read_in_place(tmp_path):
    members = {"a/0.jpg": b"zero", "a/0.cls": b"3", "a/1.PNG": b"one", "a/1.json": b'{"label": "dog", "group": 5}'}
    members |= {
        "2.jpg": b"two",
        "2.txt": b"cat\n",
        "3.jpg": b"three",
        "4.cls": b"1",
        "5.jpg": b"",
        "5.jpeg": b"x",
        "5.cls": b"0",
    }
    make_tar(tmp_path / "train-00.tar", members | {"6.jpg": b"six", "6.json": b"{bad"})
    source = open_source(str(tmp_path))
    entries, skipped = read_all(source)
    assert [(e.path, e.label, e.group, e.problem) for e in entries] == [
        ("train-00.tar/a/0.jpg", "3", None, None),
        ("train-00.tar/a/1.PNG", "dog", "5", None),
        ("train-00.tar/2.jpg", "cat", None, None),
        ("train-00.tar/3.jpg", None, None, Reason.MISSING_LABEL),
        ("train-00.tar/5.jpg", "0", None, None),
        ("train-00.tar/6.jpg", None, None, Reason.MISSING_LABEL),
    ]
    assert {e.split for e in entries} == {"train"}
    assert [source.read(e) for e in entries] == [b"zero", b"one", b"two", b"three", b"", b"six"]
    assert skipped == {"/4": "no_image_in_sample", "5.jpeg": "second_image_of_sample"}


def test_patterns_of_tars_are_expanded(tmp_path):
    for number in range(3):
        make_tar(tmp_path / f"s-{number:02d}.tar", {"0.jpg": b"", "0.cls": b"1"})
    assert len(read_all(open_source(f"{tmp_path}/s-{{00..01}}.tar"))[0]) == 2
    assert len(read_all(open_source(f"{tmp_path}/s-*.tar"))[0]) == 3
    assert expand_braces("x{a,b}{1..2}") == ["xa1", "xa2", "xb1", "xb2"]
    with pytest.raises(SourceError, match=r"no file .*s-03\.tar"):
        list(open_source(f"{tmp_path}/s-{{02..03}}.tar").entries())


def test_a_tar_that_is_cut_short_gives_what_it_has_and_says_so(tmp_path):
    make_tar(tmp_path / "a.tar", {f"{i}.{s}": b"x" * 600 for i in range(5) for s in ("jpg", "cls")})
    content = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(content[: 512 * 3 * 5 + 100])
    entries, _ = read_all(open_source(str(tmp_path / "a.tar")))
    assert [e.path for e in entries[:2]] == ["a.tar/0.jpg", "a.tar/1.jpg"]
    assert entries[-1].problem is Reason.TRUNCATED


@pytest.mark.parametrize("damage", ["header", "cut between members"])
def test_a_tar_whose_end_can_not_be_reached_says_so(tmp_path, damage):
    make_tar(tmp_path / "a.tar", {f"{i}.{s}": b"x" * 600 for i in range(5) for s in ("jpg", "cls")})
    content, third_sample = bytearray((tmp_path / "a.tar").read_bytes()), 512 * 3 * 4
    if damage == "header":
        content[third_sample] ^= 0xFF
    else:
        del content[third_sample:]
    (tmp_path / "a.tar").write_bytes(content)
    entries, _ = read_all(open_source(str(tmp_path / "a.tar")))
    assert [(e.path, e.problem) for e in entries] == [
        ("a.tar/0.jpg", None),
        ("a.tar/1.jpg", None),
        ("a.tar#rest", Reason.TRUNCATED),
    ]


def test_links_in_a_tar_are_counted(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in (("0.jpg", tarfile.REGTYPE), ("1.jpg", tarfile.LNKTYPE), ("folder", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "0.jpg"
            tar.addfile(info)
    entries, skipped = read_all(open_source(str(tmp_path / "a.tar")))
    assert [e.path for e in entries] == ["a.tar/0.jpg"]
    assert skipped == {"1.jpg": "not_a_file"}


def test_a_tar_that_is_none_is_refused(tmp_path):
    put(tmp_path, {"a.tar": gzip.compress(b"x" * 5000)})
    with pytest.raises(SourceError, match="not a tar file"):
        list(open_source(str(tmp_path / "a.tar")).entries())


# Parquet


def hugging_face_table(names=("cat", "dog")):
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    image = pa.array(
        [{"bytes": b"0", "path": "a.jpg"}, {"bytes": b"1", "path": None}, {"bytes": None, "path": "c.jpg"}],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": image, "label": pa.array([1, 0, -1], pa.int64())})
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def test_a_hugging_face_dataset_keeps_its_class_names_and_splits(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(hugging_face_table(), tmp_path / "data" / "train-00000-of-00001.parquet", row_group_size=2)
    source = open_source(str(tmp_path))
    assert source.kind == "parquet" and source.class_names == ("cat", "dog")
    entries, _ = read_all(source)
    assert [(e.path, e.label, e.split, e.block, e.problem) for e in entries] == [
        ("a.jpg", "dog", "train", 0, None),
        ("train-00000-of-00001.parquet/000001", "cat", "train", 0, None),
        ("c.jpg", None, "train", 1, Reason.MISSING_LABEL),
    ]
    assert [source.read(e) for e in entries[:2]] == [b"0", b"1"]
    with pytest.raises(ImageError, match="empty"):
        source.read(entries[2])


def test_a_plain_binary_column_will_do(tmp_path):
    table = pa.table({"jpg": pa.array([b"0", b"1"], pa.large_binary()), "y": ["cat", ""], "split": ["test", None]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"), image_column="jpg", label_column="y")
    entries, _ = read_all(source)
    assert [(e.label, e.split) for e in entries] == [("cat", "test"), (None, None)]
    assert source.read(entries[1]) == b"1"
    with pytest.raises(SourceError, match=r"no column 'image'\. It has: jpg, y, split\. Say which with --image-column"):
        list(open_source(str(tmp_path / "x.parquet")).entries())


def test_a_file_that_is_not_parquet_is_refused(tmp_path):
    put(tmp_path, {"x.parquet": b"nonsense"})
    with pytest.raises(SourceError, match="not a readable Parquet file"):
        list(open_source(str(tmp_path / "x.parquet")).entries())


# Detection


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["a/x.jpg", "b/y.jpg", "README.md"], "folder"),
        (["x.jpg"], "folder"),
        (["t.csv"], "table"),
        (["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"], "idx"),
        (["0.tar", "1.tar"], "webdataset"),
        (["0.parquet", "README.md"], "parquet"),
    ],
)
def test_the_kind_of_a_folder_is_found(tmp_path, names, kind):
    assert detect_kind(put(tmp_path, dict.fromkeys(names, b""))) == kind


def test_an_unclear_source_is_not_guessed(tmp_path):
    uri = put(tmp_path, {"a/x.jpg": b"", "b/x.jpg": b"", "t.csv": b""})
    with pytest.raises(SourceError, match=r"several ways: 2 x folder, 1 x table\. Say which with --source-kind"):
        open_source(uri)
    with pytest.raises(SourceError, match="There is nothing at"):
        open_source(uri + "/none")
    with pytest.raises(SourceError, match="is not a source"):
        open_source(put(tmp_path, {"x.doc": b""}) + "/x.doc")
    with pytest.raises(UsageError, match="Choose one of: auto, folder"):
        open_source(uri, "tree")
