"""Metrics, readiness, overload, the end, and memory over thousands of requests."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import http.client
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from manyeyes import config
from manyeyes.engines.base import THREADS_VARIABLE
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.recognition.bundle import Bundle, Evaluation
from manyeyes.serving.metrics import Counter, Histogram, Metrics
from manyeyes.serving.models import LocalModel
from manyeyes.serving.settings import ServeSettings


def _metrics(client: httpx.Client) -> dict[str, dict[frozenset, float]]:
    """Values by name and labels, as Prometheus' own parser reads them."""
    found: dict[str, dict[frozenset, float]] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        assert family.documentation
        for sample in family.samples:
            found.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
    return found


def _total(metrics: dict[str, dict[frozenset, float]], name: str, **labels: str) -> float:
    wanted = set(labels.items())
    return sum(value for found, value in metrics.get(name, {}).items() if wanted <= found)


def test_models_are_listed_with_their_preprocessing_and_the_figures_of_their_evaluation(
    client: httpx.Client, evaluated_bundle: str
) -> None:
    (model,) = client.get("/v1/models").json()["models"]
    info = Bundle.load(evaluated_bundle).info
    assert info.evaluation is not None
    figures = config.from_dict(Evaluation, model["versions"][0]["evaluation"])
    assert figures == dataclasses.replace(info.evaluation, dataset="photos")
    # Names, but not where they lie on the machine of the training.
    provenance = model["versions"][0]["provenance"]
    for name in ("run", "dataset"):
        assert info.provenance[name].startswith("/")
        assert provenance[name] == info.provenance[name].rpartition("/")[2] != ""
    assert provenance["dataset_fingerprint"] == info.provenance["dataset_fingerprint"]
    # A program that prepares its own tensors for /v2 needs to know how.
    preprocessing = Preprocessing.from_dict(model["versions"][0]["preprocessing"])
    assert preprocessing.fingerprint == info.preprocessing_fingerprint


def test_the_metrics_count_what_was_asked(client: httpx.Client, images: dict[str, bytes]) -> None:
    before = _metrics(client)
    for _ in range(7):
        assert client.post("/v1/recognize", content=images[".png"]).status_code == 200
    label = client.post("/v1/recognize?top_k=1", content=images[".png"]).json()["predictions"][0]["class_name"]
    assert client.post("/v1/recognize", content=b"no image").status_code == 415
    after = _metrics(client)

    def added(name: str, **labels: str) -> float:
        return _total(after, name, **labels) - _total(before, name, **labels)

    assert added("manyeyes_requests_total", route="/v1/recognize", status="200") == 8
    assert added("manyeyes_requests_total", route="/v1/recognize", status="415") == 1
    assert added("manyeyes_errors_total", reason="not_an_image") == 1
    assert added("manyeyes_images_total", model="cnn") == 8
    assert added("manyeyes_predictions_total", class_name=label) == 8
    for name in ("queue_seconds", "decode_seconds", "input_brightness", "input_pixels", "input_bytes"):
        assert added(f"manyeyes_{name}_count") == 8, name
    assert added("manyeyes_input_pixels_sum") == 8 * 40 * 50
    assert added("manyeyes_batch_size_sum") == 8
    assert added("manyeyes_request_seconds_count", route="/v1/recognize") == 9
    assert _total(after, "manyeyes_queue_depth") == 0
    assert _total(after, "manyeyes_ready") == 1
    brightness = added("manyeyes_input_brightness_sum") / 8
    assert 100 < brightness < 155  # the image is uniform noise


def test_buckets_of_a_histogram_add_up_and_labels_are_escaped() -> None:
    metrics = Metrics()
    for value in (0.5, 1, 1.5, 99):
        metrics.batch_size.observe(("a", "1"), value)
    metrics.predictions.add(("a", "1", 'quote " slash \\ line\n'))
    families = {family.name: family for family in text_string_to_metric_families(metrics.to_text().decode())}
    samples = families["manyeyes_batch_size"].samples
    by_bound = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert (by_bound["1"], by_bound["2"], by_bound["64"], by_bound["+Inf"]) == (2, 3, 3, 4)
    (prediction,) = families["manyeyes_predictions"].samples
    assert prediction.labels["class_name"] == 'quote " slash \\ line\n'
    assert isinstance(metrics.images, Counter)
    assert isinstance(metrics.queue, Histogram)


def test_a_form_with_several_images_is_answered_in_order_and_a_bad_one_alone_by_its_error(
    client: httpx.Client, images: dict[str, bytes]
) -> None:
    contents = [images[".png"], b"no image", images[".jpg"], images[".gif"][:100], b""]
    parts = [("image", (f"{index}.bin", content)) for index, content in enumerate(contents)]
    answer = client.post("/v1/recognize?top_k=2", files=parts)
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert [result.get("reason") for result in results] == [None, "not_an_image", None, "truncated", "empty"]
    for index in (0, 2):
        alone = client.post("/v1/recognize?top_k=2", content=contents[index]).json()["predictions"]
        together = results[index]["predictions"]
        assert [each["label"] for each in together] == [each["label"] for each in alone]
        assert together[0]["probability"] == pytest.approx(alone[0]["probability"], abs=1e-5)
    other = client.post("/v1/recognize", files={"picture": images[".png"]})
    assert (other.status_code, other.json()["reason"]) == (400, "empty")
    many = client.post("/v1/recognize", files=[("image", b"x")] * 300)
    assert (many.status_code, many.json()["reason"]) == (413, "too_many_images")
    broken = client.post(
        "/v1/recognize", content=b"--x\r\nnothing", headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    assert broken.status_code == 400
    no_boundary = client.post("/v1/recognize", content=b"x", headers={"Content-Type": "multipart/form-data"})
    assert no_boundary.status_code == 400


def test_the_pixels_that_decided_come_as_a_grid_and_as_a_picture(client: httpx.Client) -> None:
    # A red square on grey: what makes it red is the square.
    pixels = np.full((24, 20, 3), 110, np.uint8)
    pixels[4:14, 4:14] = (20, 20, 230)
    encoded = cv2.imencode(".png", pixels)[1].tobytes()
    answer = client.post("/v1/saliency", content=encoded).json()
    assert answer["class_name"] == "red"
    saliency = np.array(answer["saliency"])
    assert saliency.shape == (24, 20)
    assert 0 <= saliency.min() <= saliency.max() <= 1
    assert saliency[4:14, 4:14].mean() > saliency[16:, :].mean()
    picture = client.post("/v1/saliency?format=png&label=0", content=encoded)
    assert picture.headers["content-type"] == "image/png"
    decoded = cv2.imdecode(np.frombuffer(picture.content, np.uint8), cv2.IMREAD_COLOR)
    assert decoded.shape == (24 * 12, 20 * 12, 3)
    assert client.post("/v1/saliency?label=3", content=encoded).status_code == 400
    assert client.post("/v1/saliency?format=gif", content=encoded).status_code == 400
    assert client.post("/v1/saliency", content=b"no image").status_code == 415


def test_while_an_image_is_explained_another_is_told_what_it_would_wait_for(
    client: httpx.Client, images: dict[str, bytes]
) -> None:
    url = f"{client.base_url}/v1/saliency"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: httpx.post(url, content=images[".png"], timeout=60), range(8)))
    assert {answer.status_code for answer in answers} == {200, 503}
    details = {answer.json()["detail"] for answer in answers if answer.status_code == 503}
    assert details == {"the pixels of another image are being explained, one at a time; try again later"}


def test_a_full_queue_answers_503_with_retry_after_and_goes_on(
    start_server: Callable[..., Any], images: dict[str, bytes]
) -> None:
    running = start_server("--max-queue", "2", "--threads", "1", MANYEYES_NUM_THREADS="1")
    large = cv2.imencode(".png", np.random.default_rng(0).integers(0, 255, (1500, 1500, 3), dtype=np.uint8))[
        1
    ].tobytes()
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(lambda _: httpx.post(f"{running.url}/v1/recognize", content=large, timeout=60), range(12))
        )
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    for answer in answers:
        if answer.status_code == 503:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["reason"] == "overloaded"
    with httpx.Client(base_url=running.url, timeout=60) as client:
        assert client.post("/v1/recognize", content=images[".png"]).status_code == 200
        # More images in one request than may wait are refused together.
        assert client.post("/v1/recognize", files=[("image", images[".png"])] * 3).status_code == 503
    assert running.stop() == 0


@pytest.mark.parametrize("asked, given", [(None, 3), (1, 1), (2, 2)])
def test_so_many_threads_decode_and_the_model_has_as_many_as_were_asked_for(
    small_bundle: str, monkeypatch: pytest.MonkeyPatch, asked: int | None, given: int
) -> None:
    monkeypatch.setenv(THREADS_VARIABLE, "3")
    settings = ServeSettings(num_threads=asked, backend="onnxruntime")
    model = LocalModel.load(small_bundle, None, None, settings, lambda _, jobs: None)
    try:
        assert sum(thread.name.startswith("recognise-") for thread in threading.enumerate()) == given
        if asked is not None:
            assert model._predictor.backend.num_threads == asked
    finally:
        model.close_now()


def test_while_it_drains_it_is_not_ready_but_answers_and_then_ends(
    start_server: Callable[..., Any], images: dict[str, bytes]
) -> None:
    running = start_server("--drain-delay", "1")
    with httpx.Client(base_url=running.url, timeout=60) as client:
        assert client.get("/readyz").json() == {"status": "ready"}
        running.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 30
        while client.get("/readyz").status_code == 200:
            assert time.monotonic() < deadline
        assert client.get("/readyz").json() == {"status": "draining"}
        assert client.get("/healthz").status_code == 200
        assert client.post("/v1/recognize", content=images[".png"]).status_code == 200
        assert running.wait() == 0
    assert "Traceback" not in "".join(running.lines)


def test_probes_answer_while_models_are_loaded_and_the_rest_says_when_to_come_again(
    small_bundle: str, images: dict[str, bytes]
) -> None:
    import socket
    import subprocess
    import sys

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "manyeyes.cli.main", "serve", small_bundle, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        seen: list[tuple[int, int]] = []
        deadline = time.monotonic() + 60
        while not seen or seen[-1] != (200, 200):
            assert time.monotonic() < deadline
            try:
                ready = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=60).status_code
                answer = httpx.post(f"http://127.0.0.1:{port}/v1/recognize", content=images[".png"], timeout=60)
            except httpx.ConnectError:
                time.sleep(0.01)
                continue
            if answer.status_code == 503:
                assert answer.json()["reason"] == "loading"
                assert answer.headers["retry-after"] == "1"
            seen.append((ready, answer.status_code))
        assert seen[0][0] == 503  # it listens before it is ready
        # Ready is never said too early: what comes after it is answered.
        first = next(index for index, (ready, _) in enumerate(seen) if ready == 200)
        assert {status for _, status in seen[first:]} == {200}
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


@pytest.mark.slow
def test_memory_stays_flat_over_thousands_of_requests_of_all_kinds(server: Any, images: dict[str, bytes]) -> None:
    """The ten-minute form of it: scripts/soak_serve.py."""

    def resident() -> int:
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    bodies = [*images.values(), b"no image", images[".png"][:200], bytes(100_000)]

    def ask(num_requests: int) -> None:
        connection = http.client.HTTPConnection(*server.address, timeout=60)
        for index in range(num_requests):
            connection.request("POST", "/v1/recognize", bodies[index % len(bodies)])
            assert connection.getresponse().read()
        connection.close()

    def round_of(num_requests: int) -> None:
        threads = [threading.Thread(target=ask, args=(num_requests // 4,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    round_of(2000)  # buffers of allocators grow at first
    before = resident()
    round_of(4000)
    round_of(4000)
    grown = resident() - before
    # A leak of one body of 5 kB a request would be 40 MB, of one small object (500 bytes) 4 MB.
    assert grown < 3 * 1024 * 1024, f"{grown} bytes in 8000 requests"


def test_the_health_check_of_the_docker_image_passes_where_a_server_answers_and_fails_where_none_does(
    server: Any,
) -> None:
    dockerfile = (Path(__file__).parents[2] / "deploy" / "Dockerfile").read_text().replace("\\\n", " ")
    python, flag, code = json.loads(re.findall(r"^HEALTHCHECK .*?CMD (.*)$", dockerfile, re.MULTILINE)[0])
    assert (python, flag) == ("python", "-c")
    # Port 9 is that for what is thrown away.
    for address, expected in ((server.url, 0), ("http://127.0.0.1:9", 1)):
        command = [sys.executable, flag, code.replace("http://127.0.0.1:8000", address)]
        environment = {"http_proxy": "http://127.0.0.1:9"}  # as in many a company's containers
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == expected, done.stderr
