from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number in range(40):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(cv2.imencode(".png", np.full((8, 9, 3), number, np.uint8))[1].tobytes())
    (root / "a" / "bad.jpg").write_bytes(b"\xff\xd8\xff")
    (root / "a" / "notes.txt").write_text("x")
    return root


def manyeyes(*arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manyeyes.cli.main", "ingest", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_balance_is_printed_and_the_next_command(photos, tmp_path):
    done = manyeyes(photos, tmp_path / "d", "--size", "8", "--engine", "inline")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    for row in (
        ["seen", "42"],
        ["=", "written", "40"],
        ["truncated", "1"],
        ["not_an_image_name", "1"],
    ):
        assert row in rows
    assert sum(int(row[1]) for row in rows if row and row[0] in ("train", "val", "test")) == 40
    assert f"manyeyes train {tmp_path}/d" in done.stdout
    assert "complete already" in manyeyes(photos, tmp_path / "d", "--size", "8", "--engine", "inline").stdout


def test_json_is_all_there_is_on_standard_output(photos, tmp_path):
    done = manyeyes(photos, tmp_path / "d", "--size", "8x6", "--channels", "1", "--json", "--engine", "inline")
    result = json.loads(done.stdout)
    assert result["image_shape"] == [8, 6, 1] and result["num_seen"] == 42 and done.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--size", "big"], 2, "--size 'big' is not a size"),
        (["--fit", "squeeze"], 2, "fit='squeeze' is not one of crop, pad, stretch"),
        (["--encoding", "png"], 2, "encoding='png' is not one of auto, raw, jpeg"),
        (["--channels", "2"], 2, "--channels '2' is not possible"),
        (["--source-kind", "zip"], 2, "Choose one of: auto, folder"),
        (["--engine", "cloud"], 2, "Unknown engine 'cloud'"),
        (["--class-names", "/nowhere"], 2, "class names can't be read"),
        (["--source-kind", "parquet"], 3, "has no .parquet file"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(photos, tmp_path, arguments, code, message):
    done = manyeyes(photos, tmp_path / "d", *arguments)
    assert done.returncode == code
    assert message in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout
    assert not Path(tmp_path, "d").exists()


def test_a_source_of_nothing_but_damage_is_counted_and_is_a_failure(tmp_path):
    for number in range(4):
        path = tmp_path / "bad" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"no picture")
    done = manyeyes(tmp_path / "bad", tmp_path / "d", "--engine", "inline")
    assert done.returncode == 3
    assert ["not_an_image", "4"] in [line.split() for line in done.stdout.splitlines()]
    assert "manyeyes train" not in done.stdout
    assert done.stderr.startswith("manyeyes: error: None of the 4 inputs could be written")


def test_a_missing_source_is_named(tmp_path):
    done = manyeyes(tmp_path / "none", tmp_path / "d")
    assert done.returncode == 3 and "There is nothing at" in done.stderr
