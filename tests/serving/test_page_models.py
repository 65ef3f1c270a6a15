"""The page in a real browser: tokens, models, versions and their cards."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from manyeyes.recognition.bundle import GOLDEN_NAME, MODEL_NAME, Bundle, Evaluation, GoldenExamples, write_bundle


@pytest.fixture(scope="module")
def folder(
    variant: Callable[..., Path],
    small_bundle: str,
    figures_of: Callable[[int], Evaluation],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two versions of one model, and a model of 1,000 classes that was evaluated."""
    folder = tmp_path_factory.mktemp("models")
    variant(folder / "colours" / "1")
    variant(folder / "colours" / "2", reverse=True)
    _write_wide_bundle(small_bundle, folder / "species" / "1", figures_of(1000))
    return folder


@pytest.fixture(scope="module")
def guarded(start_server: Callable[..., Any], folder: Path) -> Any:
    """A server that wants a token."""
    return start_server("--poll", "0.2", models=folder, MANYEYES_TOKEN="open-sesame")


def _write_wide_bundle(source: str, target: Path, evaluation: Evaluation) -> None:
    """The bundle with classes added that are never likely."""
    import onnx

    bundle = Bundle.load(source)
    num_likely, num_classes = len(bundle.class_names), len(evaluation.support)
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
    write_bundle(str(target), dataclasses.replace(bundle.info, class_names=names, evaluation=evaluation), files)


def _enter(page: Any, token: str) -> None:
    page.wait_visible("entry")
    assert page.evaluate("document.activeElement.id") == "token"
    page.call("Input.insertText", text=token)
    page.press("Enter")


@pytest.fixture
def entered(page: Any, guarded: Any) -> Iterator[Any]:
    """The page of the guarded server, after its token."""
    page.open(guarded.url)
    _enter(page, "open-sesame")
    page.wait_visible("about")
    yield page
    page.evaluate("sessionStorage.clear()")


def test_where_a_token_is_wanted_the_page_asks_for_it_and_keeps_it_for_the_tab_alone(page: Any, guarded: Any) -> None:
    page.open(guarded.url)
    _enter(page, "wrong")
    page.wait_for("document.getElementById('wrong').textContent.includes('did not take')")
    _enter(page, "open-sesame")
    page.wait_visible("about")
    assert page.evaluate("[Object.values(sessionStorage), localStorage.length, document.cookie]") == [
        ["open-sesame"],
        0,
        "",
    ]
    page.call("Page.reload")
    page.wait_for("document.readyState === 'complete' && !document.getElementById('about').hidden")
    assert page.evaluate("document.getElementById('entry').hidden"), "it is kept over a reload"
    page.evaluate("sessionStorage.clear()")


def test_models_and_versions_can_be_chosen_and_their_cards_read(entered: Any, red_jpeg: Path) -> None:
    options = entered.evaluate("[...document.getElementById('models').options].map(option => option.textContent)")
    assert options == ["colours", "colours, version 2", "colours, version 1", "species"]

    def pick(option: str) -> None:
        entered.evaluate(
            "document.getElementById('result').hidden = true; var select = document.getElementById('models');"
            f"select.value = {options.index(option)}; select.dispatchEvent(new Event('change'))"
        )

    entered.answer(red_jpeg)
    assert entered.text("best") == "blue", "version 2 has its classes turned round"
    pick("colours, version 1")
    entered.wait_visible("result")
    assert entered.text("best") == "red"
    assert entered.text("timing").endswith("version 1")
    facts = entered.text("facts")
    assert "20 × 24 pixels, RGB" in facts
    assert "float32" in facts
    assert re.search(r"As it runs here[\d.]+\s%45 images of val, 95\s% interval [\d.]+\s% to 100\s%", facts)
    assert "Accuracynot knownthe model was not evaluated before it was exported" in facts
    assert entered.evaluate("document.querySelectorAll('#names table').length") == 0
    pick("species")
    entered.wait_visible("result")
    assert entered.text("best") == "red"
    assert entered.text("count") == "1,000 classes"
    entered.evaluate("document.getElementById('search').focus()")
    entered.call("Input.insertText", text="12 Moth")
    entered.wait_for("document.querySelectorAll('#names tbody tr').length === 20")
    assert entered.text("count") == "20 of 1,000 classes"


def test_the_card_of_an_evaluated_model_shows_its_figures_and_which_classes_are_hard(
    entered: Any, figures_of: Callable[[int], Evaluation]
) -> None:
    entered.evaluate(
        "var select = document.getElementById('models'); select.value = 3; select.dispatchEvent(new Event('change'))"
    )
    facts = entered.text("facts").replace("\u00a0", " ")
    wanted = figures_of(1000)
    low, high = (f"{100 * bound:.1f} %" for bound in wanted.accuracy_interval)
    assert f"{wanted.num_examples:,} images of test, 95 % interval {low} to {high}" in facts
    assert "Among the top 2100 %" in facts
    assert "Macro F150.0 %" in facts
    assert "Evaluated onphotosfingerprint 0123456789abcdef" in facts

    def rows() -> list[list[str]]:
        read = "[...document.querySelectorAll('#names tbody tr')].map(row => [...row.children].map(x => x.textContent))"
        return [[text.replace("\u00a0", " ") for text in row] for row in entered.evaluate(read)]

    def sort_by(title: str) -> str:
        entered.evaluate(f"document.querySelector('#names [data-by={title}]').click()")
        return entered.evaluate(
            "document.querySelector('#names [aria-sort]').ariaSort + document.activeElement.textContent"
        )

    assert len(rows()) == 1000
    assert rows()[1] == ["green", "50.0 %", "50.0 %", "50.0 %", "2"]
    assert sort_by("recall") == "ascendingRecall"
    assert rows()[0] == ["moth 949", "0.1 %", "0.1 %", "0.1 %", "953"], "the first of those of 0.0010"
    assert rows()[-1] == ["moth 996", "–", "–", "–", "0"], "without a value it is neither good nor bad"
    assert sort_by("recall") == "descendingRecall"
    assert [row[0] for row in (rows()[0], rows()[-1])] == ["red", "moth 996"]
    assert sort_by("name") == "ascendingClass"
    assert [row[0] for row in rows()[:4]] == ["blue", "green", "moth 000", "moth 001"]
    entered.evaluate("document.getElementById('search').focus()")
    entered.call("Input.insertText", text="moth 99")
    entered.wait_for("document.querySelectorAll('#names tbody tr').length === 16")
    found = [f"moth {number:03d}" for number in (*range(99, 990, 100), *range(990, 997))]
    assert [row[0] for row in rows()] == found, "the order is kept"


def test_when_the_server_takes_up_a_new_version_the_page_shows_its_card(
    entered: Any, folder: Path, variant: Callable[..., Path], tmp_path: Path, red_jpeg: Path
) -> None:
    variant(tmp_path / "new").rename(folder / "colours" / "3")
    deadline = time.monotonic() + 30
    while not entered.text("facts").startswith("Version3"):
        assert time.monotonic() < deadline, "the card is still the old one's"
        entered.evaluate("document.getElementById('result').hidden = true")
        entered.answer(red_jpeg)
        time.sleep(0.2)
    assert "colours, version 3" in entered.text("models")
