"""Several models and versions from a folder that changes while it is served."""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from manyeyes import storage
from manyeyes.errors import BundleError, ConfigError
from manyeyes.recognition.bundle import Bundle
from manyeyes.serving.folder import find_bundles, newest_first, read_settings
from patience import wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, variant: Callable[..., Path]) -> Path:
    """Two versions of one model and one of another."""
    folder = tmp_path_factory.mktemp("models")
    variant(folder / "colours" / "9")
    variant(folder / "colours" / "10", reverse=True)
    variant(folder / "other" / "1")
    (folder / "colours" / "notes").mkdir()
    return folder


@pytest.fixture(scope="module")
def running(start_server: Callable[..., Any], folder: Path) -> Any:
    return start_server("--poll", "0.1", models=folder)


@pytest.fixture
def many(running: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def _version(client: httpx.Client, image: bytes, query: str = "model=colours", **headers: str) -> str:
    answer = client.post(
        f"/v1/recognize?{query}", content=image, headers={k.replace("_", "-"): v for k, v in headers.items()}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["model"]["version"]


def test_requests_choose_a_model_and_a_version(many: httpx.Client, images: dict[str, bytes], small_bundle: str) -> None:
    image = images[".png"]
    assert _version(many, image) == "10"
    assert _version(many, image, "model=colours&version=9") == "9"
    assert _version(many, image, "model=other") == "1"
    names = Bundle.load(small_bundle).class_names
    first = many.post("/v1/recognize?model=colours&version=9&top_k=1", content=image).json()["predictions"][0]
    second = many.post("/v1/recognize?model=colours&version=10&top_k=1", content=image).json()["predictions"][0]
    assert first["class_name"] == names[first["label"]]
    assert second["class_name"] == names[::-1][second["label"]]
    without = many.post("/v1/recognize", content=image)
    assert (without.status_code, without.json()["reason"]) == (400, "bad_request")
    assert "colours, other" in without.json()["detail"]
    for query in ("model=colours&version=11", "model=dogs"):
        missing = many.post(f"/v1/recognize?{query}", content=image)
        assert (missing.status_code, missing.json()["reason"]) == (404, "unknown_model")
    listed = {model["name"]: model for model in many.get("/v1/models").json()["models"]}
    assert [version["version"] for version in listed["colours"]["versions"]] == ["10", "9"]
    assert listed["colours"]["default_version"] == "10"
    assert listed["other"]["versions"][0]["class_names"] == list(names)
    assert listed["other"]["versions"][0]["parity"]["top1_agreement"] == 1.0
    assert many.get("/v2/models/colours").json()["versions"] == ["10", "9"]


def test_a_new_version_takes_over_without_a_dropped_request_and_the_oldest_ends(
    many: httpx.Client, running: Any, folder: Path, variant: Callable[..., Path], images: dict[str, bytes]
) -> None:
    image, stop = images[".png"], threading.Event()
    seen: list[tuple[int, str]] = []

    def ask() -> None:
        with httpx.Client(base_url=running.url, timeout=60) as client:
            while not stop.is_set():
                answer = client.post("/v1/recognize?model=colours", content=image)
                seen.append((answer.status_code, answer.json()["model"]["version"]))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        variant(folder / "colours" / "11")
        wait_until(lambda: bool(seen) and seen[-1][1] == "11")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} == {"10", "11"}
    # The newest two are kept.
    wait_until(lambda: many.post("/v1/recognize?model=colours&version=9", content=image).status_code == 404)
    assert _version(many, image, "model=colours&version=10") == "10"


@pytest.mark.parametrize("damage", ["model", "info", "golden"])
def test_a_damaged_version_is_refused_with_a_line_and_the_old_one_goes_on(
    many: httpx.Client, running: Any, folder: Path, images: dict[str, bytes], variant: Callable[..., Path], damage: str
) -> None:
    before = _version(many, images[".png"])
    version = {"model": "20", "info": "21", "golden": "22"}[damage]
    aside = folder.parent / f"aside-{version}"
    variant(aside)
    if damage == "model":
        (aside / "model.onnx").write_bytes((aside / "model.onnx").read_bytes()[:-100])
    elif damage == "info":
        (aside / "bundle.json").write_text((aside / "bundle.json").read_text().replace('"red"', '"rad"'))
    else:
        _wrong_answers(aside)
    aside.rename(folder / "colours" / version)
    wait_until(lambda: any(f"version={version} " in line and "refused" in line for line in running.lines))
    assert _version(many, images[".png"]) == before
    assert f'model="colours",version="{version}",outcome="refused"' in many.get("/metrics").text
    # It is not tried again and again.
    time.sleep(0.5)
    assert sum(f"version={version} " in line and "refused" in line for line in running.lines) == 1
    shutil.rmtree(folder / "colours" / version)


def test_a_version_that_was_replaced_in_its_place_is_loaded_again(
    many: httpx.Client, folder: Path, variant: Callable[..., Path], images: dict[str, bytes]
) -> None:
    def answer() -> Any:
        return many.post("/v1/recognize?model=other&top_k=1", content=images[".png"]).json()["predictions"][0]

    before = answer()
    aside = variant(folder.parent / "aside-other", reverse=True)
    (folder / "other" / "1").rename(folder.parent / "old-other")
    aside.rename(folder / "other" / "1")
    mirrored = {"red": "blue", "blue": "red", "green": "green"}[before["class_name"]]
    if mirrored != before["class_name"]:
        wait_until(lambda: answer()["class_name"] == mirrored)
    assert answer()["label"] == before["label"]


def test_a_canary_gets_its_share_and_the_same_request_id_the_same_version(
    many: httpx.Client, folder: Path, images: dict[str, bytes]
) -> None:
    image = images[".png"]
    newest = many.get("/v1/models").json()["models"][0]["versions"][0]["version"]
    (folder / "serving.toml").write_text(
        f'default_model = "colours"\n[models.colours]\ndefault = "10"\ncanary = "{newest}"\ncanary_weight = 0.3\n'
    )
    wait_until(lambda: many.get("/v1/models").json()["models"][0]["canary_weight"] == 0.3)
    drawn = [_version(many, image, "") for _ in range(300)]
    assert set(drawn) == {"10", newest}
    assert 50 < drawn.count(newest) < 140  # 90 are expected; 4.5 standard deviations each way
    by_id = {each: _version(many, image, "", X_Request_Id=each) for each in map(str, range(40))}
    assert set(by_id.values()) == {"10", newest}
    for each, version in by_id.items():
        assert _version(many, image, "", X_Request_Id=each) == version


def test_a_shadow_is_compared_and_counted_but_never_heard(
    many: httpx.Client, folder: Path, images: dict[str, bytes]
) -> None:
    (folder / "serving.toml").write_text('[models.colours]\ndefault = "11"\nshadow = "10"\n')
    wait_until(lambda: many.get("/v1/models").json()["models"][0]["shadow_version"] == "10")
    assert {_version(many, images[".png"]) for _ in range(20)} == {"11"}
    # Their labels are equal; only the names of the classes differ.
    counted = 'manyeyes_shadow_total{model="colours",version="10",agrees="true"} 20'
    wait_until(lambda: counted in many.get("/metrics").text)
    # So it is over the other protocol, and in forms.
    tensor = {"name": "image", "datatype": "UINT8", "shape": [2, 24, 20, 3], "data": [0, 9] * 24 * 20 * 3}
    assert many.post("/v2/models/colours/infer", json={"inputs": [tensor]}).json()["model_version"] == "11"
    assert (
        many.post("/v1/recognize?model=colours", files=[("image", images[".png"])] * 3).json()["model"]["version"]
        == "11"
    )
    counted = 'manyeyes_shadow_total{model="colours",version="10",agrees="true"} 25'
    wait_until(lambda: counted in many.get("/metrics").text)


def test_settings_that_can_not_be_read_leave_the_old_ones_in_force(
    many: httpx.Client, running: Any, folder: Path
) -> None:
    (folder / "serving.toml").write_text("[models.colours]\ncanery = '10'\n")
    wait_until(lambda: any("settings were refused" in line and "canery" in line for line in running.lines))
    assert many.get("/v1/models").json()["models"][0]["shadow_version"] == "10"


@pytest.mark.parametrize("place", ["s3", "hdfs"])
def test_a_folder_on_another_file_system_is_served_and_followed(
    place: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    start_server: Callable[..., Any],
    variant: Callable[..., Any],
    images: dict[str, bytes],
) -> None:
    cluster = request.getfixturevalue({"s3": "s3", "hdfs": "hadoop"}[place])
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    models = f"{cluster.bucket_uri if place == 's3' else cluster.hdfs}/models-{uuid.uuid4().hex}"
    variant(f"{models}/colours/1")
    assert find_bundles(models)["colours"].keys() == {"1"}
    running = start_server("--poll", "0.1", models=models)
    with httpx.Client(base_url=running.url, timeout=60) as client:
        assert _version(client, images[".png"]) == "1"
        variant(f"{models}/colours/2")
        wait_until(lambda: _version(client, images[".png"]) == "2")
        # bundle.json comes last, as above.
        for name in ("golden.safetensors", "model.onnx", "bundle.json"):
            content = storage.read_bytes(f"{models}/colours/2/{name}")
            storage.write_bytes(f"{models}/colours/3/{name}", content[:-100] if name == "model.onnx" else content)
        wait_until(lambda: any("version=3 " in line and "refused" in line for line in running.lines))
        assert _version(client, images[".png"]) == "2"
        # When the copy is complete it is looked at again.
        storage.write_bytes(f"{models}/colours/3/model.onnx", storage.read_bytes(f"{models}/colours/2/model.onnx"))
        wait_until(lambda: _version(client, images[".png"]) == "3")
    assert running.stop() == 0


def test_newer_versions_have_larger_numbers() -> None:
    assert newest_first(["9", "10", "1"]) == ["10", "9", "1"]
    assert newest_first(["v2", "v10"]) == ["v10", "v2"]
    assert newest_first(["2024-2-1", "2024-11-02"]) == ["2024-11-02", "2024-2-1"]
    assert newest_first(["1.9.0", "1.10.0"]) == ["1.10.0", "1.9.0"]


def test_a_folder_without_anything_to_serve_says_so(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle"):
        find_bundles(str(tmp_path / "missing"))
    assert find_bundles(str(tmp_path)) == {}
    (tmp_path / "serving.toml").write_text("[models.a]\ncanary_weight = 2.0")
    with pytest.raises(ConfigError, match="canary_weight"):
        read_settings(str(tmp_path))


def _wrong_answers(bundle: Path) -> None:
    """Let the golden examples promise what the model does not do, with checksums that are right."""
    import dataclasses

    from manyeyes.recognition.bundle import GOLDEN_NAME, GoldenExamples, write_bundle

    opened = Bundle.load(str(bundle))
    golden = opened.golden_examples()
    lies = GoldenExamples(golden.names, golden.encoded, golden.pixels, golden.logits + 1)
    files = {name: opened.read_file(name) for name in opened.info.files} | {GOLDEN_NAME: lies.to_bytes()}
    write_bundle(str(bundle), dataclasses.replace(opened.info), files)
