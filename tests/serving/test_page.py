"""The page in a real browser: images in, answers out."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest


def test_choosing_an_image_shows_it_with_its_classes_and_how_long_it_took(opened: Any, red_jpeg: Path) -> None:
    opened.choose(red_jpeg)
    opened.wait_for(
        "!document.getElementById('result').hidden && document.getElementById('picture').naturalWidth === 80"
    )
    assert opened.text("best") == "red"
    names = opened.evaluate("[...document.querySelectorAll('#bars .row span:first-child')].map(x => x.textContent)")
    assert sorted(names) == ["blue", "green", "red"]
    assert names[0] == "red"
    shares = opened.evaluate("[...document.querySelectorAll('#bars .row span:last-child')].map(x => x.textContent)")
    widths = opened.evaluate("[...document.querySelectorAll('#bars .bar')].map(x => parseFloat(x.style.width))")
    for share, width in zip(shares, widths, strict=True):
        assert width == pytest.approx(float(re.sub(r"[^\d.]", "", share)), abs=0.45)
    assert re.search(r"decode .*ms · predict .*ms · round trip .*ms · version \w", opened.text("timing"))
    assert opened.text("spoken").startswith("red, ")
    assert opened.evaluate("document.getElementById('spoken').getAttribute('aria-live')") == "polite"


def test_an_answer_that_should_not_be_relied_on_is_told_in_words(opened: Any, red_jpeg: Path, tmp_path: Path) -> None:
    opened.answer(red_jpeg)
    assert opened.text("lead").endswith("% sure")
    noise = np.random.default_rng(5).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "noise.png"), noise)
    opened.choose(tmp_path / "noise.png")
    opened.wait_for("document.getElementById('lead').textContent.endsWith('% sure: too little to rely on')")
    assert opened.text("spoken").endswith(": too little to rely on")


def test_an_image_can_be_dropped_and_pasted(opened: Any, red_jpeg: Path) -> None:
    content = json.dumps(list(red_jpeg.read_bytes()))
    for event, holder in (("DragEvent('drop'", "dataTransfer"), ("ClipboardEvent('paste'", "clipboardData")):
        opened.evaluate(
            f"""document.getElementById('result').hidden = true;
            var data = new DataTransfer();
            data.items.add(new File([new Uint8Array({content})], 'red.jpg', {{type: 'image/jpeg'}}));
            document.body.dispatchEvent(new {event}, {{{holder}: data, bubbles: true, cancelable: true}}));"""
        )
        opened.wait_visible("result")
        assert opened.text("best") == "red"


def test_of_several_images_each_is_recognised_and_one_that_fails_is_named(
    opened: Any, colours: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("this is not an image")
    opened.choose(colours["red"], colours["green"], tmp_path / "notes.txt", colours["blue"])
    opened.wait_for("document.getElementById('spoken').textContent === '3 images recognised, 1 failed'")
    assert opened.evaluate(
        "[...document.querySelectorAll('#strip button > span:first-of-type')].map(x => x.textContent)"
    ) == ["red", "green", "failed", "blue"]
    opened.evaluate("document.querySelectorAll('#strip button')[1].click()")
    assert opened.text("best") == "green"
    assert opened.evaluate("document.querySelector('#strip [aria-current=true]').title") == "green.png"
    opened.evaluate("document.querySelectorAll('#strip button')[2].click()")
    assert opened.text("problem").startswith("notes.txt: The image can't be used: not an image")


def test_a_file_that_is_no_image_is_answered_by_a_readable_error(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("this is not an image")
    opened.choose(path)
    opened.wait_visible("problem")
    assert "not an image" in opened.text("problem")
    assert "Try again" not in opened.text("problem"), "it would only fail again"
    assert opened.evaluate("document.getElementById('problem').getAttribute('role')") == "alert"
    assert opened.evaluate("document.getElementById('result').hidden")


def test_without_a_network_the_page_says_so_and_tries_again_when_asked(opened: Any, red_jpeg: Path) -> None:
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    opened.call("Network.emulateNetworkConditions", offline=True, **network)
    try:
        opened.choose(red_jpeg)
        opened.wait_visible("problem")
        assert "offline" in opened.text("problem")
    finally:
        opened.call("Network.emulateNetworkConditions", offline=False, **network)
    opened.evaluate("document.querySelector('#problem button').click()")
    opened.wait_visible("result")
    assert opened.evaluate("document.getElementById('problem').hidden")


def test_the_overlay_lies_where_the_pixels_are_that_decided(opened: Any, tmp_path: Path) -> None:
    # Where the red patch is there is less green than around it, so that more green there comes from the overlay alone.
    green_of_halves = """(() => {
        const overlay = document.getElementById('overlay'), canvas = document.createElement('canvas');
        canvas.width = overlay.naturalWidth; canvas.height = overlay.naturalHeight;
        const context = canvas.getContext('2d');
        context.drawImage(overlay, 0, 0);
        const {data} = context.getImageData(0, 0, canvas.width, canvas.height), sums = [0, 0];
        for (let i = 0; i < data.length; i += 4) sums[+((i / 4) % canvas.width >= canvas.width / 2)] += data[i + 1];
        return sums;
    })()"""
    for side in (0, 1):
        pixels = np.full((24, 20, 3), 60, np.uint8)
        pixels[4:20, 10 * side : 10 * side + 10] = (40, 40, 180)
        cv2.imwrite(str(tmp_path / f"{side}.png"), pixels)
        opened.evaluate("document.getElementById('result').hidden = true")
        opened.answer(tmp_path / f"{side}.png")
        assert opened.text("best") == "red"
        assert opened.evaluate("document.getElementById('overlay').hidden"), "only on demand"
        opened.explain()
        sums = opened.evaluate(green_of_halves)
        assert sums[side] > 1.2 * sums[1 - side], sums
    assert opened.evaluate("document.getElementById('overlay').alt") == "Which pixels decided for red"


def test_the_overlay_is_of_the_chosen_class_and_can_be_faded_and_taken_away(opened: Any, red_jpeg: Path) -> None:
    opened.answer(red_jpeg)
    opened.complaints()
    opened.evaluate("document.querySelectorAll('#bars button')[1].click()")
    opened.wait_visible("overlay")
    second = opened.evaluate("document.querySelectorAll('#bars .row span:first-child')[1].textContent")
    assert opened.evaluate("document.getElementById('overlay').alt") == f"Which pixels decided for {second}"
    assert opened.evaluate("document.querySelector('#bars [aria-pressed=true] span').textContent") != "red"
    label = ("red", "green", "blue").index(second)
    assert any(f"v1/saliency?label={label}&" in url for url in opened.requested())
    opened.evaluate(
        "var slider = document.getElementById('opacity'); slider.value = 30; slider.dispatchEvent(new Event('input'))"
    )
    assert opened.evaluate("getComputedStyle(document.getElementById('overlay')).opacity") == "0.3"
    opened.click("explain")
    assert opened.evaluate("document.getElementById('overlay').hidden")


def test_while_the_server_is_busy_the_page_says_so_and_comes_again(opened: Any, server: Any, red_jpeg: Path) -> None:
    opened.answer(red_jpeg)
    opened.evaluate(
        "window.notices = []; new MutationObserver(() => notices.push(document.getElementById('notice').textContent))"
        ".observe(document.getElementById('notice'), {childList: true})"
    )
    stopped = threading.Event()

    def occupy() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stopped.is_set():
                client.post("/v1/saliency", content=red_jpeg.read_bytes())

    others = [threading.Thread(target=occupy) for _ in range(2)]
    for other in others:
        other.start()
    try:
        deadline = time.monotonic() + 30
        while not opened.evaluate("notices.length"):
            assert time.monotonic() < deadline, "the server was never busy"
            opened.evaluate("var box = document.getElementById('explain'); box.checked = true; void box.onchange()")
            time.sleep(0.2)
    finally:
        stopped.set()
        for other in others:
            other.join()
    assert opened.evaluate("notices[0]") == "The server is busy. Trying again in 1 second …"
    opened.wait_for(
        "document.getElementById('notice').hidden"
        " && (!document.getElementById('overlay').hidden || !document.getElementById('problem').hidden)"
    )
    assert opened.evaluate("document.getElementById('problem').hidden"), opened.text("problem")
    assert not opened.evaluate("document.getElementById('overlay').hidden")
