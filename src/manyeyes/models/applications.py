"""The models of keras.applications, taking raw uint8 pixels like all the others."""

from __future__ import annotations

import contextlib
import inspect
import sys
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras.src.utils.naming import reset_uids

from manyeyes.errors import UsageError
from manyeyes.models import layers
from manyeyes.models.layers import Options

__all__ = ["MobileNetV2Options", "Options", "features", "min_size", "names"]

_MIN_SIZES = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}
_DEFAULT_MIN_SIZE = 32
# These begin with a scaling of [0, 255] that can't be left out.
_SCALES_INSIDE = "EfficientNetB"


@dataclass(frozen=True)
class MobileNetV2Options(Options):
    """Settings of `mobilenet_v2`.

    Attributes:
        width: factor on the filters of every layer.
    """

    width: float = 1.0


def names() -> list[str]:
    """The names in keras.applications, e.g. DenseNet121."""
    return sorted(name for name, value in vars(keras.applications).items() if inspect.isfunction(value))


def min_size(application: str) -> int:
    """The smallest side in pixels that the application takes."""
    return _MIN_SIZES.get(application, _DEFAULT_MIN_SIZE)


def features(application: str, name: str, image: Any, options: Options, *, imagenet: bool) -> Any:
    """Put an application, without its top, on uint8 images (N, H, W, C); returns pooled features (N, F).

    Args:
        application: its name in keras.applications.
        name: what the user calls the model.
        options: of this model.
        imagenet: take the weights that keras.applications fetches from the internet.

    Raises:
        UsageError: the image is too small, has not three channels but the weights do, or the weights can't be fetched.
    """
    layers.require_size(name, image, min_size(application))
    arguments: dict[str, Any] = {"alpha": options.width} if isinstance(options, MobileNetV2Options) else {}
    function = getattr(keras.applications, application)
    pixels = keras.layers.Rescaling(1.0, dtype="float32", name="pixels")(image)
    if imagenet:
        layers.require_channels(f"{name} with ImageNet weights", image, 3)
        pixels = sys.modules[function.__module__].preprocess_input(pixels)
    elif "include_preprocessing" in inspect.signature(function).parameters:
        # The scaling inside is made for three channels and runs in the precision of the model.
        arguments["include_preprocessing"] = False
        pixels = layers.normalise(image)
    elif not application.startswith(_SCALES_INSIDE):
        pixels = layers.normalise(image)
    # Some applications leave names to Keras, which counts what the process built before: weights would change names.
    # There is no public way to count anew but clear_session, which drops much more.
    reset_uids()
    arguments["weights"] = "imagenet" if imagenet else None
    try:
        # Keras tells of a download on standard output, which belongs to results.
        with contextlib.redirect_stdout(sys.stderr):
            base = function(include_top=False, input_tensor=pixels, pooling="avg", **arguments)
    except Exception as error:
        if not imagenet:
            raise
        # Keras raises a bare Exception where the download fails.
        raise UsageError(
            f"The ImageNet weights of {name} can't be fetched ({str(error).splitlines()[0]}). "
            "Use weights='none', a .safetensors file, or the model efficientnet_lite0, whose weights are a package."
        ) from None
    return _adapt(base, image).output


def _adapt(base: keras.Model, image: Any) -> keras.Model:
    """Scale pixels in float32 by constants, and let the statistics of norms follow short trainings."""
    if any(isinstance(layer, keras.layers.Normalization) for layer in base.layers):
        # Some applications have their input in a list, some bare.
        inputs = keras.tree.map_structure(lambda _: image, base.input)
        clone = keras.models.clone_model(base, input_tensors=inputs, clone_function=_without_normalization)
        for layer, copy in zip(base.layers, clone.layers, strict=True):
            if copy.weights:
                copy.set_weights(layer.get_weights())
        base = clone
    for layer in base.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = layers.NORM_MOMENTUM
        if isinstance(layer, keras.layers.Rescaling):
            layer.dtype_policy = keras.DTypePolicy("float32")
    return base


def _without_normalization(layer: keras.layers.Layer) -> keras.layers.Layer:
    """A copy of the layer; of a Normalization, the Rescaling that does the same.

    Normalization keeps mean and variance as tensors beside its weights: an export makes them inputs of the ONNX graph,
    and its weights have names that depend on the models built before.
    """
    if not isinstance(layer, keras.layers.Normalization):
        return type(layer).from_config(layer.get_config())
    mean, deviation = (np.ravel(keras.ops.convert_to_numpy(value)) for value in (layer.mean, layer.variance**0.5))
    scale, offset = (1 / deviation).tolist(), (-mean / deviation).tolist()
    return keras.layers.Rescaling(scale, offset, dtype="float32", name="normalization")
