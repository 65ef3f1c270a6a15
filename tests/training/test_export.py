from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.registry import create_engine
from manyeyes.errors import BundleError, DatasetError, UsageError
from manyeyes.imaging.decode import decode
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.models.registry import ModelConfig, build
from manyeyes.models.rnn import MAX_UNROLLED_STEPS
from manyeyes.recognition.backends import create_backend
from manyeyes.recognition.bundle import INFO_NAME, Bundle
from manyeyes.recognition.predictor import Predictor
from manyeyes.training import export as export_module
from manyeyes.training.export import export, to_onnx
from manyeyes.training.golden import encode_variants
from manyeyes.training.held_out import Accuracy, Sample, calibration_images, compare_accuracy, held_out_sample
from manyeyes.training.run import Run


@pytest.fixture(scope="module")
def val_images(small_dataset: str) -> np.ndarray:
    dataset = Dataset(small_dataset)
    return np.concatenate([rows.images for shard in dataset.split("val").shards for rows in dataset.rows(shard)])


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("batch_size", [1, 32])
def test_served_logits_equal_training_logits(
    small_run: str, small_bundle: str, val_images: np.ndarray, backend: Any, batch_size: int
) -> None:
    trained = np.asarray(Run.open(small_run).load_model()(val_images[:batch_size], training=False))
    served = Predictor.load(small_bundle, backend).logits(val_images[:batch_size])
    assert served.dtype == np.float32
    np.testing.assert_allclose(served, trained, atol=1e-4 * max(1, np.abs(trained).max()))


def test_the_result_says_how_close_the_bundle_is_in_the_precision_that_serves(small_run: str, tmp_path: Path) -> None:
    for precision in ("float32", "bfloat16"):
        uri = str(tmp_path / precision)
        if _servable(precision) != precision:
            pytest.skip(f"this CPU can't compute {precision}")
        result = export(small_run, uri, precision=precision, num_golden=5)  # type: ignore[arg-type]
        assert (result.precision, Predictor.load(uri).backend.precision) == (precision, precision)
        assert (result.parity.num_golden, result.parity.num_images) == (5, 45)
        assert result.parity.top1_agreement >= 0.99
        assert result.parity.golden_max_difference <= result.parity.tolerance
        info = Bundle.load(uri).info
        assert info.parity["max_difference"] == result.parity.max_difference
        assert info.fingerprint == result.fingerprint
        assert info.provenance["step"] == 90


def _servable(precision: Any) -> str:
    model = build(ModelConfig("cnn", (8, 8, 1), 2, options={"width": 2}))
    model(np.zeros((1, 8, 8, 1), np.uint8))
    return create_backend(to_onnx(model), precision=precision).precision


def test_a_precision_that_the_backend_lacks_is_refused(small_run: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Use --precision float32"):
        export(small_run, str(tmp_path / "b"), precision="bfloat16", backend="onnxruntime")
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_changes_the_model_is_refused_and_nothing_is_published(
    small_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert_wrongly(model: Any) -> bytes:
        kernel = model.get_layer("logits").kernel
        kernel.assign(kernel * 1.01)
        return to_onnx(model)

    monkeypatch.setattr(export_module, "to_onnx", convert_wrongly)
    with pytest.raises(BundleError, match="a logit differs by"):
        export(small_run, str(tmp_path / "b"))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_is_replaced_whole_and_anything_else_is_left_alone(small_run: str, tmp_path: Path) -> None:
    target = tmp_path / "b"
    target.mkdir()
    first = export(small_run, str(target), num_golden=1)
    second = export(small_run, f"{target}/", num_golden=2)
    assert Bundle.load(str(target)).info.fingerprint == second.fingerprint != first.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    for folder_name in ("thesis", "papers/thesis", "b"):
        chapter = tmp_path / folder_name / "chapter.txt"
        chapter.parent.mkdir(parents=True, exist_ok=True)
        chapter.write_text("years of work")
        folder = tmp_path / chapter.relative_to(tmp_path).parts[0]
        with pytest.raises(UsageError, match="is not a bundle"):
            export(small_run, str(folder))
        assert chapter.read_text() == "years of work"


def test_a_run_is_compared_on_a_dataset_of_other_sizes(small_run: str, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    for index in range(20):
        path = photos / "rg"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), np.full((40 + index, 50, 3), 12 * index, np.uint8))
    for name, options in (("own", {}), ("small", {"size": (30, 30)}), ("grey", {"size": (30, 30), "channels": 1})):
        ingest(str(photos), str(tmp_path / name), settings=IngestSettings(**options), engine=create_engine("inline"))  # type: ignore[arg-type]
    for name in ("own", "small"):
        assert export(small_run, str(tmp_path / "b"), dataset=str(tmp_path / name)).parity.top1_agreement == 1
    with pytest.raises(DatasetError, match=r"gives images of \(24, 20, 1\), but the model of .* takes \(24, 20, 3\)"):
        export(small_run, str(tmp_path / "c"), dataset=str(tmp_path / "grey"))


def test_the_same_run_gives_the_same_bundle(small_run: str, small_bundle: str, tmp_path: Path) -> None:
    again = export(small_run, str(tmp_path / "b"))
    first = Bundle.load(small_bundle)
    golden = "golden.safetensors"
    assert Bundle.load(again.bundle).info.files[golden] == first.info.files[golden]


def test_a_bundle_can_be_exported_to_another_file_system(small_run: str) -> None:
    uri = "memory://exported/bundle"
    result = export(small_run, uri)
    assert Predictor.load(uri).bundle.info.fingerprint == result.fingerprint
    assert export(small_run, uri, num_golden=3).fingerprint == Bundle.load(uri).info.fingerprint
    assert sorted(storage.list_files(uri)) == [INFO_NAME, "golden.safetensors", "model.onnx"]


def test_bad_arguments_get_one_clear_line(small_run: str, tmp_path: Path) -> None:
    for error, run, options, words in (
        (UsageError, tmp_path / "nowhere", {}, "no run"),
        (UsageError, small_run, {"precision": "float8"}, "float32, bfloat16"),
        (UsageError, small_run, {"backend": "tensorrt"}, "auto, openvino, onnxruntime"),
        (UsageError, small_run, {"num_golden": 0}, "num_golden=0"),
        (DatasetError, small_run, {"dataset": str(tmp_path / "gone")}, "no dataset"),
    ):
        with pytest.raises(error) as caught:
            export(str(run), str(tmp_path / "b"), **options)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name, height, width",
    [("gru", 12, 12), ("lstm", 12, 12), ("crnn", 12, 12), ("gru", MAX_UNROLLED_STEPS + 1, 6)],
    ids=["gru", "lstm", "crnn", "gru-not-unrolled"],
)
def test_recurrent_models_run_on_openvino(name: str, height: int, width: int) -> None:
    model = build(ModelConfig(name, (height, width, 1), 3))
    images = np.random.default_rng(0).integers(0, 255, (5, height, width, 1), dtype=np.uint8)
    trained = np.asarray(model(images, training=False))
    onnx_model = to_onnx(model)
    for backend in ("openvino", "onnxruntime"):
        served = create_backend(onnx_model, backend=backend)  # type: ignore[arg-type]
        for batch in (images, images[:1]):
            np.testing.assert_allclose(served.run(batch), trained[: len(batch)], atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_golden_inputs_take_the_branches_of_the_decoder(channels: int) -> None:
    image = np.zeros((10, 16, channels), np.uint8)
    image[:, :8] = 200
    examples = dict(encode_variants([image], 4))
    decoded = {name: decode(encoded, channels=channels) for name, encoded in examples.items()}
    png, resized, rotated, transparent = decoded.values()
    np.testing.assert_array_equal(png, image)
    assert resized.shape == (16, 35, channels)
    # EXIF turned it back, so left is still bright and right is dark.
    assert rotated.shape == image.shape
    assert rotated[:, :6].min() > 150 > 60 > rotated[:, 10:].max()
    # On the left it is fully transparent: the background shines through.
    assert transparent[0, 0].min() == 255
    assert transparent[0, -1].max() == 0


def test_a_run_on_photos_of_any_size_gets_a_small_bundle_that_agrees(small_run: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    for index in range(12):
        pixels = draw.integers(0, 120, (700 + 40 * index, 1300, 3), dtype=np.uint8)
        pixels[:, :, index % 3] += 100
        path = tmp_path / "photos" / str(index % 3) / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), pixels)
    dataset = str(tmp_path / "dataset")
    ingest(str(tmp_path / "photos"), dataset, settings=IngestSettings(encoding="jpeg"), engine=create_engine("inline"))
    chain = Preprocessing.for_size(24, 20)
    run = dataclasses.replace(
        Run.open(small_run), uri=str(tmp_path / "run"), dataset=dataset, preprocessing=chain, extra_preprocessing=chain
    )
    run.save()
    (tmp_path / "run" / "checkpoints").symlink_to(Path(small_run) / "checkpoints")
    result = export(run.uri, str(tmp_path / "b"), num_golden=4)
    assert result.parity.num_golden == 4
    assert result.parity.top1_agreement == 1
    assert all(max(decode(encoded).shape) <= 1100 for encoded in Bundle.load(result.bundle).golden_examples().encoded)


def test_a_model_with_another_input_than_the_image_is_refused() -> None:
    import keras

    unnamed = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    unnamed(np.zeros((1, 4), np.float32))
    with pytest.raises(BundleError, match="expected one of uint8, named 'image'"):
        to_onnx(unnamed)


def test_a_run_that_preprocesses_the_stored_images_further_is_compared_on_what_its_model_takes(
    small_run: str, tmp_path: Path
) -> None:
    trained = Run.open(small_run)
    extra = Preprocessing.for_size(24, 20, "pad")
    smaller = Preprocessing.for_size(16, 12)
    run = dataclasses.replace(
        trained,
        uri=str(tmp_path / "run"),
        preprocessing=trained.preprocessing.then(smaller).then(extra),
        extra_preprocessing=smaller.then(extra),
    )
    run.save()
    (tmp_path / "run" / "checkpoints").symlink_to(Path(small_run) / "checkpoints")
    result = export(run.uri, str(tmp_path / "b"))
    assert result.parity.top1_agreement == 1
    values = json.loads((tmp_path / "b" / INFO_NAME).read_text())
    assert values["preprocessing_fingerprint"] == run.preprocessing.fingerprint


def test_int8_is_published_with_its_accuracy_beside_float32_and_really_computes_in_it(
    small_run: str, small_bundle: str, val_images: np.ndarray, tmp_path: Path
) -> None:
    result = export(small_run, str(tmp_path / "b"), precision="int8")
    float32, int8 = result.candidates[0], result.candidates[-1]
    assert (float32.precision, int8.precision, int8.refusal) == ("float32", "int8", "")
    accuracy = result.accuracy
    assert (accuracy.split, accuracy.num_images, accuracy.labelled) == ("val", 45, True)
    assert accuracy.accuracy >= accuracy.float32 - 0.005
    # 45 images can't show half a point, and the result says so.
    assert accuracy.loss_points_high > 0.5
    predictor = Predictor.load(str(tmp_path / "b"))
    info = predictor.bundle.info
    assert (info.precision, predictor.backend.precision) == ("int8", "int8")
    assert info.backend == predictor.backend.name == int8.backend
    assert info.parity["accuracy"]["num_images"] == 45
    served, trained = predictor.logits(val_images), Predictor.load(small_bundle).logits(val_images)
    difference = np.abs(served - trained).max()
    assert 1e-4 < difference <= predictor.logit_tolerance(trained)
    assert {timing["precision"] for timing in info.timings} == {"int8"}


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime"])
def test_both_backends_serve_int8(small_run: str, tmp_path: Path, backend: Any) -> None:
    result = export(small_run, str(tmp_path / "b"), precision="int8", backend=backend)
    predictor = Predictor.load(str(tmp_path / "b"), backend)
    assert (result.backend, predictor.backend.name, predictor.backend.precision) == (backend, backend, "int8")


def test_int8_that_costs_accuracy_is_refused_and_auto_serves_another_precision_and_says_why(
    small_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Ranges that were seen on black images fit no others: the quantizer and what it makes are real.
    real = export_module.calibration_images
    monkeypatch.setattr(export_module, "calibration_images", lambda *arguments: np.zeros_like(real(*arguments)))
    with pytest.raises(BundleError, match=r"int8.*(0\.5 are allowed|is allowed in int8|at export)"):
        export(small_run, str(tmp_path / "b"), precision="int8")
    assert list(tmp_path.iterdir()) == []
    result = export(small_run, str(tmp_path / "b"), precision="auto")
    assert result.precision in ("float32", "bfloat16")
    refused = [each for each in result.candidates if each.precision == "int8"]
    # Once whole, and once with the first and the last layer in float32.
    assert [bool(each.refusal) for each in refused] == [True, True]
    assert "float32" in refused[1].note
    assert Predictor.load(str(tmp_path / "b")).bundle.info.precision == result.precision


def test_auto_measures_all_precisions_and_serves_one_that_passes(small_run: str, tmp_path: Path) -> None:
    result = export(small_run, str(tmp_path / "b"), precision="auto")
    assert {each.precision for each in result.candidates} == {"float32", "bfloat16", "int8"}
    (served,) = [each for each in result.candidates if each.precision == result.precision and not each.refusal]
    assert served.milliseconds > 0
    assert served.accuracy == result.accuracy
    assert result.accuracy.loss_points <= 0.5


def test_images_for_calibration_are_none_of_those_that_measure_accuracy(small_run: str, small_dataset: str) -> None:
    trained = Run.open(small_run)
    sample = held_out_sample(small_dataset, trained, 1000, 3)
    assert (sample.split, len(sample.inputs), len(sample.stored)) == ("val", 45, 3)
    assert len(calibration_images(small_dataset, trained, sample, 1000)) == 96
    for split, num_train in (("train", 96), ("test", 96)):
        taken = dataclasses.replace(sample, split=split, indices=np.arange(0, 96, 2))
        rest = calibration_images(small_dataset, trained, taken, 1000)
        assert len(rest) == (num_train if split != "train" else 48)


def test_a_dataset_that_is_all_held_out_has_no_images_to_calibrate_on(small_run: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    for index in range(6):
        path = tmp_path / "photos" / ("red", "green", "blue")[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), draw.integers(0, 255, (24, 20, 3), dtype=np.uint8))
    dataset = str(tmp_path / "dataset")
    settings = IngestSettings(val=0.0, test=0.0)
    ingest(str(tmp_path / "photos"), dataset, settings=settings, engine=create_engine("inline"))
    with pytest.raises(DatasetError, match="no images left to calibrate"):
        export(small_run, str(tmp_path / "b"), precision="int8", dataset=dataset)


def _paired(num_images: int, lost: int, gained: int) -> Accuracy:
    labels = np.zeros(num_images, np.int64)
    reference = np.tile(np.float32([1, 0]), (num_images, 1))
    found = reference.copy()
    reference[lost : lost + gained] = found[:lost] = [0, 1]
    sample = Sample("val", np.arange(num_images), [], np.zeros((num_images, 1, 1, 1), np.uint8), labels)
    return compare_accuracy(sample, reference, found)


def test_a_loss_is_counted_image_by_image_and_few_images_say_that_they_show_little() -> None:
    accuracy = _paired(1000, lost=9, gained=4)
    assert (accuracy.num_lost, accuracy.num_gained) == (9, 4)
    assert accuracy.loss_points == pytest.approx(0.5)
    assert accuracy.float32 - accuracy.accuracy == pytest.approx(0.005)
    assert 0.5 < accuracy.loss_points_high < 1.5
    assert _paired(45, 0, 0).loss_points_high > 3 > 0.5 > _paired(1000, 0, 0).loss_points_high > 0
    assert _paired(1000, 0, 9).loss_points == pytest.approx(-0.9)


def test_without_labels_the_answers_of_float32_stand_for_them() -> None:
    reference = np.float32([[1, 0], [0, 1]])
    sample = Sample("val", np.arange(2), [], np.zeros((2, 1, 1, 1), np.uint8), None)
    accuracy = compare_accuracy(sample, reference, reference[::-1])
    assert (accuracy.labelled, accuracy.float32, accuracy.accuracy) == (False, 1.0, 0.0)


def test_a_model_that_cannot_be_quantized_is_said_so_and_auto_goes_on_without_int8(
    small_run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Images of another shape: the calibration of the real library fails on them.
    monkeypatch.setattr(export_module, "calibration_images", lambda *_: np.zeros((3, 5, 5, 3), np.uint8))
    with pytest.raises(BundleError, match="can't be quantized to int8"):
        export(small_run, str(tmp_path / "b"), precision="int8")
    assert list(tmp_path.iterdir()) == []
    assert export(small_run, str(tmp_path / "b"), precision="auto").precision != "int8"


def test_the_command_prints_speed_and_accuracy_of_every_precision_and_what_the_sample_can_show(
    small_run: str, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from manyeyes.cli.main import app

    for precision in ("float32", "int8", "auto"):
        arguments = ["export", small_run, str(tmp_path / precision), "--precision", precision]
        done = CliRunner().invoke(app, arguments, env={"COLUMNS": "200", "TERM": "dumb"})
        assert done.exit_code == 0, done.output
        assert "ms, one image" in done.output
        assert "right on val" in done.output
        assert f"Accuracy in {'' if precision == 'auto' else precision}" in done.output
        assert done.output.count("served") == 1
        for each in {"float32"} | {"float32": set(), "int8": {"int8"}, "auto": {"bfloat16", "int8"}}[precision]:
            assert each in done.output
        if precision == "int8":
            assert "more images than 45 would be needed" in done.output
