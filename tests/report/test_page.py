"""The report in a real browser: what it shows, that it asks for nothing, and that everyone can use it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from manyeyes.report.build import Report, page_content, write_report
from manyeyes.report.page import render

HOSTILE = (
    "<script>window.hacked = 1</script>",
    "</script><img src=x onerror='window.hacked = 2'>",
    "\" onmouseover='window.hacked = 3' <!-- {{SCRIPT}}",
)


@pytest.fixture(scope="module")
def written(evaluation: str) -> str:
    (uri,) = write_report(evaluation)
    return uri


@pytest.fixture(scope="module")
def large(large_report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("large") / "report.html"
    path.write_bytes(render("report", large_report.title, page_content(large_report)))
    return path


def texts(page: Any, selector: str) -> list[str]:
    return page.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map(each => each.textContent)")


def first_class(page: Any) -> str:
    return texts(page, "#classes-table tbody th")[0]


def point_at(page: Any, row: float, column: float) -> None:
    """Move the mouse over a cell of the matrix, given as shares of its sides."""
    x, y = page.evaluate(
        f"""(() => {{
            document.getElementById('matrix').scrollIntoView({{block: 'center'}});
            const box = document.getElementById('matrix').getBoundingClientRect();
            // Its cells are at the lower right, below and beside the names.
            const side = Math.min(box.width, box.height) * 0.6;
            return [box.right - side * (1 - {column}), box.bottom - side * (1 - {row})];
        }})()"""
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)


def test_the_page_shows_the_figures_of_the_evaluation(show: Any, written: str, evaluation: str) -> None:
    metrics = json.loads(Path(evaluation, "evaluation.json").read_text())["metrics"]
    page = show(written)
    shown = dict(zip(texts(page, ".headline p:first-child"), texts(page, ".headline .large"), strict=True))
    assert shown["Accuracy"] == f"{metrics['accuracy']:.2%}".replace("%", "\u00a0%")
    assert shown["Log loss"] == f"{metrics['log_loss']:.4f}"
    interval = metrics["accuracy_interval"]
    assert f"{100 * interval['low']:.2f} to {100 * interval['high']:.2f}" in page.text("summary")
    assert texts(page, "#contents a") == [
        "Summary", "Confusion", "Classes", "Calibration", "Examples", "Data", "Provenance"
    ]  # fmt: skip
    assert texts(page, "#classes-table tbody th") == ["red", "green", "blue"]
    assert page.evaluate("document.querySelectorAll('.gallery img:not(.overlay)').length") == 24 + len(
        json.loads(Path(evaluation, "evaluation.json").read_text())["notable"]["mistakes"]
    )
    assert "manyeyes evaluate" in page.text("provenance")


def test_nothing_is_asked_of_any_machine_and_nothing_is_complained_of(show: Any, written: str) -> None:
    page = show(written)
    page.click("overlays")
    page.wait_for(
        "[...document.querySelectorAll('img')].every(image => image.complete && (image.hidden || image.naturalWidth))"
    )
    asked = [url for url in page.requested() if not url.startswith("data:")]
    assert asked == [f"file://{written}"]
    page.call("Page.reload")
    page.wait_for("document.readyState === 'complete'")
    assert page.complaints() == []
    # Even a script of its own could not.
    refused = page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'sent', error => String(error))")
    assert "Failed to fetch" in refused
    assert "Content Security Policy" in json.dumps(page.complaints())


def test_hostile_names_of_classes_and_paths_stay_text(show: Any, evaluation: str, tmp_path: Path) -> None:
    hostile = tmp_path / "evaluation"
    shutil.copytree(evaluation, hostile)
    values = json.loads((hostile / "evaluation.json").read_text())
    values["class_names"] = HOSTILE
    values["model_name"] = HOSTILE[1]
    for found, name in zip(values["metrics"]["per_class"], HOSTILE, strict=True):
        found["class_name"] = name
    for example in (*values["notable"]["mistakes"], *values["notable"]["uncertain"]):
        example["path"] = f"photos/{HOSTILE[0]}/{HOSTILE[1]}\udce9.png"
    (hostile / "evaluation.json").write_text(json.dumps(values))
    (uri,) = write_report(str(hostile), explain_seconds=0)
    page = show(uri)
    assert texts(page, "#classes-table tbody th") == list(HOSTILE)
    assert HOSTILE[1] in page.evaluate("document.title")
    assert page.text("title").startswith(HOSTILE[1])
    assert HOSTILE[0] in texts(page, ".gallery .path")[0]
    point_at(page, 0.5, 0.5)
    assert any(name in page.text("cell") for name in HOSTILE)
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert page.complaints() == []
    # Markup that came in all the same would not run.
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 4\">')")
    page.evaluate("new Promise(resolve => setTimeout(resolve, 100))")
    assert page.evaluate("window.hacked") is None


def test_the_classes_are_sorted_by_mouse_and_keyboard_and_searched(show: Any, large: Path) -> None:
    page = show(large)
    heading = "[...document.querySelectorAll('#classes-table thead button')].find(each => each.textContent === {!r})"
    recalls = "[...document.querySelectorAll('#classes-table tbody td.bar')].map(each => parseFloat(each.textContent))"
    page.evaluate(heading.format("Recall") + ".click()")
    rising = page.evaluate(recalls)
    assert len(rising) == 200
    assert rising == sorted(rising)
    assert page.evaluate("document.querySelector('[aria-sort]').textContent") == "Recall"
    page.evaluate(heading.format("Class") + ".focus()")
    page.press("Enter")
    assert first_class(page) == "class 0000 of a thousand"
    page.press("Space")
    assert first_class(page) == "class 0999 of a thousand"
    assert page.evaluate("document.querySelector('[aria-sort]').getAttribute('aria-sort')") == "descending"
    page.evaluate(
        "[...document.querySelectorAll('#classes button')].find(each => /^Show all/.test(each.textContent)).click()"
    )
    assert len(texts(page, "#classes-table tbody tr")) == 1000
    page.evaluate("document.getElementById('classes-table-search').focus()")
    page.call("Input.insertText", text="thousand 077")
    assert first_class(page) == "class 0779 of a thousand"
    assert page.text("classes-table-count") == "11 of 1,000 classes"


def test_a_cell_of_the_matrix_is_told_when_pointed_at_and_by_the_keyboard(show: Any, written: str) -> None:
    page = show(written)
    matrix = page.evaluate("report.metrics.confusion")
    point_at(page, 0.99, 0.99)
    told = page.text("cell")
    count = matrix[2][-1]
    assert told.startswith(f"blue, recognised: {count} of 10 images")
    page.evaluate("document.querySelector('#shares').focus()")
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "matrix"
    assert page.text("cell").startswith("red, recognised: ")
    page.press("ArrowRight")
    assert page.text("cell").startswith("red taken for green: ")
    page.press("ArrowDown")
    assert page.text("cell").startswith("green, recognised: ")
    assert page.evaluate("document.getElementById('cell').getAttribute('aria-live')") == "polite"


def test_of_a_thousand_classes_a_confused_pair_is_found_in_the_matrix(show: Any, large: Path) -> None:
    page = show(large)
    picture = "document.getElementById('matrix').toDataURL()"
    whole = page.evaluate(picture)
    pair = texts(page, "#confusion .link")[0]
    page.evaluate("document.querySelector('#confusion .link').click()")
    true, predicted = pair.split(" → ")
    assert page.text("cell").startswith(f"{true} taken for {predicted}: 999 of ")
    near = page.evaluate(picture)
    page.evaluate("document.getElementById('matrix').focus()")
    page.press("+")
    nearer = page.evaluate(picture)
    page.press("0")
    assert len({whole, near, nearer, page.evaluate(picture)}) == 4, "zoomed in, in, and out, with the cell marked"


def test_the_arrow_keys_go_through_the_bins_of_the_reliability_diagrams(show: Any, large: Path) -> None:
    page = show(large)
    assert [text.split(",")[0] for text in texts(page, "#calibration figcaption")] == [
        "Before calibration",
        "As it answers",
    ]
    page.evaluate("document.querySelector('#calibration .chart').focus()")
    page.press("ArrowRight")
    first = page.evaluate("report.metrics.calibration[1].bins.find(bin => bin.num_examples)")
    told = texts(page, "#calibration .readout")[0]
    assert f"{first['num_examples']:,} image" in told
    assert f"right {100 * first['accuracy']:.1f}" in told


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_in_both_colour_schemes_and_the_matrix_follows(
    show: Any, written: str, scheme: str
) -> None:
    page = show(written)
    pictures = []
    for now in ("dark" if scheme == "light" else "light", scheme):
        page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": now}])
        page.wait_for(f"matchMedia('(prefers-color-scheme: {now})').matches")
        page.evaluate("new Promise(resolve => requestAnimationFrame(() => requestAnimationFrame(resolve)))")
        pictures.append(page.evaluate("document.getElementById('matrix').toDataURL()"))
    assert pictures[0] != pictures[1]
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    ground, weak = page.contrasts()
    assert weak == []
    assert ground > 0.8 if scheme == "light" else ground < 0.05


def test_a_narrow_screen_needs_no_scrolling_sideways(show: Any, written: str) -> None:
    page = show(written)
    page.call("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=1, mobile=True)
    try:
        page.evaluate("new Promise(resolve => setTimeout(resolve, 100))")
        assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [320, 320]
    finally:
        page.call("Emulation.clearDeviceMetricsOverride")


def test_every_control_and_picture_has_a_name_for_screen_readers(show: Any, written: str) -> None:
    page = show(written)
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in page.call("Accessibility.getFullAXTree")["nodes"]
        if not node["ignored"]
    ]
    wanted = {"button", "checkbox", "combobox", "searchbox", "image", "link", "region", "application", "table"}
    found = [(role, name) for role, name in nodes if role in wanted]
    assert {role for role, _ in found} >= wanted - {"button", "image"}
    assert [role for role, name in found if not name] == []
    assert any(name.startswith("Confusion matrix of 3 classes") for _, name in found)


def test_the_report_of_a_thousand_classes_stays_under_ten_megabytes(large: Path) -> None:
    assert 3_000_000 < large.stat().st_size < 10_000_000
