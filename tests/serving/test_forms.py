"""Forms as browsers and programs send them."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.mark.parametrize(
    "parts",
    [
        ["note", "image"],
        ["image", "note"],
        ["image", "note", "image", "note", "other", "image"],
        ["note", "image", "image"],
    ],
)
def test_other_fields_of_a_form_leave_its_images_whole(client: Any, images: dict[str, bytes], parts: list[str]) -> None:
    contents = {"note": b"hello", "other": b"x" * 200_000, "image": images[".png"]}
    answer = client.post("/v1/recognize", files=[(name, ("name", contents[name])) for name in parts])
    assert answer.status_code == 200
    results = answer.json()["results"]
    assert ["predictions" in result for result in results] == [True] * parts.count("image")
    alone = client.post("/v1/recognize", content=images[".png"]).json()["predictions"]
    assert [result["predictions"][0]["label"] for result in results] == [alone[0]["label"]] * len(results)
