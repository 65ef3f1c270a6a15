"""Post-training quantization of an exported model: int8 weights and activations, with ranges seen on real images."""

from __future__ import annotations

import contextlib
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from manyeyes.errors import BundleError
from manyeyes.recognition.bundle import INPUT_NAME

# Enough for the ranges of activations, which are all that is learnt from them.
NUM_CALIBRATION_IMAGES = 128
_BATCH_SIZE = 8
# What the arithmetic of a model is spent on.
_HEAVY = ("Conv", "MatMul", "Gemm")


def quantize(model: bytes, images: np.ndarray, *, float_ends: bool = False) -> bytes:
    """Quantize an ONNX model to int8: weights by the channel and symmetric, activations by the tensor and not.

    The result says by QuantizeLinear and DequantizeLinear nodes what is int8, which both backends understand.

    Args:
        model: a float32 model as `to_onnx` makes it.
        images: uint8 (n, height, width, channels), for the ranges of the activations.
        float_ends: keep the first and the last layer in float32; they are the most sensitive.

    Raises:
        BundleError: the library can't quantize this model.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), _quiet_root_logger():
        warnings.simplefilter("ignore")
        source, prepared, target = (Path(folder) / name for name in ("float32.onnx", "prepared.onnx", "int8.onnx"))
        source.write_bytes(model)
        try:
            # Merges normalisation into convolutions, so that it is not rounded by itself.
            quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
            heavy = [node.name for node in onnx.load(str(prepared)).graph.node if node.op_type in _HEAVY]
            quantize_static(
                str(prepared),
                str(target),
                _reader(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
                nodes_to_exclude=[heavy[0], heavy[-1]] if float_ends and heavy else [],
            )
        except Exception as error:  # of many kinds, by the operators of the model
            raise BundleError(f"The model can't be quantized to int8: {error!r}") from error
        return target.read_bytes()


def _reader(images: np.ndarray) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._starts = iter(range(0, len(images), _BATCH_SIZE))

        def get_next(self) -> dict[str, np.ndarray] | None:
            start = next(self._starts, None)
            return None if start is None else {INPUT_NAME: images[start : start + _BATCH_SIZE]}

    return Reader()


@contextlib.contextmanager
def _quiet_root_logger() -> Iterator[None]:
    # Through it the library advises to do what is being done.
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
