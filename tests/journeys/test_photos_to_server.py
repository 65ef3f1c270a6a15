"""From a folder as people have it to a server that answers, by the command line alone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

CLASSES = ("circle", "cross", "square")
NUM_PER_CLASS = 20
MANYEYES = (sys.executable, "-m", "manyeyes.cli.main")
ORIENTATION = 0x0112


def manyeyes(*arguments: object) -> str:
    """Run a verb; returns its standard output."""
    done = subprocess.run([*MANYEYES, *map(str, arguments)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    return done.stdout


def draw(class_name: str, number: int) -> np.ndarray:
    """A photo-like RGB image of 60 x 80 pixels: a coloured shape somewhere on a noisy ground."""
    random = np.random.default_rng([CLASSES.index(class_name), number])
    image = random.integers(0, 60, (60, 80, 3), dtype=np.uint8)
    x, y = int(random.integers(24, 56)), int(random.integers(22, 38))
    radius = int(random.integers(14, 20))
    colour = tuple(int(value) for value in random.integers(140, 256, 3))
    if class_name == "circle":
        cv2.circle(image, (x, y), radius, colour, -1)
    elif class_name == "square":
        cv2.rectangle(image, (x - radius, y - radius), (x + radius, y + radius), colour, -1)
    else:
        cv2.line(image, (x - radius, y - radius), (x + radius, y + radius), colour, 3)
        cv2.line(image, (x - radius, y + radius), (x + radius, y - radius), colour, 3)
    return image


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """60 good images as JPEG, PNG and WebP, one of them turned by EXIF and one transparent, and what lies about."""
    root = tmp_path / "photos"
    for class_name in CLASSES:
        (root / class_name).mkdir(parents=True)
        for number in range(NUM_PER_CLASS):
            image = Image.fromarray(draw(class_name, number))
            path = root / class_name / f"{number:02}.{('jpg', 'png', 'webp')[number % 3]}"
            if class_name == "circle" and number == 0:
                exif = Image.Exif()
                exif[ORIENTATION] = 6
                image.rotate(90, expand=True).save(path, exif=exif)
            elif class_name == "square" and number == 1:
                image.putalpha(200)
                image.save(path)
            else:
                image.save(path)
    whole = (root / "cross" / "00.jpg").read_bytes()
    (root / "cross" / "broken.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "cross" / "empty.png").write_bytes(b"")
    (root / "circle" / "notes.txt").write_text("bought a new lens")
    return root


@pytest.mark.slow
def test_a_folder_of_photos_becomes_a_server_that_answers(photos: Path, tmp_path: Path) -> None:
    dataset, run, bundle, out = (tmp_path / name for name in ("dataset", "run", "bundle", "predictions.jsonl"))

    ingested = json.loads(manyeyes("ingest", photos, dataset, "--size", 32, "--val", 0.2, "--test", 0.2, "--json"))
    assert ingested["num_seen"] == 63
    assert ingested["num_written"] == sum(ingested["written"].values()) == 60
    assert ingested["quarantined"] == {"empty": 1, "truncated": 1}
    assert ingested["skipped"] == {"not_an_image_name": 1}

    tiny = ("--set", "model.options={width=8, stages=2, convolutions=1}", "--set", "train.tensorboard=false")
    trained = json.loads(
        manyeyes(
            "train", dataset, "--out", run, "--epochs", 2, "--batch-size", 4, *tiny, "--learning-rate", 0.01, "--json"
        )
    )
    assert (trained["epochs"], trained["global_step"]) == (2, 2 * -(-ingested["written"]["train"] // 4))

    evaluated = json.loads(manyeyes("evaluate", run, dataset, "--json"))
    assert evaluated["metrics"]["num_examples"] == ingested["written"]["test"]
    assert (run / "evaluation" / "test" / "confusion_matrix.png").read_bytes().startswith(b"\x89PNG")

    assert f"Next: manyeyes serve {bundle}" in manyeyes("export", run, bundle)

    predicted = json.loads(manyeyes("predict", bundle, photos, out, "--json"))
    assert (predicted["num_seen"], predicted["num_predicted"], predicted["num_failed"]) == (62, 60, 2)
    rows = {row["path"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert {row["path"] for row in rows.values() if "reason" in row} == {"cross/broken.jpg", "cross/empty.png"}
    assert {row["class_name"] for row in rows.values() if "class_name" in row} <= set(CLASSES)

    server = subprocess.Popen([*MANYEYES, "serve", str(bundle), "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        said = ""
        while (line := server.stderr.readline()) and "http://" not in line:  # its log comes first
            said += line
        address = re.search(r"http://\S+", line)
        assert address, said
        for path in ("circle/00.jpg", "square/01.png", "cross/02.webp"):
            answer = ask(f"{address[0]}/v1/recognize?top_k=3", (photos / path).read_bytes())
            assert [each["class_name"] for each in answer["predictions"]] == [
                each["class_name"] for each in rows[path]["top_k"]
            ]
            assert answer["predictions"][0]["probability"] == pytest.approx(rows[path]["probability"], abs=1e-5)
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=120) == 0


def ask(url: str, body: bytes) -> dict[str, Any]:
    """POST an image; returns the answer."""
    with urllib.request.urlopen(urllib.request.Request(url, data=body, method="POST"), timeout=120) as response:
        return json.load(response)
