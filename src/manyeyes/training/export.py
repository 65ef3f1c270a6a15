"""From a run to a bundle: ONNX, golden examples, and the proof that what is served answers as what was trained."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import posixpath
import tempfile
import time
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

import manyeyes
from manyeyes import config, storage
from manyeyes.data.dataset import Dataset
from manyeyes.errors import BundleError, DatasetError, MissingExtraError, UsageError
from manyeyes.imaging.decode import decode
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.recognition.bundle import (
    GOLDEN_NAME,
    INFO_NAME,
    INPUT_NAME,
    MODEL_NAME,
    BackendName,
    BundleInfo,
    GoldenExamples,
    Precision,
    write_bundle,
)
from manyeyes.recognition.inputs import remaining_preprocessing
from manyeyes.recognition.predictor import Predictor
from manyeyes.training.backend import prepare
from manyeyes.training.golden import bounded, encode_variants
from manyeyes.training.run import Run, Which

if TYPE_CHECKING:
    import keras

# Images of the dataset that both models answer, besides the golden examples.
NUM_PARITY_IMAGES = 256
# In a lower precision near ties may fall the other way; in float32 only where the lead is below the tolerance.
MIN_TOP1_AGREEMENT = 0.99
_BATCH_SIZE = 32
_LIBRARIES = ("tensorflow", "keras", "tf2onnx", "onnx", "openvino", "onnxruntime", "opencv-python-headless", "numpy")


@dataclass(frozen=True)
class Parity:
    """How far the bundle is from the trained model, in the precision that will serve.

    Attributes:
        golden_max_difference, max_difference: largest absolute difference of a logit, on golden examples and images.
        tolerance: what is allowed for it; in bfloat16 only the golden examples are held to it.
        top1_agreement: share of the images with the same likeliest class.
    """

    num_golden: int
    golden_max_difference: float
    num_images: int
    max_difference: float
    tolerance: float
    top1_agreement: float


@dataclass(frozen=True)
class ExportResult:
    """A bundle that was published."""

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
    seconds: float


def export(
    run: str,
    bundle: str,
    *,
    precision: Precision = "float32",
    backend: BackendName = "auto",
    which: Which = "best",
    num_golden: int = 8,
    dataset: str | None = None,
) -> ExportResult:
    """Make a bundle of the run at `run` and publish it at `bundle`, if it answers as the trained model does.

    Args:
        precision: in which the bundle will be served; parity is measured in it.
        backend: that the bundle prefers; "auto" lets each machine choose.
        which: the "best" or the "last" checkpoint.
        num_golden: golden examples to keep.
        dataset: whose images are compared; default: that of the run.

    Returns:
        The bundle that was published, and how far it is from the trained model.

    Raises:
        UsageError: there is no run, something else is at `bundle`, or the precision can't be served here.
        DatasetError: the dataset can't be read.
        BundleError: the exported model differs from the trained one; nothing was published.
        MissingExtraError: the libraries for export are not installed.
    """
    started = time.perf_counter()
    if precision not in get_args(Precision):
        raise UsageError(f"precision={precision!r} is not one of {', '.join(get_args(Precision))}.")
    if backend not in get_args(BackendName):
        raise UsageError(f"backend={backend!r} is not one of {', '.join(get_args(BackendName))}.")
    if num_golden < 1:
        raise UsageError(f"num_golden={num_golden} is below 1: a bundle without golden examples proves nothing.")
    if any(importlib.util.find_spec(name) is None for name in ("keras", "tensorflow", "tf2onnx", "onnx")):
        raise MissingExtraError("Export", "export")
    bundle = bundle.rstrip("/")
    _check_target(bundle)
    # Recurrent layers would be traced as kernels of a GPU, which ONNX does not have.
    prepare(seed=0, use_gpus=False)
    trained = Run.open(run)
    images, inputs = _comparison_images(dataset or trained.dataset, trained, max(NUM_PARITY_IMAGES, num_golden))
    chosen = trained.checkpoint(which)
    model = trained.model_of(chosen, precision="float32")
    golden = _make_golden(model, trained.preprocessing, images, num_golden)
    trained_logits = _keras_logits(model, inputs)
    onnx_model = to_onnx(model)

    info = BundleInfo(
        name=trained.model.name,
        class_names=trained.class_names,
        preprocessing=trained.preprocessing.to_dict(),
        preprocessing_fingerprint=trained.preprocessing.fingerprint,
        input_shape=_shape_of(golden.pixels),
        precision=precision,
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
        manyeyes_version=manyeyes.__version__,
    )
    files = {MODEL_NAME: onnx_model, GOLDEN_NAME: golden.to_bytes()}
    with _directory_aside(bundle) as aside:
        write_bundle(aside, info, files)
        predictor = Predictor.load(aside, replay_golden=False)
        if precision != predictor.backend.precision:
            raise UsageError(
                f"{predictor.backend.name} can't serve in {precision} on this machine, "
                f"only in {predictor.backend.precision}. Use --precision {predictor.backend.precision}."
            )
        parity = _compare(predictor, golden, inputs, trained_logits)
        written = write_bundle(aside, dataclasses.replace(info, parity=config.to_dict(parity)), files)
        _publish(aside, bundle, files)
    return ExportResult(
        run=run,
        bundle=bundle,
        name=info.name,
        fingerprint=written.info.fingerprint,
        num_classes=len(info.class_names),
        input_shape=info.input_shape,
        precision=precision,
        backend=predictor.backend.name,
        model_bytes=len(onnx_model),
        parity=parity,
        seconds=time.perf_counter() - started,
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


def _comparison_images(dataset_uri: str, trained: Run, num_images: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Take images evenly from val, else test, else train.

    Returns:
        the images as stored, decoded and of bounded size, and the model inputs, uint8 (n, height, width, channels).
    """
    try:
        dataset = Dataset(dataset_uri)
    except DatasetError as error:
        if dataset_uri != trained.dataset:
            raise
        raise DatasetError(f"The run's own dataset can't be used: {error} Or give another by --dataset.") from None
    left = remaining_preprocessing(trained.preprocessing, dataset.preprocessing)
    name = next((name for name in ("val", "test", "train") if name in dataset.split_names), None)
    if name is None:
        raise DatasetError(f"{dataset_uri} has no examples, so the exported model can't be compared on any.")
    split = dataset.split(name)
    wanted = np.linspace(0, split.num_examples - 1, min(num_images, split.num_examples)).astype(np.int64)
    group_of = np.searchsorted(split.row_group_starts, wanted, side="right") - 1
    stored: list[np.ndarray] = []
    inputs: list[np.ndarray] = []
    for group in np.unique(group_of):
        shard, row_group = split.row_groups[group]
        with dataset.open_shard(split.shards[shard]) as reader:
            rows = reader.read(row_group)
        for index in wanted[group_of == group] - split.row_group_starts[group]:
            image = rows.images[index]
            pixels = (
                decode(image, channels=left.channels, background=left.background) if isinstance(image, bytes) else image
            )
            stored.append(bounded(pixels))
            inputs.append(left.apply(pixels))
            if inputs[-1].shape != trained.model.input_shape:
                raise DatasetError(
                    f"{dataset_uri} gives images of {inputs[-1].shape}, but the model of {trained.uri} takes "
                    f"{trained.model.input_shape}. Give a dataset with the channels that it was trained on."
                )
    return stored, np.stack(inputs)


def _make_golden(
    model: keras.Model, preprocessing: Preprocessing, images: list[np.ndarray], num_golden: int
) -> GoldenExamples:
    evenly = [images[i] for i in np.linspace(0, len(images) - 1, min(num_golden, len(images))).astype(int)]
    names, encoded = zip(*encode_variants(evenly, num_golden), strict=True)
    pixels = np.stack([preprocessing(image) for image in encoded])
    return GoldenExamples(names, encoded, pixels, _keras_logits(model, pixels))


def _keras_logits(model: keras.Model, inputs: np.ndarray) -> np.ndarray:
    batches = [inputs[start : start + _BATCH_SIZE] for start in range(0, len(inputs), _BATCH_SIZE)]
    return np.concatenate([np.asarray(model(batch, training=False), np.float32) for batch in batches])


def _compare(predictor: Predictor, golden: GoldenExamples, inputs: np.ndarray, trained_logits: np.ndarray) -> Parity:
    golden_max_difference = predictor.replay(golden)
    batches = [inputs[start : start + _BATCH_SIZE] for start in range(0, len(inputs), _BATCH_SIZE)]
    # A batch of one takes other kernels than a batch of many, so both are compared.
    served = np.concatenate([predictor.logits(inputs[:1]), *map(predictor.logits, batches)])
    wanted = np.concatenate([trained_logits[:1], trained_logits])
    tolerance = predictor.logit_tolerance(wanted)
    max_difference = float(np.max(np.abs(served - wanted)))
    agreement = float(np.mean(served.argmax(axis=1) == wanted.argmax(axis=1)))
    precision = predictor.backend.precision
    if not np.isfinite(max_difference) or (precision == "float32" and max_difference > tolerance):
        raise BundleError(
            f"The exported model differs from the trained one: a logit by {max_difference:.3g} "
            f"on {len(inputs)} images, {tolerance:.3g} is allowed in {precision} ({predictor.backend.name}). "
            "Nothing was published."
        )
    if agreement < MIN_TOP1_AGREEMENT:
        raise BundleError(
            f"The exported model agrees with the trained one on {agreement:.1%} of {len(inputs)} images in {precision} "
            f"({predictor.backend.name}), {MIN_TOP1_AGREEMENT:.0%} is required. Nothing was published. "
            "Try --precision float32."
        )
    return Parity(len(golden), golden_max_difference, len(inputs), max_difference, tolerance, agreement)


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
