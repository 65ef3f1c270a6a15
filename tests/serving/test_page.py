"""The page in a real browser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def opened(page: Any, server: Any) -> Any:
    page.call("Page.navigate", url=server.url)
    page.wait_for("document.readyState === 'complete' && document.getElementById('model')?.textContent")
    return page


def _choose(page: Any, path: Path) -> None:
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=node, files=[str(path)])


def test_choosing_an_image_shows_it_with_its_classes_and_how_long_it_took(opened: Any, red_jpeg: Path) -> None:
    _choose(opened, red_jpeg)
    opened.wait_for(
        "!document.getElementById('result').hidden && document.getElementById('picture').naturalWidth === 80"
    )
    assert opened.evaluate("document.getElementById('best').textContent") == "red"
    names = opened.evaluate("[...document.querySelectorAll('#bars li .row span:first-child')].map(x => x.textContent)")
    assert sorted(names) == ["blue", "green", "red"]
    assert names[0] == "red"
    assert "predict" in opened.evaluate("document.getElementById('timing').textContent")
    assert opened.evaluate("document.getElementById('spoken').textContent").startswith("red, ")
    assert opened.evaluate("document.getElementById('spoken').getAttribute('aria-live')") == "polite"


def test_an_image_can_be_dropped_and_pasted(opened: Any, red_jpeg: Path) -> None:
    content = json.dumps(list(red_jpeg.read_bytes()))
    for event, holder in (("DragEvent('drop'", "dataTransfer"), ("ClipboardEvent('paste'", "clipboardData")):
        opened.evaluate(
            f"""document.getElementById('result').hidden = true;
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array({content})], 'red.jpg', {{type: 'image/jpeg'}}));
            document.dispatchEvent(new {event}, {{{holder}: data, bubbles: true, cancelable: true}}));""".replace(
                "const data", "var data"
            )
        )
        opened.wait_for("!document.getElementById('result').hidden")
        assert opened.evaluate("document.getElementById('best').textContent") == "red"


def test_a_file_that_is_no_image_is_answered_by_a_readable_error(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("this is not an image")
    _choose(opened, path)
    opened.wait_for("!document.getElementById('problem').hidden")
    assert "not an image" in opened.evaluate("document.getElementById('problem').textContent")
    assert opened.evaluate("document.getElementById('problem').getAttribute('role')") == "alert"
    assert opened.evaluate("document.getElementById('result').hidden")


def test_the_keyboard_alone_opens_the_file_chooser(opened: Any) -> None:
    opened.evaluate(
        "window.opened = 0;"
        "document.getElementById('file').addEventListener('click', e => { opened++; e.preventDefault(); })"
    )
    opened.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "choose"
    opened.press("Enter")
    opened.wait_for("window.opened === 1")


def test_the_page_asks_nothing_of_other_machines(opened: Any, server: Any, red_jpeg: Path) -> None:
    _choose(opened, red_jpeg)
    opened.wait_for("!document.getElementById('result').hidden")
    urls = opened.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert any("v1/recognize" in url for url in urls)
    assert [url for url in urls if not url.startswith((server.url, "blob:", "data:"))] == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_background_in_both_colour_schemes(opened: Any, red_jpeg: Path, scheme: str) -> None:
    opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    _choose(opened, red_jpeg)
    opened.wait_for("!document.getElementById('result').hidden")
    for element in ("best", "timing", "model"):
        contrast = opened.evaluate(
            """(element => {
                const parse = text => text.match(/[\\d.]+/g).map(Number);
                const luminance = ([r, g, b]) => [r, g, b].map(v => v / 255)
                    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
                let ground = element;
                while (parse(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
                const levels = [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor]
                    .map(parse).map(luminance).sort((a, b) => b - a);
                return (levels[0] + 0.05) / (levels[1] + 0.05);
            })(document.getElementById('ELEMENT'))""".replace("ELEMENT", element)
        )
        assert contrast >= 4.5, element
