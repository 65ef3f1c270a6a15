"""The page in a real browser: for everyone, on every screen, with nothing from elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_the_keyboard_alone_reaches_everything_and_shows_where_it_is(opened: Any, red_jpeg: Path) -> None:
    opened.evaluate(
        "window.opened = 0;"
        "document.getElementById('file').addEventListener('click', e => { opened++; e.preventDefault(); })"
    )
    opened.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "choose"
    opened.press("Enter")
    opened.wait_for("window.opened === 1")
    opened.answer(red_jpeg)
    reached = []
    for _ in range(14):
        opened.press("Tab")
        assert opened.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        reached.append(opened.evaluate("document.activeElement.id || document.activeElement.textContent.slice(0, 5)"))
        if reached[-1] == "explain":
            opened.press("Space")
            opened.wait_visible("overlay")
    assert reached[:3] == ["camera", "explain", "opacity"]
    assert all(name[:3] in ("red", "gre", "blu") for name in reached[3:6])
    assert reached[6:] == ["search", "names", "Class", "Recal", "Preci", "F1", "Image", "Ask f"]
    opened.evaluate("document.querySelectorAll('#bars button')[2].focus()")
    opened.press("Enter")
    assert opened.evaluate("document.querySelectorAll('#bars button')[2].getAttribute('aria-pressed')") == "true"


def test_every_control_has_a_name_for_screen_readers(opened: Any, colours: dict[str, Path]) -> None:
    opened.choose(*colours.values())
    opened.wait_for("document.getElementById('spoken').textContent === '3 images recognised'")
    opened.explain()
    nodes = [
        (node["role"]["value"], node.get("name", {}).get("value", "").strip())
        for node in opened.call("Accessibility.getFullAXTree")["nodes"]
        if not node["ignored"]
    ]
    wanted = {"button", "checkbox", "slider", "searchbox", "image", "link", "region", "DisclosureTriangle"}
    found = [(role, name) for role, name in nodes if role in wanted]
    assert {role for role, _ in found} >= {"button", "checkbox", "slider", "searchbox", "image", "region"}
    assert [role for role, name in found if not name] == []
    named = {name for _, name in found}
    assert {"Start the camera recognise live", "Show which pixels decided", "Opacity", "Search the classes"} <= named
    assert any(name.startswith("Model card") for name in named)


def test_the_page_asks_nothing_of_other_machines_and_complains_of_nothing(
    opened: Any, server: Any, red_jpeg: Path
) -> None:
    opened.call("Browser.setPermission", permission={"name": "camera"}, setting="granted", origin=server.url)
    opened.answer(red_jpeg)
    opened.explain()
    opened.click("camera")
    opened.wait_visible("rate")
    opened.click("camera")
    urls = opened.requested()
    assert any("v1/recognize" in url for url in urls)
    assert any("v1/saliency" in url for url in urls)
    assert [url for url in urls if not url.startswith((server.url, f"blob:{server.url}", "data:"))] == []
    opened.call("Page.reload")
    opened.wait_for("document.readyState === 'complete' && !document.getElementById('about').hidden")
    opened.answer(red_jpeg)
    opened.explain()
    assert opened.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_background_in_both_colour_schemes(
    opened: Any, red_jpeg: Path, tmp_path: Path, scheme: str
) -> None:
    opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    opened.answer(red_jpeg)
    opened.explain()
    opened.evaluate("showNotice('The server is busy.'); showProblem(new Problem('It failed:', 'why.'), () => {})")
    opened.evaluate("document.querySelector('details').open = true; document.getElementById('entry').hidden = false")
    ground, weak = opened.contrasts()
    assert weak == []
    assert ground > 0.8 if scheme == "light" else ground < 0.05


def test_a_narrow_screen_needs_no_scrolling_sideways(opened: Any, red_jpeg: Path) -> None:
    opened.call("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=1, mobile=True)
    try:
        opened.answer(red_jpeg)
        opened.explain()
        assert opened.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [320, 320]
    finally:
        opened.call("Emulation.clearDeviceMetricsOverride")
