"""What a report gathers, what it says where something is gone, and the model card."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.inline import InlineEngine
from manyeyes.errors import UsageError
from manyeyes.report.balance import read_balance
from manyeyes.report.build import gather, page_content, write_report
from manyeyes.report.card import model_card
from manyeyes.report.subject import open_subject
from manyeyes.report.thumbnails import MAX_SIDE, data_uri, data_uri_of_file


def run_command(*arguments: str) -> Any:
    from manyeyes.cli.main import app

    return CliRunner().invoke(app, ["report", *arguments])


@pytest.fixture
def evaluated_run(small_run: str, evaluation: str, tmp_path: Path) -> Path:
    """A copy of the small run that was evaluated on test, and has a journal."""
    run = tmp_path / "run"
    shutil.copytree(small_run, run, ignore=shutil.ignore_patterns("evaluation", "*.html"))
    shutil.copytree(evaluation, run / "evaluation" / "test")
    epoch = {"kind": "epoch", "epoch": 1, "global_step": 6, "loss": 0.5, "accuracy": 0.8, "val_loss": None}
    (run / "metrics.jsonl").write_text(json.dumps(epoch) + "\n" + '{"kind": "epo')
    return run


def test_a_run_is_reported_with_its_evaluation_its_curves_and_the_commands_that_make_it_again(
    evaluated_run: Path, small_dataset: str
) -> None:
    config = json.loads((evaluated_run / "config.json").read_text())
    config["command"] = ["manyeyes", "train", "my data", "--out", "run"]
    (evaluated_run / "config.json").write_text(json.dumps(config))
    report = gather(open_subject(str(evaluated_run)))
    assert report.title == "cnn on test"
    assert [curve.epochs[0]["loss"] for curve in report.curves] == [0.5]
    commands = next(block.facts for block in report.provenance if block.title == "Commands")
    assert commands[0][1] == "manyeyes train 'my data' --out run"
    assert commands[1][1].startswith("manyeyes evaluate ")
    assert commands[1][1].endswith(f"{small_dataset} --split test")
    assert report.notices == ()
    assert report.balance is not None
    assert report.balance.num_seen == 171
    assert all(picture.overlay is not None and picture.is_tiny for picture in report.pictures.uncertain)
    json.dumps(page_content(report), allow_nan=False)


def test_pictures_are_those_of_the_examples_as_the_model_saw_them(evaluation: str, small_dataset: str) -> None:
    from manyeyes.data.dataset import Dataset

    report = gather(open_subject(evaluation), explain_seconds=0)
    dataset = Dataset(small_dataset)
    by_path = {
        path: image
        for shard in dataset.split("test").shards
        for rows in dataset.rows(shard)
        for path, image in zip(rows.paths, rows.images, strict=True)
    }
    assert len(report.pictures.uncertain) == 24
    for picture in report.pictures.uncertain:
        assert picture.image == data_uri(by_path[picture.example.path])
        assert picture.overlay is None


def test_a_run_that_was_not_evaluated_is_reported_and_says_so(small_run: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run, ignore=shutil.ignore_patterns("evaluation"))
    report = gather(open_subject(str(run)))
    assert report.metrics is None
    assert "was not evaluated yet. Do so with: manyeyes evaluate" in report.notices[0]
    with pytest.raises(UsageError, match=r"was not evaluated on val\. Do so with: .* --split val"):
        open_subject(str(run), "val")


def test_what_is_gone_is_said_and_the_rest_is_reported(evaluated_run: Path, evaluation: str, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(evaluation, gone)
    values = json.loads((gone / "evaluation.json").read_text())
    values["model"] = str(tmp_path / "nowhere")
    (gone / "evaluation.json").write_text(json.dumps(values))
    report = gather(open_subject(str(gone)))
    assert any("learning curves are missing" in notice for notice in report.notices)
    assert any("without the pixels that decided" in notice for notice in report.notices)
    assert len(report.pictures.uncertain) == 24
    values["dataset"] = str(tmp_path / "nowhere")
    (gone / "evaluation.json").write_text(json.dumps(values))
    report = gather(open_subject(str(gone)))
    assert any("What became of the data is not shown" in notice for notice in report.notices)
    assert any(notice.startswith("No pictures of examples: There is no dataset") for notice in report.notices)
    assert report.metrics is not None


def test_damaged_lines_of_a_journal_are_left_out_and_counted(evaluated_run: Path) -> None:
    journal = evaluated_run / "metrics.jsonl"
    journal.write_text(
        '{"kind": "epoch", "loss": }\n{"kind": "epoch", "epoch": 2, "loss": NaN}\n' + journal.read_text()
    )
    report = gather(open_subject(str(evaluated_run)), explain_seconds=0)
    assert [epoch["loss"] for epoch in report.curves[0].epochs] == [None, 0.5]
    assert [notice for notice in report.notices if "has 1 line that can't be read" in notice]


def test_figures_of_other_weights_than_the_runs_are_doubted(evaluated_run: Path) -> None:
    path = evaluated_run / "evaluation" / "test" / "evaluation.json"
    path.write_text(path.read_text().replace(json.loads(path.read_text())["model_fingerprint"], "0" * 16))
    report = gather(open_subject(str(evaluated_run)))
    assert any("these figures are of earlier weights" in notice for notice in report.notices)
    assert any("has other weights now" in notice for notice in report.notices)
    assert report.pictures.uncertain[0].overlay is None


def test_quarantined_files_are_shown_as_far_as_they_can_be_decoded(tmp_path: Path) -> None:
    smooth = cv2.resize(np.random.default_rng(0).integers(0, 255, (6, 8, 3), dtype=np.uint8), (320, 240))
    encoded = cv2.imencode(".jpg", smooth)[1].tobytes()
    folder = tmp_path / "source" / "cats"
    folder.mkdir(parents=True)
    for name in ("cats", "dogs"):
        (folder.parent / name).mkdir(exist_ok=True)
        (folder.parent / name / "good.jpg").write_bytes(encoded)
    (folder / "cut.jpg").write_bytes(encoded[: len(encoded) * 2 // 3])
    (folder / "text.jpg").write_bytes(b"this is no image")
    data = str(tmp_path / "data")
    settings = IngestSettings(encoding="jpeg", val=0.0, test=0.0)
    ingest(str(tmp_path / "source"), data, settings=settings, engine=InlineEngine())
    balance = read_balance(data)
    assert balance.num_seen == 4
    assert balance.quarantined == {"not_an_image": 1, "truncated": 1}
    shown = {refused.reason: refused for refused in balance.refused}
    assert shown["truncated"].path.endswith("cut.jpg")
    assert str(shown["truncated"].image).startswith("data:image/jpeg;base64,")
    assert shown["not_an_image"].image is None
    assert read_balance(data, "0" * 16).notices[0].endswith(f"it has the fingerprint {balance.fingerprint}.")


def test_a_small_file_that_claims_to_be_huge_is_not_decoded() -> None:
    png = bytearray(cv2.imencode(".png", np.zeros((4, 4), np.uint8))[1].tobytes())
    png[16:24] = (30_000).to_bytes(4, "big") * 2
    assert data_uri_of_file(bytes(png)) is None


def test_a_large_picture_is_shrunk_and_a_tiny_one_is_kept_to_the_pixel() -> None:
    import base64

    draw = np.random.default_rng(0)
    for shape, expected in (
        ((500, 1000, 3), (80, MAX_SIDE, 3)),
        ((20, 30, 1), (20, 30, 1)),
        ((64, 20, 3), (64, 20, 3)),
    ):
        pixels = draw.integers(0, 255, shape, dtype=np.uint8)
        encoded = np.frombuffer(base64.b64decode(data_uri(pixels).partition(",")[2]), np.uint8)
        shown = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
        assert shown is not None
        shown = shown.reshape(*shown.shape[:2], -1)
        assert shown.shape == expected
        if shape == expected:
            assert np.array_equal(shown[:, :, ::-1], pixels)


def test_the_model_card_has_the_figures_and_leaves_to_people_what_only_they_know(evaluated_run: Path) -> None:
    done = run_command(str(evaluated_run), "--card", "--no-saliency", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["files"] == [f"{evaluated_run}/report.html", f"{evaluated_run}/model_card.md"]
    card = (evaluated_run / "model_card.md").read_text()
    metrics = json.loads((evaluated_run / "evaluation" / "test" / "evaluation.json").read_text())["metrics"]
    interval = metrics["accuracy_interval"]
    assert f"| Accuracy | {metrics['accuracy']:.2%} | {interval['low']:.2%} to {interval['high']:.2%} |" in card
    for heading in ("Intended use", "Data", "Figures", "Calibration", "Classes", "Limits", "Provenance"):
        assert f"## {heading}\n" in card
    assert card.count("To be filled in by whoever publishes the model.") == 3
    assert "| test | 30 | 10 | 10 |" in card


def test_markup_in_names_stays_text_in_the_model_card(evaluated_run: Path) -> None:
    report = gather(open_subject(str(evaluated_run)), explain_seconds=0)
    assert report.metrics is not None
    name = "<script>a|b</script> [x](javascript:1) `c`\nd"
    per_class = tuple(dataclasses.replace(found, class_name=name) for found in report.metrics.per_class)
    metrics = dataclasses.replace(report.metrics, per_class=per_class)
    card = model_card(dataclasses.replace(report, class_names=(name,) * 3, metrics=metrics))
    assert "<script>" not in card
    assert "&lt;script&gt;a\\|b&lt;/script&gt; \\[x\\](javascript:1) \\`c\\` d" in card
    rows = [line for line in card.splitlines() if line.startswith("| &lt;script")]
    assert len(rows) == 2
    assert all(row.replace("\\|", "").count("|") == 6 for row in rows)


def test_bad_input_is_one_clear_line(small_dataset: str, evaluation: str, tmp_path: Path) -> None:
    for directory in (small_dataset, str(tmp_path / "nowhere")):
        with pytest.raises(
            UsageError, match=r"holds no run \(config.json\), evaluation .* or finished cross-validation"
        ):
            write_report(directory)
    with pytest.raises(UsageError, match="is not a run: it has no other split"):
        write_report(evaluation, split="val")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "evaluation.json").write_text('{"metrics": {}}')
    with pytest.raises(UsageError, match=r"evaluation.json can't be used .*Evaluate again."):
        write_report(str(broken))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match="can't be written"):
        write_report(evaluation, str(tmp_path / "file" / "report.html"))


def test_evaluate_writes_the_report_beside_the_numbers(small_bundle: str, small_dataset: str, tmp_path: Path) -> None:
    from manyeyes.cli.main import app

    arguments = ["evaluate", small_bundle, small_dataset, "--out", str(tmp_path), "--engine", "inline"]
    done = CliRunner().invoke(app, [*arguments, "--no-report"])
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "report.html").exists()
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    json.loads(done.stdout)
    assert b"data:image/png;base64," in (tmp_path / "report.html").read_bytes()
