from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np


def _manyeyes(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "manyeyes.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_run_becomes_a_bundle_that_predicts_a_folder(small_run: str, tmp_path: Path) -> None:
    exported = _manyeyes("export", small_run, tmp_path / "bundle")
    assert exported.returncode == 0, exported.stderr
    assert "largest difference of a logit" in exported.stdout
    assert f"Next: manyeyes serve {tmp_path / 'bundle'}" in exported.stdout
    assert f"because it was not evaluated. For them: manyeyes evaluate {small_run} DATASET" in exported.stdout
    assert exported.stderr == ""

    (tmp_path / "photos").mkdir()
    for index in range(3):
        pixels = np.full((30, 30, 3), 60, np.uint8)
        pixels[:, :, 0] = 170
        cv2.imwrite(str(tmp_path / "photos" / f"{index}.png"), pixels)
    (tmp_path / "photos" / "bad.png").write_bytes(b"bad")
    predicted = _manyeyes("predict", tmp_path / "bundle", tmp_path / "photos", tmp_path / "out.jsonl", "--workers", 1)
    assert predicted.returncode == 0, predicted.stderr
    assert "4 seen = 3 predicted + 1 failed (not_an_image: 1)" in predicted.stdout
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row.get("class_name") for row in rows] == ["blue", "blue", "blue", None]


def test_json_stands_alone_on_standard_output(small_run: str, small_bundle: str, tmp_path: Path) -> None:
    exported = _manyeyes("export", small_run, tmp_path / "bundle", "--json")
    assert json.loads(exported.stdout)["parity"]["top1_agreement"] == 1.0
    cv2.imwrite(str(tmp_path / "one.png"), np.zeros((30, 30, 3), np.uint8))
    out = tmp_path / "out.parquet"
    predicted = _manyeyes("predict", small_bundle, tmp_path / "one.png", out, "--json", "--engine", "inline")
    assert json.loads(predicted.stdout)["num_seen"] == 1


def test_mistakes_are_one_line_and_a_proper_exit_code(small_bundle: str, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    cv2.imwrite(str(photo), np.zeros((30, 30, 3), np.uint8))
    for arguments, code, words in (
        (("export", tmp_path / "nowhere", tmp_path / "b"), 2, "no run"),
        (("export", tmp_path, tmp_path / "b", "--which", "middle"), 2, "best, last"),
        (("predict", tmp_path / "nowhere", tmp_path, tmp_path / "o.jsonl"), 5, "no bundle"),
        (("predict", small_bundle, tmp_path / "nowhere", tmp_path / "o.jsonl"), 3, "nothing at"),
        (("predict", small_bundle, tmp_path, tmp_path / "o.csv"), 2, ".parquet or .jsonl"),
        (("serve", tmp_path / "nowhere", "--port", 0), 5, "no bundle"),
        (("predict", small_bundle, "a.jsonl", "a.jsonl"), 2, "is the source itself"),
        (("predict", small_bundle, photo, photo / "o.jsonl", "--engine", "inline"), 2, "can't be written"),
    ):
        done = _manyeyes(*arguments)
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1


def test_a_folder_of_nothing_but_damage_is_told_row_by_row_and_is_a_failure(small_bundle: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no picture")
    done = _manyeyes("predict", small_bundle, tmp_path / "photos", tmp_path / "o.jsonl", "--engine", "inline", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["failed"] == {"not_an_image": 1}
    assert json.loads((tmp_path / "o.jsonl").read_text())["reason"] == "not_an_image"
    assert done.stderr.startswith("manyeyes: error: None of the 1 inputs could be recognised")


def test_a_reader_that_goes_away_is_no_error(small_bundle: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m manyeyes.cli.main predict --help | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
