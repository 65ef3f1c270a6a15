"""Runs an ONNX model on this machine's CPU by OpenVINO or ONNX Runtime, behind one small interface."""

from __future__ import annotations

import logging
import threading
from typing import Any, Protocol

import numpy as np

from manyeyes.engines.base import threads_per_worker
from manyeyes.errors import BundleError, MissingExtraError, UsageError
from manyeyes.recognition.bundle import BackendName, Precision

_log = logging.getLogger(__name__)


class Backend(Protocol):
    """A compiled model.

    Attributes:
        name: "openvino" or "onnxruntime".
        precision: of its arithmetic; "int8" where the convolutions and matrix products of a quantized model run in it.
        num_threads: that one call uses.
        input_shape: (height, width, channels).
    """

    name: str
    precision: Precision
    num_threads: int
    input_shape: tuple[int, int, int]

    def run(self, images: np.ndarray) -> np.ndarray:
        """Map uint8 (n, height, width, channels) to float32 logits (n, classes); safe to call from several threads."""
        ...


class OpenVINOBackend:
    """OpenVINO on the CPU."""

    name = "openvino"

    def __init__(self, model: bytes, precision: Precision, num_threads: int) -> None:
        import openvino

        core = openvino.Core()
        # Unless told otherwise OpenVINO takes bfloat16 where the CPU has it, silently.
        properties = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32",
            "INFERENCE_NUM_THREADS": num_threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._model = core.compile_model(core.read_model(model), "CPU", properties)
        self._tensor = openvino.Tensor
        self.precision: Precision = _openvino_precision(self._model, quantized=precision == "int8")
        self.num_threads = num_threads
        shape = self._model.input(0).partial_shape
        self.input_shape = _checked_shape([d.get_length() if d.is_static else None for d in shape])
        self._local = threading.local()

    def run(self, images: np.ndarray) -> np.ndarray:
        """See Backend.run."""
        # An infer request serves one thread at a time, so each thread has its own.
        request = getattr(self._local, "request", None)
        if request is None:
            request = self._local.request = self._model.create_infer_request()
        # A tensor over the caller's memory, and the output read where it lies: of a small model's 0.18 ms this saves
        # 0.04, which `infer` spends on looking at its arguments and on a dictionary of results.
        request.infer(self._tensor(images, shared_memory=True), share_outputs=True)
        logits: np.ndarray = request.get_output_tensor(0).data
        return logits.astype(np.float32, copy=True)


def _openvino_precision(model: Any, quantized: bool) -> Precision:
    """In what a compiled model computes: what was asked for is no more than a hint."""
    if quantized:
        for operation in model.get_runtime_model().get_ops():
            told = {key: str(operation.get_rt_info()[key].astype(str)) for key in ("layerType", "runtimePrecision")}
            if told["layerType"] in ("Convolution", "FullyConnected") and told["runtimePrecision"] in ("u8", "i8"):
                return "int8"
        return "float32"
    hint = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    return "bfloat16" if hint == "bf16" else "float32"


class OnnxRuntimeBackend:
    """ONNX Runtime on the CPU: float32, or int8 where the model was quantized; it has no bfloat16 there."""

    name = "onnxruntime"

    def __init__(self, model: bytes, precision: Precision, num_threads: int) -> None:
        import onnxruntime

        self.precision: Precision = "int8" if precision == "int8" else "float32"
        self.num_threads = num_threads

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        model_input = self._session.get_inputs()[0]
        self._input_name = model_input.name
        self.input_shape = _checked_shape([d if isinstance(d, int) else None for d in model_input.shape])

    def run(self, images: np.ndarray) -> np.ndarray:
        """See Backend.run."""
        (logits,) = self._session.run(None, {self._input_name: images})
        return logits.astype(np.float32, copy=False)


def create_backend(
    model: bytes, *, backend: BackendName = "auto", precision: Precision = "float32", num_threads: int | None = None
) -> Backend:
    """Compile an ONNX model for this machine.

    Args:
        model: the ONNX file.
        backend: "auto" is OpenVINO where it is installed and can compile the model, else ONNX Runtime, without
            measuring (see selection.select_backend).
        precision: "bfloat16" is used where the backend and the CPU have it; the result's `precision` says what is used.
            "int8" says that the model was quantized.
        num_threads: default: what the engine gave to this process, else all cores.

    Raises:
        MissingExtraError: the backend is not installed.
        BundleError: the backend can't compile the model.
        UsageError: no such backend.
    """
    threads = num_threads or threads_per_worker()
    if backend not in ("auto", "openvino", "onnxruntime"):
        raise UsageError(f"Unknown backend {backend!r}. Choose one of: auto, openvino, onnxruntime.")
    refusals: list[str] = []
    num_missing = 0
    candidates = ("openvino", "onnxruntime") if backend == "auto" else (backend,)
    for name in candidates:
        try:
            return (
                OpenVINOBackend(model, precision, threads)
                if name == "openvino"
                else OnnxRuntimeBackend(model, precision, threads)
            )
        except ImportError:
            num_missing += 1
        except BundleError:
            raise
        except Exception as error:  # each backend has exception types of its own
            refusals.append(f"{name}: {_in_one_line(error)}")
            _log.info("%s can't compile the model: %s", name, error)
    if num_missing == len(candidates):
        raise MissingExtraError("Running a model" if backend == "auto" else f"The backend {backend}", "predict")
    raise BundleError(f"The model can't be compiled. {'; '.join(refusals)}")


def _checked_shape(dimensions: list[Any]) -> tuple[int, int, int]:
    if len(dimensions) != 4 or None in dimensions[1:]:
        raise BundleError(f"The model's input has shape {dimensions}; expected (any, height, width, channels).")
    height, width, channels = dimensions[1:]
    return height, width, channels


def _in_one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(("Exception from", "Check '", "To facilitate"))]
    return " ".join(told)[:200] or repr(error)
