"""The door to the models: `build(ModelConfig(...))` gives a Keras model from raw pixels to logits.

Importing this module does not import keras, so that settings and names can be used without it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from manyeyes import config as settings
from manyeyes.errors import ConfigError, MissingExtraError, UsageError

if TYPE_CHECKING:
    import keras

Precision = Literal["float32", "bfloat16", "float16", "float64"]

_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16", "float64": "float64"}
_APPLICATIONS = "applications"
_LITE0 = "efficientnet_lite0"
_KERAS_PREFIX = "keras:"
_HEAD_LAYERS = ("head_dropout", "logits")


@dataclass(frozen=True)
class ModelConfig:
    """Which model, and its settings.

    Attributes:
        name: one of MODEL_NAMES, or `keras:<Name>` for a model of keras.applications.
        input_shape: (height, width, channels); the trainer takes it from the dataset.
        num_classes: the trainer takes it from the dataset.
        dropout: share of the features dropped in front of the last layer in training.
        weights: "none", "imagenet", or the path or URI of a .safetensors file of this model.
        options: settings of this model alone, e.g. {"width": 32}; `describe` lists them.
    """

    name: str = "cnn"
    input_shape: tuple[int, int, int] | None = None
    num_classes: int | None = None
    dropout: float = 0.0
    weights: str = "none"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout={self.dropout} is not possible. Use a share from 0 to below 1.")


@dataclass(frozen=True)
class ModelInfo:
    """What there is to know about a model before it is built.

    Attributes:
        name: the name in ModelConfig.
        description: one line for people.
        default_input_size: a size in pixels that suits the model.
        min_size: the smallest side in pixels that the model takes with its default options.
        resize_short: the shorter side before the central crop of default_input_size, or None to cover it just so.
        needs_extra: the extra that weights="imagenet" needs, or None.
        options: names and default values of the settings of this model alone.
    """

    name: str
    description: str
    default_input_size: int
    min_size: int
    resize_short: int | None = None
    needs_extra: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


class _Entry(NamedTuple):
    """A row of the table; `function` is of `module`, or of keras.applications where that is the module."""

    module: str
    function: str
    options: str
    description: str
    default_input_size: int
    min_size: int
    resize_short: int | None = None
    needs_extra: str | None = None


# fmt: off
_ENTRIES = {
    "cnn": _Entry("cnn", "cnn", "CnnOptions", "small fast CNN for small images", 28, 4),
    "resnet18": _Entry("resnet", "resnet18", "ResNetOptions", "residual network of 18 layers", 32, 8),
    "resnet34": _Entry("resnet", "resnet34", "ResNetOptions", "residual network of 34 layers", 32, 8),
    "resnet50": _Entry("resnet", "resnet50", "ResNetOptions", "residual network of 50 layers", 224, 8, 256),
    "mobilenet_v2": _Entry(
        _APPLICATIONS, "MobileNetV2", "MobileNetV2Options", "MobileNetV2 of keras.applications", 224, 32, 256),
    "efficientnet_b0": _Entry(
        _APPLICATIONS, "EfficientNetB0", "Options", "EfficientNet-B0 of keras.applications", 224, 32, 256),
    "efficientnet_lite0": _Entry(
        _LITE0, "efficientnet_lite0", "Options", "EfficientNet-Lite0, whose ImageNet weights are a package",
        224, 32, 256, "pretrained"),
    "gru": _Entry("rnn", "gru", "RnnOptions", "GRU over the rows of the image", 28, 1),
    "lstm": _Entry("rnn", "lstm", "RnnOptions", "LSTM over the rows of the image", 28, 1),
    "crnn": _Entry("rnn", "crnn", "CrnnOptions", "convolutions, then a bidirectional GRU over the columns", 28, 4),
}
# fmt: on

MODEL_NAMES = tuple(_ENTRIES)


def describe(name: str) -> ModelInfo:
    """Tell about the model `name`.

    Raises:
        UsageError: there is no such model; the nearest names are given.
        MissingExtraError: Keras is not installed.
    """
    entry = _entry(name)
    options_class = getattr(_import(entry.module), entry.options)
    return ModelInfo(
        name,
        entry.description,
        entry.default_input_size,
        entry.min_size,
        entry.resize_short,
        entry.needs_extra,
        settings.to_dict(options_class()),
    )


def input_size(name: str) -> tuple[int, int | None]:
    """The size in pixels that suits a model, and the shorter side before the central crop of it (see ModelInfo).

    Loads no Keras for the models of MODEL_NAMES. Raises as `describe` does.
    """
    entry = _entry(name)
    return entry.default_input_size, entry.resize_short


def build(config: ModelConfig, precision: Precision = "float32") -> keras.Model:
    """Make the model.

    Its input is "image", uint8 (N, height, width, channels); its output is "logits", float32 (N, num_classes), without
    softmax. Pixels are normalised inside. Initial weights follow keras.utils.set_random_seed.

    Args:
        config: input_shape and num_classes must be set.
        precision: of the arithmetic; bfloat16 and float16 keep weights, normalisation and logits in float32, float64
            computes all in float64, logits too.

    Raises:
        UsageError: unknown name, or an input size or weights that the model can't take.
        ConfigError: an unknown option or one of the wrong type.
        MissingExtraError: a library that the model needs is not installed.
    """
    if config.input_shape is None or config.num_classes is None:
        raise UsageError(
            "A model can't be built without input_shape and num_classes. Set both, e.g. (28, 28, 1) and 10."
        )
    if min(config.input_shape) < 1:
        raise UsageError(f"input_shape={config.input_shape} is empty. Use (height, width, channels), all at least 1.")
    if config.num_classes < 2:
        raise UsageError(f"num_classes={config.num_classes} leaves nothing to tell apart. Use at least 2 classes.")
    entry = _entry(config.name)
    module = _import(entry.module)
    options = settings.from_dict(getattr(module, entry.options), config.options, "model.options")
    imagenet = config.weights == "imagenet"
    if imagenet and entry.module not in (_APPLICATIONS, _LITE0):
        raise UsageError(
            f"There are no ImageNet weights for {config.name}. Use weights='none', or the model efficientnet_lite0."
        )
    keras = _import_keras()
    with _dtype_policy(_POLICIES[precision]):
        image = keras.Input(config.input_shape, dtype="uint8", name="image")
        if entry.module == _APPLICATIONS:
            features = module.features(entry.function, config.name, image, options, imagenet=imagenet)
        else:
            features = getattr(module, entry.function)(image, options)
        if config.dropout:
            features = keras.layers.Dropout(config.dropout, name="head_dropout")(features)
        logits_dtype = "float64" if precision == "float64" else "float32"
        logits = keras.layers.Dense(config.num_classes, dtype=logits_dtype, name="logits")(features)
        model = keras.Model(image, logits, name=config.name.replace(":", "_"))
    if imagenet and entry.module == _LITE0:
        module.load_imagenet(model)
    elif config.weights not in ("none", "imagenet"):
        _import("weights").load(model, config.weights, head="logits")
    return model


def head_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers behind the features: dropout and logits."""
    return [layer for layer in model.layers if layer.name in _HEAD_LAYERS]


def backbone_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """The layers that make the features: all but the head."""
    return [layer for layer in model.layers if layer.name not in _HEAD_LAYERS]


def set_backbone_trainable(model: keras.Model, trainable: bool, *, norms: bool = True) -> None:
    """Freeze or unfreeze all but the head; a frozen batch normalisation uses its stored statistics also in training.

    A step that was traced before keeps the old choice: trace it anew.

    Args:
        norms: False leaves batch normalisations frozen: a few small batches of new images would spoil the statistics
            that pretrained weights were made with.
    """
    for layer in backbone_layers(model):
        layer.trainable = trainable
        if not norms:
            _freeze_norms(layer)


def _freeze_norms(layer: keras.layers.Layer) -> None:
    # By name: the registry itself loads no Keras.
    if type(layer).__name__ == "BatchNormalization":
        layer.trainable = False
    for inner in getattr(layer, "layers", ()):
        _freeze_norms(inner)


def _entry(name: str) -> _Entry:
    if name in _ENTRIES:
        return _ENTRIES[name]
    applications = _import(_APPLICATIONS)
    application = name.removeprefix(_KERAS_PREFIX)
    if application in applications.names():
        smallest = applications.min_size(application)
        return _Entry(_APPLICATIONS, application, "Options", f"{application} of keras.applications", 224, smallest, 256)
    near = difflib.get_close_matches(application, [*MODEL_NAMES, *applications.names()], n=3)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known: {', '.join(MODEL_NAMES)}."
    raise UsageError(f"There is no model {name!r}. {hint}")


def _import(module: str) -> Any:
    _import_keras()
    return importlib.import_module(f"manyeyes.models.{module}")


def _import_keras() -> Any:
    try:
        return importlib.import_module("keras")
    except ModuleNotFoundError:
        raise MissingExtraError("Building a model", "train") from None


@contextlib.contextmanager
def _dtype_policy(policy: str) -> Iterator[None]:
    """keras.applications take no policy as an argument, so the global one is set while a model is built."""
    keras = _import_keras()
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)
