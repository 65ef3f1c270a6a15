from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyeyes import config
from manyeyes.errors import BundleError
from manyeyes.recognition.bundle import GOLDEN_NAME, INFO_NAME, MODEL_NAME, Bundle, GoldenExamples


def _edit(bundle: Path, change: Any) -> None:
    values = json.loads((bundle / INFO_NAME).read_text())
    change(values)
    (bundle / INFO_NAME).write_text(json.dumps(values))


def _refusal(bundle: Path) -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.load(str(bundle))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_exported_bundle_opens(small_bundle: str) -> None:
    bundle = Bundle.load(small_bundle)
    assert bundle.class_names == ("red", "green", "blue")
    assert bundle.info.input_shape == bundle.preprocessing.output_shape == (24, 20, 3)


@pytest.mark.parametrize("field, value", [("background", 0), ("interpolation", "cubic"), ("channels", 1)])
def test_a_changed_preprocessing_field_is_refused(bundle_copy: Path, field: str, value: Any) -> None:
    _edit(bundle_copy, lambda values: values["preprocessing"].update({field: value}))
    assert "preprocessing has fingerprint" in _refusal(bundle_copy)


@pytest.mark.parametrize(
    "field, value",
    [("class_names", ["green", "red", "blue"]), ("temperature", 2.0), ("precision", "bfloat16"), ("name", "resnet")],
)
def test_an_edited_class_list_or_setting_is_refused(bundle_copy: Path, field: str, value: Any) -> None:
    _edit(bundle_copy, lambda values: values.update({field: value}))
    assert "was changed after export" in _refusal(bundle_copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "..", ""])
def test_a_bundle_that_lists_files_elsewhere_is_refused(bundle_copy: Path, name: str) -> None:
    info = Bundle.load(str(bundle_copy)).info
    files = {**info.files, name: {"size_bytes": 1, "sha256": ""}}
    edited = dataclasses.replace(info, files=files).with_fingerprint()
    _edit(bundle_copy, lambda values: values.update(config.to_dict(edited)))
    assert "not a file of the bundle" in _refusal(bundle_copy)


@pytest.mark.parametrize("temperature", [0.0, -1.0, 1e-320, float("inf"), float("nan")])
def test_a_temperature_that_makes_no_probabilities_is_refused(bundle_copy: Path, temperature: float) -> None:
    edited = dataclasses.replace(Bundle.load(str(bundle_copy)).info, temperature=temperature)
    if np.isfinite(temperature):  # else there is no fingerprint
        edited = edited.with_fingerprint()
    _edit(bundle_copy, lambda values: values.update(config.to_dict(edited)))
    assert f"has temperature {temperature}" in _refusal(bundle_copy)


def test_a_number_that_is_none_is_refused_wherever_it_stands(bundle_copy: Path) -> None:
    _edit(bundle_copy, lambda values: values["files"][MODEL_NAME].update(size_bytes=float("nan")))
    assert "is damaged" in _refusal(bundle_copy)


@pytest.mark.parametrize("name", [MODEL_NAME, GOLDEN_NAME])
def test_a_flipped_byte_in_a_file_is_refused(bundle_copy: Path, name: str) -> None:
    content = bytearray((bundle_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_copy / name).write_bytes(content)
    assert "fails its checksum" in _refusal(bundle_copy)


@pytest.mark.parametrize("name", [MODEL_NAME, GOLDEN_NAME])
def test_a_missing_or_cut_file_is_refused(bundle_copy: Path, name: str) -> None:
    content = (bundle_copy / name).read_bytes()
    (bundle_copy / name).write_bytes(content[:-1])
    assert "bytes" in _refusal(bundle_copy)
    (bundle_copy / name).unlink()
    assert "is missing" in _refusal(bundle_copy)


def test_what_is_not_a_bundle_is_refused_with_what_to_do(bundle_copy: Path, tmp_path: Path) -> None:
    assert "manyeyes export" in _refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "not a bundle" in _refusal(tmp_path / "empty")
    (tmp_path / "file").write_text("x")
    assert "file" in _refusal(tmp_path / "file")
    _edit(bundle_copy, lambda values: values.update(format_version=99))
    assert "format version 99" in _refusal(bundle_copy)
    (bundle_copy / INFO_NAME).write_text("{")
    assert "damaged" in _refusal(bundle_copy)
    (bundle_copy / INFO_NAME).write_text('{"format": "other"}')
    assert "not the description of a Manyeyes bundle" in _refusal(bundle_copy)


@given(st.data())
def test_golden_examples_come_back_as_they_were_written(data: st.DataObject) -> None:
    encoded = tuple(data.draw(st.lists(st.binary(max_size=40), min_size=1, max_size=5)))
    count = len(encoded)
    draw = np.random.default_rng(count)
    pixels = draw.integers(0, 255, (count, 3, 2, 1), dtype=np.uint8)
    logits = draw.normal(size=(count, 4)).astype(np.float32)
    written = GoldenExamples(tuple(f"né {i}" for i in range(count)), encoded, pixels, logits)
    read = GoldenExamples.from_bytes(written.to_bytes())
    assert (read.names, read.encoded) == (written.names, written.encoded)
    np.testing.assert_array_equal(read.pixels, pixels)
    np.testing.assert_array_equal(read.logits, logits)


@given(st.binary(max_size=200))
def test_damaged_golden_examples_are_refused(content: bytes) -> None:
    with pytest.raises(BundleError):
        GoldenExamples.from_bytes(content)
