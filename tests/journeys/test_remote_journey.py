"""Every verb reads from and writes to HDFS and S3, by the command line alone; nothing lies on a local disk."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.request

import cv2
import pytest
from sklearn.datasets import load_digits

from manyeyes import storage

pytestmark = pytest.mark.slow

MANYEYES = (sys.executable, "-m", "manyeyes.cli.main")
NUM_IMAGES = 240
TINY = ("--set", "model.options={width=8, stages=2, convolutions=1}", "--learning-rate", "0.02")


@pytest.fixture
def places(hadoop, s3, monkeypatch):
    """A folder on HDFS and one on S3, which the environment tells how to reach; each has the same folder of digits."""
    for name, value in {**hadoop.environment, **s3.environment}.items():
        monkeypatch.setenv(name, value)
    uris = [f"{root}/journey {os.getpid()}" for root in (hadoop.hdfs, s3.bucket_uri)]
    digits = load_digits(n_class=4)
    for uri in uris:
        for index in range(NUM_IMAGES):
            image = cv2.resize((digits.images[index] * 15).astype("uint8"), (16, 16))
            content = cv2.imencode(".png", image)[1].tobytes()
            storage.write_bytes(f"{uri}/photos/{digits.target[index]}/{index:04d}.png", content)
        storage.write_bytes(f"{uri}/photos/0/broken.png", b"\x89PNG\r\n\x1a\nand no more")
    return uris


def manyeyes(*arguments):
    """Run a verb with --json; returns what it printed."""
    command = [*MANYEYES, *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_whole_journey_runs_from_one_remote_file_system_to_the_other_and_back(places):
    on_hdfs, on_s3 = places
    # Every verb but serve reads from one and writes to the other.
    dataset, run, bundle, out = (
        f"{on_s3}/dataset",
        f"{on_hdfs}/run",
        f"{on_s3}/bundle",
        f"{on_hdfs}/predictions.parquet",
    )

    ingested = manyeyes("ingest", f"{on_hdfs}/photos", dataset, "--channels", 1, "--size", 16)
    assert (ingested["num_seen"], ingested["num_written"]) == (NUM_IMAGES + 1, NUM_IMAGES)
    assert manyeyes("ingest", f"{on_hdfs}/photos", dataset, "--channels", 1, "--size", 16)["was_complete"]

    trained = manyeyes("train", dataset, "--out", run, "--epochs", 2, "--batch-size", 16, *TINY)
    assert trained["epochs"] == 2
    assert manyeyes("train", dataset, "--out", run, "--resume")["global_step"] == trained["global_step"]

    evaluated = manyeyes("evaluate", run, dataset)
    assert evaluated["metrics"]["num_examples"] == ingested["written"]["test"]
    assert storage.read_bytes(f"{run}/evaluation/test/confusion_matrix.png").startswith(b"\x89PNG")

    manyeyes("export", run, bundle)
    predicted = manyeyes("predict", bundle, f"{on_s3}/photos", out)
    assert (predicted["num_seen"], predicted["num_failed"]) == (NUM_IMAGES + 1, 1)
    assert storage.size_bytes(out) > 0

    server = subprocess.Popen([*MANYEYES, "serve", bundle, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        said = ""
        while (line := server.stderr.readline()) and "http://" not in line:  # its log comes first
            said += line
        address = re.search(r"http://\S+", line)
        assert address, said
        image = storage.read_bytes(f"{on_s3}/photos/0/0000.png")
        request = urllib.request.Request(f"{address[0]}/v1/recognize", data=image, method="POST")
        with urllib.request.urlopen(request, timeout=120) as response:
            assert json.load(response)["predictions"][0]["class_name"] in {"0", "1", "2", "3"}
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=120) == 0
