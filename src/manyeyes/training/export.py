"""From a run to a bundle: ONNX, golden examples, and the proof that what is served answers as what was trained."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import math
import os
import posixpath
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

import manyeyes
from manyeyes import config, storage
from manyeyes.errors import BundleError, MissingExtraError, UsageError
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.recognition.bundle import (
    GOLDEN_NAME,
    INFO_NAME,
    INPUT_NAME,
    MODEL_NAME,
    BackendName,
    BundleInfo,
    Calibration,
    Evaluation,
    GoldenExamples,
    Precision,
    write_bundle,
)
from manyeyes.recognition.predictor import Predictor
from manyeyes.training.backend import prepare
from manyeyes.training.calibration import calibrate as fit
from manyeyes.training.evaluated import read_evaluation
from manyeyes.training.golden import encode_variants
from manyeyes.training.held_out import Accuracy, calibration_images, held_out_sample
from manyeyes.training.precision import (
    NUM_ACCURACY_IMAGES,
    NUM_PARITY_IMAGES,
    Candidate,
    Examiner,
    Parity,
    choose_precision,
    in_batches,
)
from manyeyes.training.quantize import NUM_CALIBRATION_IMAGES
from manyeyes.training.run import Run, Which

if TYPE_CHECKING:
    import keras

_LIBRARIES = ("tensorflow", "keras", "tf2onnx", "onnx", "openvino", "onnxruntime", "opencv-python-headless", "numpy")


@dataclass(frozen=True)
class ExportResult:
    """A bundle that was published.

    Attributes:
        precision: in which it will be served.
        backend: that is the fastest in it here.
        parity, accuracy: of that precision; `accuracy` is beside float32 on images that were held out.
        candidates: every precision that was measured, float32 first.
        evaluation: the figures of the run's evaluation that the bundle holds; None: it has none, `not_evaluated` says
            why.
        temperature, threshold, calibration: see BundleInfo; the last is None where none was asked for.
    """

    run: str
    bundle: str
    name: str
    fingerprint: str
    num_classes: int
    input_shape: tuple[int, int, int]
    precision: Precision
    backend: str
    model_bytes: int
    parity: Parity
    accuracy: Accuracy
    candidates: tuple[Candidate, ...]
    seconds: float
    evaluation: Evaluation | None = None
    not_evaluated: str = ""
    temperature: float = 1.0
    threshold: float | None = None
    calibration: Calibration | None = None


def export(
    run: str,
    bundle: str,
    *,
    precision: Precision | Literal["auto"] = "float32",
    backend: BackendName = "auto",
    which: Which = "best",
    num_golden: int = 8,
    dataset: str | None = None,
    calibrate: bool = True,
    target_precision: float | None = None,
) -> ExportResult:
    """Make a bundle of the run at `run` and publish it at `bundle`, if it answers as the trained model does.

    Args:
        precision: in which the bundle will be served; parity and accuracy are measured in it. "auto" is the fastest
            that passes.
        backend: that the bundle prefers; "auto" is the fastest, here as measured now, elsewhere as measured there.
        which: the "best" or the "last" checkpoint.
        num_golden: golden examples to keep.
        dataset: whose images are compared; default: that of the run.
        calibrate: fit a temperature on the dataset's val split (see calibration).
        target_precision: share of right answers among those that are given; the bundle then abstains where the
            probability is below a threshold that reaches it on the val split.

    Returns:
        The bundle that was published, how far it is from the trained model, and what else was measured.

    Raises:
        UsageError: there is no run, something else is at `bundle`, the precision can't be served here, or no threshold
            reaches the target.
        DatasetError: the dataset can't be read.
        BundleError: the exported model differs from the trained one, or costs more accuracy than MAX_LOSS_POINTS;
            nothing was published.
        MissingExtraError: the libraries for export are not installed.
    """
    started = time.perf_counter()
    known = (*get_args(Precision), "auto")
    if precision not in known:
        raise UsageError(f"precision={precision!r} is not one of {', '.join(known)}.")
    if backend not in get_args(BackendName):
        raise UsageError(f"backend={backend!r} is not one of {', '.join(get_args(BackendName))}.")
    if target_precision is not None and not 0 < target_precision < 1:
        raise UsageError(f"target_precision={target_precision} is not between 0 and 1. Give e.g. 0.99.")
    if num_golden < 1:
        raise UsageError(f"num_golden={num_golden} is below 1: a bundle without golden examples proves nothing.")
    if any(importlib.util.find_spec(name) is None for name in ("keras", "tensorflow", "tf2onnx", "onnx")):
        raise MissingExtraError("Export", "export")
    bundle = bundle.rstrip("/")
    _check_target(bundle)
    # Recurrent layers would be traced as kernels of a GPU, which ONNX does not have.
    prepare(seed=0, use_gpus=False)
    trained = Run.open(run)
    dataset = dataset or trained.dataset
    num_images = NUM_PARITY_IMAGES if precision == "float32" else NUM_ACCURACY_IMAGES
    sample = held_out_sample(dataset, trained, max(num_images, num_golden), num_golden)
    chosen = trained.checkpoint(which)
    model = trained.model_of(chosen, precision="float32")
    golden = _make_golden(model, trained.preprocessing, sample.stored, num_golden)
    inputs = sample.inputs[:: math.ceil(len(sample.inputs) / NUM_PARITY_IMAGES)]
    trained_logits = _keras_logits(model, inputs)
    onnx_model = to_onnx(model)
    evaluation, not_evaluated = read_evaluation(run, chosen.state)

    info = BundleInfo(
        name=trained.model.name,
        class_names=trained.class_names,
        preprocessing=trained.preprocessing.to_dict(),
        preprocessing_fingerprint=trained.preprocessing.fingerprint,
        input_shape=_shape_of(golden.pixels),
        precision="float32",
        backend=backend,
        temperature=1.0,
        files={},
        provenance={
            "run": run,
            "checkpoint": which,
            "step": chosen.state.global_step,
            "model": config.to_dict(trained.model),
            "settings_fingerprint": trained.settings_fingerprint,
            "dataset": trained.dataset,
            "dataset_fingerprint": trained.dataset_fingerprint,
            "trained_with": trained.versions,
            "exported_with": _versions(),
        },
        evaluation=evaluation,
        manyeyes_version=manyeyes.__version__,
    )
    with _directory_aside(bundle) as aside:
        examiner = Examiner(aside, info, golden, sample, inputs, trained_logits)
        tried = [examiner.examine("float32", onnx_model)]
        if precision in ("bfloat16", "auto"):
            tried.append(examiner.examine("bfloat16", onnx_model))
        if precision in ("int8", "auto"):
            images = calibration_images(dataset, trained, sample, NUM_CALIBRATION_IMAGES)
            tried += examiner.examine_int8(onnx_model, images)
        best = choose_precision(tried, precision)
        files = {MODEL_NAME: best.model, GOLDEN_NAME: golden.to_bytes()}
        candidate = best.candidate
        assert candidate.parity is not None and candidate.accuracy is not None
        measured = {**config.to_dict(candidate.parity), "accuracy": config.to_dict(candidate.accuracy)}
        info = dataclasses.replace(best.info, parity=measured)
        calibrated = None
        if calibrate or target_precision is not None:
            write_bundle(aside, info, files)
            # In the precision that will be served: lower ones move logits.
            served = Predictor.load(aside, replay_golden=False)
            calibrated = fit(served.logits, trained, dataset, scale=calibrate, target_precision=target_precision)
            info = dataclasses.replace(
                info,
                temperature=calibrated.temperature,
                threshold=calibrated.threshold,
                calibration=calibrated.record,
            )
        written = write_bundle(aside, info, files)
        _publish(aside, bundle, files)
    return ExportResult(
        run=run,
        bundle=bundle,
        name=info.name,
        fingerprint=written.info.fingerprint,
        num_classes=len(info.class_names),
        input_shape=info.input_shape,
        precision=candidate.precision,
        backend=candidate.backend,
        model_bytes=len(best.model),
        parity=candidate.parity,
        accuracy=candidate.accuracy,
        candidates=tuple(each.candidate for each in tried),
        seconds=time.perf_counter() - started,
        evaluation=evaluation,
        not_evaluated=not_evaluated,
        temperature=info.temperature,
        threshold=info.threshold,
        calibration=info.calibration,
    )


def to_onnx(model: keras.Model) -> bytes:
    """Convert a Keras model that has been called to ONNX, with a dynamic batch.

    Raises:
        BundleError: the converter refuses the model, or its input is not uint8 images of the name "image".
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL_NAME
        with _silence() as said:
            try:
                model.export(str(path), format="onnx", verbose=False)
            except Exception as error:
                text = said.read_text(errors="replace").strip()[-2000:]
                raise BundleError(
                    f"The model {model.name} can't be converted to ONNX: {error!r}\n{text}".rstrip()
                ) from error
        content = path.read_bytes()
    inputs = list(onnx.load_model_from_string(content).graph.input)
    if (
        len(inputs) != 1
        or inputs[0].name != INPUT_NAME
        or inputs[0].type.tensor_type.elem_type != onnx.TensorProto.UINT8
    ):
        found = ", ".join(f"{each.name}: type {each.type.tensor_type.elem_type}" for each in inputs)
        raise BundleError(
            f"The model {model.name} has the inputs [{found}]; expected one of uint8, named {INPUT_NAME!r}."
        )
    return content


def _make_golden(
    model: keras.Model, preprocessing: Preprocessing, images: list[np.ndarray], num_golden: int
) -> GoldenExamples:
    names, encoded = zip(*encode_variants(images, num_golden), strict=True)
    pixels = np.stack([preprocessing(image) for image in encoded])
    return GoldenExamples(names, encoded, pixels, _keras_logits(model, pixels))


def _keras_logits(model: keras.Model, inputs: np.ndarray) -> np.ndarray:
    return in_batches(lambda batch: np.asarray(model(batch, training=False), np.float32), inputs)


def _check_target(bundle: str) -> None:
    if not storage.exists(bundle):
        return
    fs, path = storage.filesystem(bundle)
    if not fs.isdir(path):
        raise UsageError(f"{bundle} is not a bundle but a file. Give a directory.")
    names = {posixpath.basename(found.rstrip("/")) for found in fs.ls(path, detail=False)}
    # What is at the target is removed when the bundle takes its place, so all of it must be of a bundle.
    if strangers := sorted(names - {INFO_NAME, MODEL_NAME, GOLDEN_NAME}):
        raise UsageError(
            f"{bundle} is not a bundle alone: it holds {strangers[0]!r}. Give a new directory, or an older bundle."
        )


@contextlib.contextmanager
def _directory_aside(bundle: str) -> Iterator[str]:
    if storage.is_local(bundle):
        parent, name = posixpath.split(bundle)
        aside = storage.join(parent, f"{storage.ASIDE_MARK}{uuid.uuid4().hex[:12]}-{name}")
        try:
            yield aside
        finally:
            storage.remove(aside, recursive=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield folder


def _publish(aside: str, bundle: str, files: dict[str, bytes]) -> None:
    if storage.is_local(bundle):
        if storage.exists(bundle):
            # A directory can't be replaced in one step: the old one goes aside first.
            replaced = aside + "-old"
            storage.rename(bundle, replaced)
            storage.rename(aside, bundle)
            storage.remove(replaced, recursive=True)
        else:
            storage.rename(aside, bundle)
        return
    # Without a rename of directories bundle.json decides: away first, back last.
    storage.remove(storage.join(bundle, INFO_NAME))
    for name in (*files, INFO_NAME):
        storage.write_bytes(storage.join(bundle, name), storage.read_bytes(storage.join(aside, name)))


def _shape_of(pixels: np.ndarray) -> tuple[int, int, int]:
    _, height, width, channels = pixels.shape
    return height, width, channels


def _versions() -> dict[str, Any]:
    versions = {}
    for name in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@contextlib.contextmanager
def _silence() -> Iterator[Path]:
    # The converter writes to the file descriptors themselves, from Python and from C++.
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "said.txt"
        with open(path, "wb") as said:
            saved = os.dup(1), os.dup(2)
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            try:
                yield path
            finally:
                for number, descriptor in enumerate(saved, start=1):
                    os.dup2(descriptor, number)
                    os.close(descriptor)
