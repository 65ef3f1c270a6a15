"""The page in a real browser: the camera."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest


@pytest.fixture
def with_camera(opened: Any, server: Any) -> Any:
    opened.call("Browser.setPermission", permission={"name": "camera"}, setting="granted", origin=server.url)
    opened.click("camera")
    opened.wait_visible("rate")
    return opened


def test_the_camera_is_recognised_live_one_frame_at_a_time(with_camera: Any) -> None:
    for colour in ("green", "blue", "green"):
        with_camera.wait_for(f"document.getElementById('best').textContent === '{colour}'")
    rate, latency = re.findall(r"[\d.]+", with_camera.text("rate"))
    assert 2 < float(rate) <= 11, "the camera has 10 frames a second"
    assert 0 < float(latency) < 500
    spans = with_camera.evaluate(
        "performance.getEntriesByType('resource').filter(entry => entry.name.includes('recognize'))"
        ".map(entry => [entry.startTime, entry.responseEnd])"
    )
    assert len(spans) > 5
    assert all(end <= start + 1 for (_, end), (start, _) in itertools.pairwise(spans)), "frames overlapped"
    with_camera.evaluate("window.track = document.getElementById('video').srcObject.getTracks()[0]")
    with_camera.click("camera")
    assert with_camera.evaluate("track.readyState") == "ended"
    # The last frame stays, to ask which pixels decided.
    assert with_camera.text("best") in ("green", "blue")
    with_camera.explain()


def test_the_camera_stops_when_its_tab_is_hidden(with_camera: Any) -> None:
    with_camera.evaluate("window.track = document.getElementById('video').srcObject.getTracks()[0]")
    other = with_camera.call("Target.createTarget", url="about:blank")["targetId"]
    with_camera.call("Target.activateTarget", targetId=other)
    try:
        with_camera.wait_for("track.readyState === 'ended'")
    finally:
        with_camera.call("Target.closeTarget", targetId=other)
    assert "tab was hidden" in with_camera.text("notice")


def test_a_camera_that_may_not_be_used_is_told(opened: Any, server: Any) -> None:
    opened.call("Browser.setPermission", permission={"name": "camera"}, setting="denied", origin=server.url)
    opened.click("camera")
    opened.wait_visible("problem")
    assert opened.text("problem").startswith("The camera may not be used. Allow it")
    assert opened.text("camera-text") == "Start the camera"
