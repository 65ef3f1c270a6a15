"""A folder of models in the middle of a change, or with what nobody meant: the server goes on, and says so once."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from manyeyes.cli.main import app
from manyeyes.errors import UsageError
from manyeyes.serving.server import serve
from patience import wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, variant: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("models")
    variant(folder / "colours" / "1")
    return folder


@pytest.fixture(scope="module")
def running(start_server: Callable[..., Any], folder: Path) -> Any:
    return start_server("--poll", "0.1", models=folder)


@pytest.fixture
def client(running: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def _versions(client: httpx.Client) -> list[str]:
    (model,) = client.get("/v1/models").json()["models"]
    return [version["version"] for version in model["versions"]]


def _told(running: Any, *words: str) -> int:
    return sum(all(word in line for word in words) for line in running.lines)


def test_a_version_that_fails_in_a_way_that_nobody_foresaw_is_refused_and_the_next_is_loaded(
    client: httpx.Client, running: Any, folder: Path, unforeseen: Callable[[Path], Path], variant: Callable[..., Path]
) -> None:
    unforeseen(folder / "colours" / "2")
    wait_until(lambda: _told(running, "was refused", "version=2 ", "ValueError: zip()") == 1)
    variant(folder / "colours" / "3")
    wait_until(lambda: _versions(client) == ["3", "1"])
    assert _told(running, "was refused", "version=2 ") == 1


def test_a_version_whose_files_come_after_its_description_is_loaded_when_they_are_there(
    client: httpx.Client, running: Any, folder: Path
) -> None:
    whole, coming = folder / "colours" / "3", folder / "colours" / "4"
    coming.mkdir()
    shutil.copy(whole / "golden.safetensors", coming)
    shutil.copy(whole / "bundle.json", coming)
    wait_until(lambda: _told(running, "was refused", "version=4 ", "is missing") == 1)
    (coming / "model.onnx").write_bytes((whole / "model.onnx").read_bytes()[:1000])
    wait_until(lambda: _told(running, "was refused", "version=4 ", "1000 bytes") == 1)
    shutil.copy(whole / "model.onnx", coming)
    wait_until(lambda: _versions(client) == ["4", "3"])


def test_a_model_whose_versions_are_away_goes_on_and_the_log_says_so_once(
    client: httpx.Client, running: Any, folder: Path, variant: Callable[..., Path], images: dict[str, bytes]
) -> None:
    away = folder.parent / "away"
    for times in (1, 2):
        (folder / "colours").rename(away)
        wait_until(lambda times=times: _told(running, "No version of a model is there any more", "colours") == times)
        for _ in range(10):
            assert client.post("/v1/recognize", content=images[".png"]).status_code == 200
            time.sleep(0.05)
        assert _versions(client) == ["4", "3"]
        away.rename(folder / "colours")
        time.sleep(0.5)
    assert _told(running, "No version of a model is there any more") == 2
    # A version that takes its place ends it.
    (folder / "colours").rename(away)
    variant(folder / "colours" / "5")
    wait_until(lambda: _versions(client) == ["5"])


def test_names_in_the_settings_that_match_nothing_are_told_once(
    client: httpx.Client, running: Any, folder: Path, images: dict[str, bytes]
) -> None:
    text = 'default_model = "cats"\n[models.colours]\ndefault = "4"\n[models.typo]\nshadow = "1"\n'
    (folder / "serving.toml").write_text(text)
    unknown = "settings name what is not served"
    for words in ("default_model: there is no model cats", "there is no model typo", "colours has no version 4"):
        wait_until(lambda words=words: _told(running, unknown, words) == 1)
    time.sleep(0.5)
    assert _told(running, unknown) == 3
    assert client.post("/v1/recognize", content=images[".png"]).json()["model"]["version"] == "5"
    (folder / "serving.toml").unlink()


@pytest.mark.parametrize(
    "traffic, why",
    [
        ({"typo": {"canary": "5", "canary_weight": 0.5}}, "names the model typo, but .* holds colours"),
        ({"colours": {"canary": "7", "canary_weight": 0.5}}, "--canary names version 7 of colours, but .* holds 5"),
        ({"colours": {"shadow": "8"}}, "--shadow names version 8 of colours, but .* holds 5"),
    ],
)
def test_options_that_name_what_is_not_there_are_refused_at_the_start(
    tmp_path: Path, variant: Callable[..., Path], traffic: dict[str, Any], why: str
) -> None:
    variant(tmp_path / "colours" / "5")
    with pytest.raises(UsageError, match=why):
        serve(str(tmp_path), port=0, traffic=traffic)


def test_a_canary_of_a_lone_bundle_is_refused_at_the_start(small_bundle: str) -> None:
    with pytest.raises(UsageError, match="is one bundle, but --canary and --shadow"):
        serve(small_bundle, port=0, traffic={"cnn": {"shadow": "7"}})


@pytest.mark.parametrize("origin", ["https://a.example/", "a.example", "https://a.example/page", "https://A.example"])
def test_an_origin_that_no_browser_sends_is_refused_at_the_start(small_bundle: str, origin: str) -> None:
    result = CliRunner().invoke(app, ["serve", small_bundle, "--cors-origin", origin])
    assert isinstance(result.exception, UsageError)
    assert f"--cors-origin {origin} is not an origin" in str(result.exception)


@pytest.mark.parametrize("token", ["two words", "schlüssel", " \n"])
def test_a_token_from_the_environment_is_held_to_what_one_in_a_file_is(small_bundle: str, token: str) -> None:
    result = CliRunner().invoke(app, ["serve", small_bundle], env={"MANYEYES_TOKEN": token})
    assert isinstance(result.exception, UsageError)
    assert "MANYEYES_TOKEN must hold one word of ASCII" in str(result.exception)


def test_a_line_end_behind_the_token_in_the_environment_does_not_count(
    start_server: Callable[..., Any], images: dict[str, bytes]
) -> None:
    running = start_server(MANYEYES_TOKEN="secret\n")
    for headers, status in (({}, 401), ({"Authorization": "Bearer secret"}, 200)):
        answer = httpx.post(f"{running.url}/v1/recognize", content=images[".png"], headers=headers, timeout=60)
        assert answer.status_code == status
    assert running.stop() == 0
