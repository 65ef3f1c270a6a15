"""The page in a real browser."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest

from manyeyes.recognition.bundle import GOLDEN_NAME, MODEL_NAME, Bundle, GoldenExamples, write_bundle

_COLOURS = {"red": (180, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 180)}


def _open(page: Any, url: str) -> None:
    page.call("Emulation.setEmulatedMedia", features=[])
    page.call("Page.navigate", url=url)
    page.wait_for("document.readyState === 'complete' && location.href.startsWith('http')")


@pytest.fixture
def opened(page: Any, server: Any) -> Iterator[Any]:
    page.complaints()
    _open(page, server.url)
    page.wait_for("!document.getElementById('about').hidden")
    yield page
    page.call("Page.navigate", url="about:blank")


@pytest.fixture
def colours(tmp_path: Path) -> dict[str, Path]:
    """An image of each class; PNG."""
    for name, colour in _COLOURS.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((60, 80, 3), colour[::-1], np.uint8))
    return {name: tmp_path / f"{name}.png" for name in _COLOURS}


def _choose(page: Any, *paths: Path) -> None:
    root = page.call("DOM.getDocument")["root"]["nodeId"]
    node = page.call("DOM.querySelector", nodeId=root, selector="#file")["nodeId"]
    page.call("DOM.setFileInputFiles", nodeId=node, files=[str(path) for path in paths])


def _text(page: Any, name: str) -> str:
    return page.evaluate(f"document.getElementById('{name}').textContent")


def _click(page: Any, name: str) -> None:
    page.evaluate(f"document.getElementById('{name}').click()")


def _wait_visible(page: Any, name: str) -> None:
    page.wait_for(f"!document.getElementById('{name}').hidden")


def _answer(page: Any, path: Path) -> None:
    _choose(page, path)
    _wait_visible(page, "result")


def _explain(page: Any) -> None:
    _click(page, "explain")
    _wait_visible(page, "overlay")


def test_choosing_an_image_shows_it_with_its_classes_and_how_long_it_took(opened: Any, red_jpeg: Path) -> None:
    _choose(opened, red_jpeg)
    opened.wait_for(
        "!document.getElementById('result').hidden && document.getElementById('picture').naturalWidth === 80"
    )
    assert _text(opened, "best") == "red"
    names = opened.evaluate("[...document.querySelectorAll('#bars .row span:first-child')].map(x => x.textContent)")
    assert sorted(names) == ["blue", "green", "red"]
    assert names[0] == "red"
    shares = opened.evaluate("[...document.querySelectorAll('#bars .row span:last-child')].map(x => x.textContent)")
    widths = opened.evaluate("[...document.querySelectorAll('#bars .bar')].map(x => parseFloat(x.style.width))")
    for share, width in zip(shares, widths, strict=True):
        assert width == pytest.approx(float(re.sub(r"[^\d.]", "", share)), abs=0.45)
    assert re.search(r"decode .*ms · predict .*ms · round trip .*ms · version \w", _text(opened, "timing"))
    assert _text(opened, "spoken").startswith("red, ")
    assert opened.evaluate("document.getElementById('spoken').getAttribute('aria-live')") == "polite"


def test_an_image_can_be_dropped_and_pasted(opened: Any, red_jpeg: Path) -> None:
    content = json.dumps(list(red_jpeg.read_bytes()))
    for event, holder in (("DragEvent('drop'", "dataTransfer"), ("ClipboardEvent('paste'", "clipboardData")):
        opened.evaluate(
            f"""document.getElementById('result').hidden = true;
            var data = new DataTransfer();
            data.items.add(new File([new Uint8Array({content})], 'red.jpg', {{type: 'image/jpeg'}}));
            document.body.dispatchEvent(new {event}, {{{holder}: data, bubbles: true, cancelable: true}}));"""
        )
        _wait_visible(opened, "result")
        assert _text(opened, "best") == "red"


def test_of_several_images_each_is_recognised_and_one_that_fails_is_named(
    opened: Any, colours: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("this is not an image")
    _choose(opened, colours["red"], colours["green"], tmp_path / "notes.txt", colours["blue"])
    opened.wait_for("document.getElementById('spoken').textContent === '3 images recognised, 1 failed'")
    assert opened.evaluate(
        "[...document.querySelectorAll('#strip button > span:first-of-type')].map(x => x.textContent)"
    ) == ["red", "green", "failed", "blue"]
    opened.evaluate("document.querySelectorAll('#strip button')[1].click()")
    assert _text(opened, "best") == "green"
    assert opened.evaluate("document.querySelector('#strip [aria-current=true]').title") == "green.png"
    opened.evaluate("document.querySelectorAll('#strip button')[2].click()")
    assert _text(opened, "problem").startswith("notes.txt: The image can't be used: not an image")


def test_a_file_that_is_no_image_is_answered_by_a_readable_error(opened: Any, tmp_path: Path) -> None:
    path = tmp_path / "notes.jpg"
    path.write_text("this is not an image")
    _choose(opened, path)
    _wait_visible(opened, "problem")
    assert "not an image" in _text(opened, "problem")
    assert "Try again" not in _text(opened, "problem"), "it would only fail again"
    assert opened.evaluate("document.getElementById('problem').getAttribute('role')") == "alert"
    assert opened.evaluate("document.getElementById('result').hidden")


def test_without_a_network_the_page_says_so_and_tries_again_when_asked(opened: Any, red_jpeg: Path) -> None:
    network = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    opened.call("Network.emulateNetworkConditions", offline=True, **network)
    try:
        _choose(opened, red_jpeg)
        _wait_visible(opened, "problem")
        assert "offline" in _text(opened, "problem")
    finally:
        opened.call("Network.emulateNetworkConditions", offline=False, **network)
    opened.evaluate("document.querySelector('#problem button').click()")
    _wait_visible(opened, "result")
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
        pixels[4:20, 10 * side : 10 * side + 10] = _COLOURS["red"][::-1]
        cv2.imwrite(str(tmp_path / f"{side}.png"), pixels)
        opened.evaluate("document.getElementById('result').hidden = true")
        _answer(opened, tmp_path / f"{side}.png")
        assert _text(opened, "best") == "red"
        assert opened.evaluate("document.getElementById('overlay').hidden"), "only on demand"
        _explain(opened)
        sums = opened.evaluate(green_of_halves)
        assert sums[side] > 1.2 * sums[1 - side], sums
    assert opened.evaluate("document.getElementById('overlay').alt") == "Which pixels decided for red"


def test_the_overlay_is_of_the_chosen_class_and_can_be_faded_and_taken_away(opened: Any, red_jpeg: Path) -> None:
    _answer(opened, red_jpeg)
    opened.complaints()
    opened.evaluate("document.querySelectorAll('#bars button')[1].click()")
    _wait_visible(opened, "overlay")
    second = opened.evaluate("document.querySelectorAll('#bars .row span:first-child')[1].textContent")
    assert opened.evaluate("document.getElementById('overlay').alt") == f"Which pixels decided for {second}"
    assert opened.evaluate("document.querySelector('#bars [aria-pressed=true] span').textContent") != "red"
    label = ("red", "green", "blue").index(second)
    assert any(f"v1/saliency?label={label}&" in url for url in opened.requested())
    opened.evaluate(
        "var slider = document.getElementById('opacity'); slider.value = 30; slider.dispatchEvent(new Event('input'))"
    )
    assert opened.evaluate("getComputedStyle(document.getElementById('overlay')).opacity") == "0.3"
    _click(opened, "explain")
    assert opened.evaluate("document.getElementById('overlay').hidden")


def test_while_the_server_is_busy_the_page_says_so_and_comes_again(opened: Any, server: Any, red_jpeg: Path) -> None:
    _answer(opened, red_jpeg)
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
    assert opened.evaluate("document.getElementById('problem').hidden"), _text(opened, "problem")
    assert not opened.evaluate("document.getElementById('overlay').hidden")


@pytest.fixture
def with_camera(opened: Any, server: Any) -> Any:
    opened.call("Browser.setPermission", permission={"name": "camera"}, setting="granted", origin=server.url)
    _click(opened, "camera")
    _wait_visible(opened, "rate")
    return opened


def test_the_camera_is_recognised_live_one_frame_at_a_time(with_camera: Any) -> None:
    for colour in ("green", "blue", "green"):
        with_camera.wait_for(f"document.getElementById('best').textContent === '{colour}'")
    rate, latency = re.findall(r"[\d.]+", _text(with_camera, "rate"))
    assert 2 < float(rate) <= 11, "the camera has 10 frames a second"
    assert 0 < float(latency) < 500
    spans = with_camera.evaluate(
        "performance.getEntriesByType('resource').filter(entry => entry.name.includes('recognize'))"
        ".map(entry => [entry.startTime, entry.responseEnd])"
    )
    assert len(spans) > 5
    assert all(end <= start + 1 for (_, end), (start, _) in itertools.pairwise(spans)), "frames overlapped"
    with_camera.evaluate("window.track = document.getElementById('video').srcObject.getTracks()[0]")
    _click(with_camera, "camera")
    assert with_camera.evaluate("track.readyState") == "ended"
    # The last frame stays, to ask which pixels decided.
    assert _text(with_camera, "best") in ("green", "blue")
    _explain(with_camera)


def test_the_camera_stops_when_its_tab_is_hidden(with_camera: Any) -> None:
    with_camera.evaluate("window.track = document.getElementById('video').srcObject.getTracks()[0]")
    other = with_camera.call("Target.createTarget", url="about:blank")["targetId"]
    with_camera.call("Target.activateTarget", targetId=other)
    try:
        with_camera.wait_for("track.readyState === 'ended'")
    finally:
        with_camera.call("Target.closeTarget", targetId=other)
    assert "tab was hidden" in _text(with_camera, "notice")


def test_a_camera_that_may_not_be_used_is_told(opened: Any, server: Any) -> None:
    opened.call("Browser.setPermission", permission={"name": "camera"}, setting="denied", origin=server.url)
    _click(opened, "camera")
    _wait_visible(opened, "problem")
    assert _text(opened, "problem").startswith("The camera may not be used. Allow it")
    assert _text(opened, "camera-text") == "Start the camera"


def test_the_keyboard_alone_reaches_everything_and_shows_where_it_is(opened: Any, red_jpeg: Path) -> None:
    opened.evaluate(
        "window.opened = 0;"
        "document.getElementById('file').addEventListener('click', e => { opened++; e.preventDefault(); })"
    )
    opened.press("Tab")
    assert opened.evaluate("document.activeElement.id") == "choose"
    opened.press("Enter")
    opened.wait_for("window.opened === 1")
    _answer(opened, red_jpeg)
    reached = []
    for _ in range(9):
        opened.press("Tab")
        assert opened.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        reached.append(opened.evaluate("document.activeElement.id || document.activeElement.textContent.slice(0, 5)"))
        if reached[-1] == "explain":
            opened.press("Space")
            _wait_visible(opened, "overlay")
    assert reached[:3] == ["camera", "explain", "opacity"]
    assert all(name[:3] in ("red", "gre", "blu") for name in reached[3:6])
    assert reached[6:] == ["search", "names", "Ask f"]
    opened.evaluate("document.querySelectorAll('#bars button')[2].focus()")
    opened.press("Enter")
    assert opened.evaluate("document.querySelectorAll('#bars button')[2].getAttribute('aria-pressed')") == "true"


def test_every_control_has_a_name_for_screen_readers(opened: Any, colours: dict[str, Path]) -> None:
    _choose(opened, *colours.values())
    opened.wait_for("document.getElementById('spoken').textContent === '3 images recognised'")
    _explain(opened)
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
    _answer(opened, red_jpeg)
    _explain(opened)
    _click(opened, "camera")
    _wait_visible(opened, "rate")
    _click(opened, "camera")
    urls = opened.requested()
    assert any("v1/recognize" in url for url in urls)
    assert any("v1/saliency" in url for url in urls)
    assert [url for url in urls if not url.startswith((server.url, f"blob:{server.url}", "data:"))] == []
    opened.call("Page.reload")
    opened.wait_for("document.readyState === 'complete' && !document.getElementById('about').hidden")
    _answer(opened, red_jpeg)
    _explain(opened)
    assert opened.complaints() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out_from_its_background_in_both_colour_schemes(
    opened: Any, red_jpeg: Path, tmp_path: Path, scheme: str
) -> None:
    opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    _answer(opened, red_jpeg)
    _explain(opened)
    opened.evaluate("showNotice('The server is busy.'); showProblem(new Problem('It failed:', 'why.'), () => {})")
    opened.evaluate("document.querySelector('details').open = true; document.getElementById('entry').hidden = false")
    ground, weak = opened.evaluate(
        """(() => {
            const context = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
            const parse = colour => {
                context.clearRect(0, 0, 1, 1);
                context.fillStyle = colour;
                context.fillRect(0, 0, 1, 1);
                return [...context.getImageData(0, 0, 1, 1).data];
            };
            const luminance = colour => parse(colour).slice(0, 3).map(v => v / 255)
                .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
                .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
            const groundOf = element => {
                while (parse(getComputedStyle(element).backgroundColor)[3] < 255) element = element.parentElement;
                return luminance(getComputedStyle(element).backgroundColor);
            };
            const isText = node => node.nodeType === 3 && node.textContent.trim();
            const shown = [...document.body.querySelectorAll('*')].filter(element =>
                element.checkVisibility() && !element.closest('script, style') && [...element.childNodes].some(isText));
            const found = shown.map(element => {
                const levels = [luminance(getComputedStyle(element).color), groundOf(element)].sort((a, b) => b - a);
                return [element.outerHTML.slice(0, 80), (levels[0] + 0.05) / (levels[1] + 0.05)];
            });
            if (found.length < 30) throw new Error('too little text was found');
            return [groundOf(document.body), found.filter(([, contrast]) => contrast < 4.5)];
        })()"""
    )
    assert weak == []
    assert ground > 0.8 if scheme == "light" else ground < 0.05


def test_a_narrow_screen_needs_no_scrolling_sideways(opened: Any, red_jpeg: Path) -> None:
    opened.call("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=1, mobile=True)
    try:
        _answer(opened, red_jpeg)
        _explain(opened)
        assert opened.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [320, 320]
    finally:
        opened.call("Emulation.clearDeviceMetricsOverride")


@pytest.fixture(scope="module")
def folder(variant: Callable[..., Path], small_bundle: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of one model and a model of 1,000 classes."""
    folder = tmp_path_factory.mktemp("models")
    variant(folder / "colours" / "1")
    variant(folder / "colours" / "2", reverse=True)
    _write_wide_bundle(small_bundle, folder / "species" / "1")
    return folder


@pytest.fixture(scope="module")
def guarded(start_server: Callable[..., Any], folder: Path) -> Any:
    """A server that wants a token."""
    return start_server("--poll", "0.2", models=folder, MANYEYES_TOKEN="open sesame")


def _write_wide_bundle(source: str, target: Path, num_classes: int = 1000) -> None:
    """The bundle with classes added that are never likely."""
    import onnx

    bundle = Bundle.load(source)
    num_likely = len(bundle.class_names)
    weights = np.eye(num_likely, num_classes, dtype=np.float32)
    bias = np.where(np.arange(num_classes) < num_likely, 0, -50).astype(np.float32)
    model = onnx.load_from_string(bundle.read_file(MODEL_NAME))
    model.graph.initializer.extend(
        [onnx.numpy_helper.from_array(weights, "w"), onnx.numpy_helper.from_array(bias, "b")]
    )
    model.graph.node.append(onnx.helper.make_node("Gemm", [model.graph.output[0].name, "w", "b"], ["wide"]))
    wide = onnx.helper.make_tensor_value_info("wide", onnx.TensorProto.FLOAT, ["n", num_classes])
    model.graph.output[0].CopyFrom(wide)
    golden = GoldenExamples.from_bytes(bundle.read_file(GOLDEN_NAME))
    golden = dataclasses.replace(golden, logits=golden.logits @ weights + bias)
    names = (*bundle.class_names, *(f"moth {number:03d}" for number in range(num_classes - num_likely)))
    files = {MODEL_NAME: model.SerializeToString(), GOLDEN_NAME: golden.to_bytes()}
    write_bundle(str(target), dataclasses.replace(bundle.info, class_names=names), files)


def _enter_token(page: Any, token: str) -> None:
    _wait_visible(page, "entry")
    assert page.evaluate("document.activeElement.id") == "token"
    page.call("Input.insertText", text=token)
    page.press("Enter")


def test_where_a_token_is_wanted_the_page_asks_for_it_and_keeps_it_for_the_tab_alone(page: Any, guarded: Any) -> None:
    _open(page, guarded.url)
    _enter_token(page, "wrong")
    page.wait_for("document.getElementById('wrong').textContent.includes('did not take')")
    _enter_token(page, "open sesame")
    _wait_visible(page, "about")
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [
        ["open sesame"],
        0,
        "",
    ]
    page.call("Page.reload")
    page.wait_for("document.readyState === 'complete' && !document.getElementById('about').hidden")
    assert page.evaluate("document.getElementById('entry').hidden"), "it is kept over a reload"
    page.evaluate("sessionStorage.clear()")


def test_models_and_versions_can_be_chosen_and_their_cards_read(page: Any, guarded: Any, red_jpeg: Path) -> None:
    _open(page, guarded.url)
    _enter_token(page, "open sesame")
    _wait_visible(page, "about")
    options = page.evaluate("[...document.getElementById('models').options].map(option => option.textContent)")
    assert options == ["colours", "colours, version 2", "colours, version 1", "species"]

    def pick(option: str) -> None:
        page.evaluate(
            "document.getElementById('result').hidden = true; var select = document.getElementById('models');"
            f"select.value = {options.index(option)}; select.dispatchEvent(new Event('change'))"
        )

    _answer(page, red_jpeg)
    assert _text(page, "best") == "blue", "version 2 has its classes turned round"
    pick("colours, version 1")
    _wait_visible(page, "result")
    assert _text(page, "best") == "red"
    assert _text(page, "timing").endswith("version 1")
    facts = _text(page, "facts")
    assert "20 × 24 pixels, RGB" in facts
    assert "float32" in facts
    assert re.search(r"Accuracy[\d.]+\s%45 images of val, 95\s% interval [\d.]+\s% to 100\s%", facts)
    pick("species")
    _wait_visible(page, "result")
    assert _text(page, "best") == "red"
    assert _text(page, "count") == "1,000 classes"
    page.evaluate("document.getElementById('search').focus()")
    page.call("Input.insertText", text="12 Moth")
    page.wait_for("document.getElementById('names').children.length === 20")
    assert _text(page, "count") == "20 of 1,000 classes"
    page.evaluate("sessionStorage.clear()")


def test_when_the_server_takes_up_a_new_version_the_page_shows_its_card(
    page: Any, guarded: Any, folder: Path, variant: Callable[..., Path], tmp_path: Path, red_jpeg: Path
) -> None:
    _open(page, guarded.url)
    _enter_token(page, "open sesame")
    _wait_visible(page, "about")
    variant(tmp_path / "new").rename(folder / "colours" / "3")
    deadline = time.monotonic() + 30
    while not _text(page, "facts").startswith("Version3"):
        assert time.monotonic() < deadline, "the card is still the old one's"
        page.evaluate("document.getElementById('result').hidden = true")
        _answer(page, red_jpeg)
        time.sleep(0.2)
    assert "colours, version 3" in _text(page, "models")
    page.evaluate("sessionStorage.clear()")
