from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from manyeyes.errors import ConfigError, UsageError
from manyeyes.models.registry import (
    MODEL_NAMES,
    ModelConfig,
    backbone_layers,
    build,
    describe,
    head_layers,
    set_backbone_trainable,
)

keras = pytest.importorskip("keras")

SMALL_OPTIONS = {
    "cnn": {"width": 4},
    "gru": {"units": 8},
    "lstm": {"units": 8},
    "crnn": {"width": 4, "units": 8},
    "resnet18": {"width": 4},
    "resnet34": {"width": 4},
    "resnet50": {"width": 4},
    "mobilenet_v2": {"width": 0.35},
}
SLOW = ("resnet34", "resnet50", "mobilenet_v2", "efficientnet_b0", "efficientnet_lite0")
ALL_NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODEL_NAMES]
# The deeper ResNets are the same blocks again, and the deepest graphs take minutes.
SOME_NAMES = [parameter for parameter in ALL_NAMES if parameter.values[0] not in ("resnet34", "resnet50")]


def small(name: str, size: int | None = None, channels: int = 3, num_classes: int = 3) -> ModelConfig:
    size = size or describe(name).min_size
    return ModelConfig(name, (size, size, channels), num_classes, options=SMALL_OPTIONS.get(name, {}))


def random_images(config: ModelConfig, count: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *config.input_shape), dtype=np.uint8)


def train(model: keras.Model, images: np.ndarray, labels: np.ndarray, num_steps: int, rate: float = 0.01) -> None:
    import tensorflow as tf

    # Eager: tracing a deep network takes longer than a few steps of it.
    optimizer = keras.optimizers.SGD(rate)
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    optimizer.build(model.trainable_variables)
    for _ in range(num_steps):
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_model_takes_pixels_of_its_smallest_size_and_gives_float32_logits(name: str) -> None:
    config = small(name)
    model = build(config)

    logits = model(random_images(config))

    assert [layer.name for layer in model.inputs] == ["image"]
    assert model.output_names == ["logits"]
    assert keras.backend.standardize_dtype(model.inputs[0].dtype) == "uint8"
    assert tuple(logits.shape) == (4, 3)
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert np.isfinite(logits.numpy()).all()


@pytest.mark.parametrize("name", [name for name in MODEL_NAMES if name not in ("gru", "lstm")])
def test_a_smaller_image_is_refused_with_the_smallest_size_that_works(name: str) -> None:
    smallest = describe(name).min_size

    with pytest.raises(UsageError, match=f"at least {smallest} x {smallest}"):
        build(small(name, smallest - 1))


@pytest.mark.parametrize("name", SOME_NAMES)
def test_training_moves_every_trainable_weight(name: str) -> None:
    keras.utils.set_random_seed(0)
    config = small(name, max(describe(name).min_size, 16))
    model = build(config)
    before = [variable.numpy() for variable in model.trainable_variables]

    # Three steps, because the last gamma of a residual block starts at zero and holds back the gradient of the first.
    train(model, random_images(config, 8), np.arange(8) % 3, num_steps=3, rate=0.1)

    still = [
        variable.path
        for variable, value in zip(model.trainable_variables, before, strict=True)
        if np.array_equal(variable.numpy(), value)
    ]
    assert still == []


@pytest.mark.parametrize("name", SOME_NAMES)
def test_the_exported_model_gives_the_same_logits_without_keras(name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("tf2onnx")
    keras.utils.set_random_seed(1)
    config = small(name, max(describe(name).min_size, 16), channels=3)
    model = build(config)
    train(model, random_images(config, 8), np.arange(8) % 3, num_steps=1)
    images = random_images(config, 5, seed=7)
    expected = model(images).numpy()
    path = str(tmp_path / "model.onnx")

    model.export(path, format="onnx", verbose=False)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (pixels,) = session.get_inputs()
    assert pixels.type == "tensor(uint8)"
    np.testing.assert_allclose(session.run(None, {pixels.name: images})[0], expected, rtol=1e-5, atol=1e-5)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(images)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_sequence_too_long_to_unroll_still_exports_to_onnx(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("tf2onnx")
    config = ModelConfig("gru", (80, 8, 1), 3, options={"units": 8})
    model = build(config)
    images = random_images(config)
    expected = model(images).numpy()

    model.export(str(tmp_path / "model.onnx"), format="onnx", verbose=False)

    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(None, {session.get_inputs()[0].name: images})[0]
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["cnn", "crnn", "resnet18"])
def test_the_same_seed_gives_the_same_model_and_logits(name: str) -> None:
    config = small(name, 16)
    images = random_images(config)

    def logits() -> np.ndarray:
        keras.utils.set_random_seed(5)
        return build(config)(images).numpy()

    np.testing.assert_array_equal(logits(), logits())


@pytest.mark.parametrize("name", [*ALL_NAMES, pytest.param("keras:Xception", marks=pytest.mark.slow)])
def test_weight_names_do_not_depend_on_what_was_built_before(name: str) -> None:
    config = small(name)

    first, second = ([variable.path for variable in build(config).weights] for _ in range(2))

    assert first == second
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("name", ["cnn", "gru", "lstm", "crnn", "resnet18"])
def test_bfloat16_keeps_the_weights_and_the_logits_in_float32(name: str) -> None:
    config = small(name, 16)
    exact, rounded = build(config), build(config, "bfloat16")
    rounded.set_weights(exact.get_weights())
    images = random_images(config)

    logits = rounded(images)

    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    assert {keras.backend.standardize_dtype(variable.dtype) for variable in rounded.trainable_variables} == {"float32"}
    assert any(layer.compute_dtype == "bfloat16" for layer in rounded.layers)
    np.testing.assert_allclose(logits, exact(images), atol=0.03)


def test_building_in_another_precision_leaves_the_global_one_alone() -> None:
    before = keras.config.dtype_policy()

    build(small("cnn"), "bfloat16")
    with pytest.raises(UsageError):
        build(small("cnn", 1), "bfloat16")

    assert keras.config.dtype_policy() == before


def test_float64_computes_logits_in_float64() -> None:
    config = small("cnn", 16)

    assert keras.backend.standardize_dtype(build(config, "float64")(random_images(config)).dtype) == "float64"


@pytest.mark.parametrize("name", ["cnn", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_a_frozen_backbone_keeps_its_weights_and_statistics_while_the_head_learns(name: str) -> None:
    config = small(name, 32)
    model = build(config)
    set_backbone_trainable(model, False)
    frozen = [value for layer in backbone_layers(model) for value in layer.get_weights()]
    (head,) = head_layers(model)
    before = head.get_weights()

    train(model, random_images(config, 8), np.arange(8) % 3, num_steps=2)

    after = [value for layer in backbone_layers(model) for value in layer.get_weights()]
    for was, now in zip(frozen, after, strict=True):
        np.testing.assert_array_equal(was, now)
    assert not all(np.array_equal(was, now) for was, now in zip(before, head.get_weights(), strict=True))
    set_backbone_trainable(model, True)
    assert len(model.trainable_variables) > 2


def test_dropout_belongs_to_the_head() -> None:
    model = build(ModelConfig("cnn", (8, 8, 1), 3, dropout=0.5, options={"width": 4}))

    assert [layer.name for layer in head_layers(model)] == ["head_dropout", "logits"]
    assert set(head_layers(model)).isdisjoint(backbone_layers(model))


def test_grey_images_are_taken_where_nothing_was_trained_on_colour() -> None:
    for name in ("cnn", "gru", "resnet18"):
        assert build(small(name, 16, channels=1)).output.shape == (None, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["keras:DenseNet121", "MobileNetV3Small", "keras:ResNet50V2"])
def test_any_model_of_keras_applications_is_built_by_its_name(name: str) -> None:
    config = small(name, 32, channels=1)

    logits = build(config)(random_images(config))

    assert tuple(logits.shape) == (4, 3)
    assert describe(name).min_size == 32


def test_an_application_with_larger_strides_says_its_own_smallest_size() -> None:
    with pytest.raises(UsageError, match="at least 71 x 71"):
        build(small("keras:Xception", 64))


def test_an_unknown_model_is_answered_with_the_nearest_names() -> None:
    with pytest.raises(UsageError, match="resnet18"):
        build(ModelConfig("resnet19", (32, 32, 3), 2))
    with pytest.raises(UsageError, match="Known: cnn, "):
        describe("qqqq")


def test_an_unknown_option_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match=r"widht.*Did you mean width"):
        build(ModelConfig("cnn", (28, 28, 1), 2, options={"widht": 8}))
    with pytest.raises(ConfigError, match="width"):
        build(ModelConfig("cnn", (28, 28, 1), 2, options={"width": 0}))


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig("cnn"),
        ModelConfig("cnn", (28, 28, 1), 1),
        ModelConfig("cnn", (28, 0, 1), 2),
        ModelConfig("cnn", (28, 28, 1), 2, weights="imagenet"),
    ],
)
def test_settings_that_make_no_model_are_refused_in_one_line(config: ModelConfig) -> None:
    with pytest.raises(UsageError) as caught:
        build(config)

    assert "\n" not in str(caught.value)


def test_a_dropout_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="dropout"):
        ModelConfig(dropout=1.0)


def test_options_are_described_with_their_defaults() -> None:
    info = describe("gru")

    assert info.options["units"] == 128
    assert describe("efficientnet_lite0").resize_short == 256
    assert describe("efficientnet_lite0").needs_extra == "pretrained"


def test_a_gru_has_the_parameters_of_its_formula() -> None:
    model = build(ModelConfig("gru", (4, 6, 1), 2, options={"units": 5}))

    # GRU: three gates of (inputs + state) x units and two biases; then the logits.
    assert model.count_params() == 3 * (6 * 5 + 5 * 5 + 2 * 5) + 5 * 2 + 2
