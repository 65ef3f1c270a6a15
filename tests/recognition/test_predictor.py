from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from manyeyes.errors import BundleError, ImageError, MissingExtraError, UsageError
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.recognition import backends
from manyeyes.recognition.bundle import GOLDEN_NAME, MODEL_NAME, Bundle
from manyeyes.recognition.predictor import LOGIT_TOLERANCE, Predictor, softmax


@pytest.fixture(scope="module")
def predictor(small_bundle: str) -> Predictor:
    return Predictor.load(small_bundle)


def _colour(label: int, height: int = 24, width: int = 20) -> np.ndarray:
    pixels = np.full((height, width, 3), 60, np.uint8)
    pixels[:, :, label] = 170
    return pixels


def test_a_picture_is_recognised_from_bytes_and_from_arrays_of_any_size(
    predictor: Predictor, small_bundle: str
) -> None:
    golden = Bundle.load(small_bundle).golden_examples()
    predictions = predictor.predict([*golden.encoded, _colour(2, 100, 70)], top_k=2)
    assert [prediction.label for prediction in predictions[:-1]] == golden.logits.argmax(axis=1).tolist()
    assert predictions[-1].class_name == "blue"
    for prediction in predictions:
        first, second = prediction.top_k
        assert (first.label, first.class_name, first.probability) == (
            prediction.label,
            prediction.class_name,
            prediction.probability,
        )
        assert first.probability >= second.probability


def test_top_k_beyond_the_classes_gives_them_all_and_they_sum_to_one(predictor: Predictor) -> None:
    (prediction,) = predictor.predict([_colour(0)], top_k=100)
    assert sorted(candidate.class_name for candidate in prediction.top_k) == ["blue", "green", "red"]
    assert sum(candidate.probability for candidate in prediction.top_k) == pytest.approx(1)


def test_nothing_in_gives_nothing_out(predictor: Predictor) -> None:
    assert predictor.predict([]) == []


def test_a_grey_picture_is_recognised_by_a_model_of_colours(predictor: Predictor) -> None:
    grey = np.full((30, 30), 128, np.uint8)
    (flat,) = predictor.predict([grey])
    (full,) = predictor.predict([np.repeat(grey[:, :, None], 3, axis=2)])
    assert flat == full


def test_wrong_arguments_get_one_clear_line(predictor: Predictor) -> None:
    for call, words in (
        (lambda: predictor.predict([np.zeros((4, 4, 3), np.float32)]), "float32"),
        (lambda: predictor.predict([np.zeros((4, 4, 2), np.uint8)]), "expected uint8"),
        (lambda: predictor.predict([_colour(0)], top_k=0), "top_k=0"),
        (lambda: predictor.logits(np.zeros((1, 4, 4, 3), np.uint8)), "(24, 20, 3)"),
    ):
        with pytest.raises(UsageError) as caught:
            call()
        assert words in str(caught.value)
    with pytest.raises(ImageError):
        predictor.predict([b"not an image"])


def test_a_prediction_does_not_depend_on_its_neighbours_in_the_batch(predictor: Predictor) -> None:
    batch = np.random.default_rng(0).integers(0, 255, (32, 24, 20, 3), dtype=np.uint8)
    together = predictor.logits(batch)
    alone = np.concatenate([predictor.logits(image[None]) for image in batch])
    np.testing.assert_allclose(together, alone, atol=predictor.logit_tolerance(alone))


def test_threads_may_share_a_predictor(predictor: Predictor) -> None:
    batches = np.random.default_rng(1).integers(0, 255, (64, 1, 24, 20, 3), dtype=np.uint8)
    wanted = [predictor.logits(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(predictor.logits, batches))
    for one, other in zip(wanted, found, strict=True):
        np.testing.assert_allclose(one, other, atol=predictor.logit_tolerance(one))


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_every_backend_says_its_precision_and_replays_the_golden_examples(small_bundle: str, backend: str) -> None:
    predictor = Predictor.load(small_bundle, backend)  # type: ignore[arg-type]
    assert (predictor.backend.name, predictor.backend.precision) == (backend, "float32")


def test_another_preprocessing_is_refused_by_its_pixels_even_if_all_fingerprints_agree(
    forged: Callable[..., str], small_bundle: str
) -> None:
    kept = Bundle.load(small_bundle).preprocessing
    other = dataclasses.replace(kept, background=0)
    uri = forged(preprocessing=other.to_dict(), preprocessing_fingerprint=other.fingerprint)
    with pytest.raises(BundleError, match=r"golden example '.*transparent.*' gives other pixels.*by up to \d+"):
        Predictor.load(uri)


def test_another_size_is_refused(forged: Callable[..., str]) -> None:
    other = Preprocessing.for_size(24, 24)
    uri = forged(preprocessing=other.to_dict(), preprocessing_fingerprint=other.fingerprint)
    with pytest.raises(BundleError, match=r"gives an image of \(24, 24, 3\) here"):
        Predictor.load(uri)


def test_a_golden_mismatch_is_refused_saying_which_example_and_by_how_much(
    forged: Callable[..., str], small_bundle: str
) -> None:
    golden = Bundle.load(small_bundle).golden_examples()
    logits = golden.logits.copy()
    logits[3, 1] += 0.5
    uri = forged({GOLDEN_NAME: dataclasses.replace(golden, logits=logits).to_bytes()})
    with pytest.raises(BundleError, match=rf"golden example '{golden.names[3]}': a logit differs by 0\.5"):
        Predictor.load(uri)
    assert Predictor.load(uri, replay_golden=False).class_names == ("red", "green", "blue")


def test_a_class_list_of_another_length_is_refused(forged: Callable[..., str]) -> None:
    with pytest.raises(BundleError, match="2 classes"):
        Predictor.load(forged(class_names=("red", "green")))


def test_a_model_that_no_backend_can_read_is_refused(forged: Callable[..., str]) -> None:
    with pytest.raises(BundleError, match="can't be compiled"):
        Predictor.load(forged({MODEL_NAME: b"this is not ONNX"}))


def test_a_missing_backend_says_which_extra_to_install(small_bundle: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"manyeyes\[predict\]"):
        Predictor.load(small_bundle)


def test_without_openvino_the_automatic_choice_is_onnx_runtime(
    small_bundle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert Predictor.load(small_bundle).backend.name == "onnxruntime"
    with pytest.raises(MissingExtraError):
        Predictor.load(small_bundle, "openvino")


def test_a_model_that_openvino_does_not_know_runs_on_onnx_runtime() -> None:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["matrices"], perm=[0, 3, 1, 2]),
        helper.make_node("Det", ["matrices"], ["logits"]),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["n", 4, 4, 3])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])
    graph = helper.make_graph(nodes, "determinants", [image], [logits])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    pixels = np.random.default_rng(0).integers(0, 9, (2, 4, 4, 3), dtype=np.uint8)
    served = backends.create_backend(model, precision="bfloat16")
    assert (served.name, served.precision) == ("onnxruntime", "float32")
    wanted = np.linalg.det(pixels.transpose(0, 3, 1, 2).astype(float))
    np.testing.assert_allclose(served.run(pixels), wanted, rtol=1e-4, atol=1e-2)
    with pytest.raises(BundleError, match="No conversion rule found for operations: Det") as caught:
        backends.create_backend(model, backend="openvino")
    assert "\n" not in str(caught.value)


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(UsageError, match="auto, openvino, onnxruntime"):
        backends.create_backend(b"", backend="tensorrt")  # type: ignore[arg-type]


def test_recognition_and_serving_never_load_keras_or_tensorflow(small_bundle: str) -> None:
    program = (
        "import sys, numpy as np\n"
        "import manyeyes.recognition.batch, manyeyes.serving.app\n"
        "from manyeyes.recognition.predictor import Predictor\n"
        f"Predictor.load({small_bundle!r}).predict([np.zeros((9, 9, 3), np.uint8)])\n"
        "assert not {'keras', 'tensorflow', 'tf2onnx', 'onnx'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


_LOGITS = hnp.arrays(
    np.float32, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(-(2.0**99), 2.0**99, width=32)
)


@given(_LOGITS, st.floats(0.05, 20))
def test_softmax_gives_probabilities_in_the_order_of_any_logits(logits: np.ndarray, temperature: float) -> None:
    probabilities = softmax(logits, temperature)
    assert np.isfinite(probabilities).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    np.testing.assert_array_equal(
        probabilities[np.arange(len(logits)), logits.argmax(axis=1)], probabilities.max(axis=1)
    )


def test_a_higher_temperature_makes_the_answer_less_sure() -> None:
    logits = np.array([[2.0, 0.0]], np.float32)
    assert softmax(logits, 1.0)[0, 0] == pytest.approx(1 / (1 + np.exp(-2)))
    assert softmax(logits, 4.0)[0, 0] == pytest.approx(1 / (1 + np.exp(-0.5)))


def test_float32_is_held_to_a_tighter_tolerance_than_bfloat16() -> None:
    assert LOGIT_TOLERANCE["float32"] <= 1e-4 < LOGIT_TOLERANCE["bfloat16"]
