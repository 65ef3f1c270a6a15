"""A bundle: the directory that is served. Model, class names, preprocessing, and golden examples that prove they agree.

bundle/
  model.onnx            input "image": uint8 (n, height, width, channels), RGB; output: float32 logits (n, classes)
  golden.safetensors    encoded bytes in, pixels and logits of the trained model out
  bundle.json           written last: everything else, with a checksum of every other file
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy

from manyeyes import config, storage
from manyeyes.errors import BundleError, ConfigError
from manyeyes.imaging.preprocessing import Preprocessing

FORMAT = "manyeyes.bundle"
FORMAT_VERSION = 1
INFO_NAME = "bundle.json"
MODEL_NAME = "model.onnx"
GOLDEN_NAME = "golden.safetensors"
INPUT_NAME = "image"
# Logits that are divided by less are no numbers any more.
_MIN_TEMPERATURE = 1e-6

Precision = Literal["float32", "bfloat16", "int8"]
BackendName = Literal["auto", "openvino", "onnxruntime"]


@dataclass(frozen=True)
class FileInfo:
    """Size and SHA-256 of one file of a bundle."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of the trained model found.

    Attributes:
        split: of the dataset that it was evaluated on.
        confidence: of the interval.
        accuracy_interval: (low, high), the Wilson interval.
        top_k_accuracy: share of examples whose class is among the k likeliest, by k as text.
        macro_f1: mean over all classes of F1, where a class without a value counts as 0.
        precision, recall, f1: by label; None where there is none (see evaluation.metrics.ClassMetrics).
        support: examples by label.
    """

    dataset: str
    dataset_fingerprint: str
    split: str
    num_examples: int
    confidence: float
    accuracy: float
    accuracy_interval: tuple[float, float]
    top_k_accuracy: dict[str, float]
    macro_f1: float
    precision: tuple[float | None, ...]
    recall: tuple[float | None, ...]
    f1: tuple[float | None, ...]
    support: tuple[int, ...]


@dataclass(frozen=True)
class Calibration:
    """How temperature and threshold were found, on examples of a split.

    Attributes:
        split: of the dataset; "" where nothing was measured.
        log_loss_before, ece_before: log loss and expected calibration error (15 bins) with temperature 1.
        log_loss, ece: the same with the temperature of the bundle.
        target_precision: that the threshold was chosen for.
        coverage: share of the examples that reach the threshold.
        precision: share of those that are right.
        precision_low: the lower end of its 95 % Wilson interval; the threshold is the lowest for which it reaches the
            target.
        note: why logits are left as they are; "" where they are not.
    """

    split: str = ""
    num_examples: int = 0
    log_loss_before: float | None = None
    log_loss: float | None = None
    ece_before: float | None = None
    ece: float | None = None
    target_precision: float | None = None
    coverage: float | None = None
    precision: float | None = None
    precision_low: float | None = None
    note: str = ""


@dataclass(frozen=True)
class BundleInfo:
    """The content of bundle.json.

    Attributes:
        name: of the model, for people.
        class_names: label i is class_names[i].
        preprocessing: from source bytes to the model's input (see imaging.Preprocessing.to_dict).
        input_shape: (height, width, channels) in pixels.
        precision: in which the model is served.
        backend: that serves it; "auto" lets the machine choose.
        temperature: logits are divided by it before softmax.
        parity: what export measured against the trained model.
        provenance: run, dataset, settings and versions it was made from.
        files: every other file of the directory.
        timings: how fast the backends were on the machine of the export (see selection.Timing).
        evaluation: of the checkpoint that was exported; None: it was not evaluated.
        threshold: a prediction whose class has a lower probability abstains; None: none does.
        calibration: how temperature and threshold were found; None: by an export that did not look for them.
        fingerprint: 16 hex digits over all other fields but `timings`, `evaluation` and `calibration`, which no answer
            depends on; the version.
    """

    name: str
    class_names: tuple[str, ...]
    preprocessing: dict[str, Any]
    preprocessing_fingerprint: str
    input_shape: tuple[int, int, int]
    precision: Precision
    backend: BackendName
    temperature: float
    files: dict[str, dict[str, Any]]
    parity: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    timings: tuple[dict[str, Any], ...] = ()
    evaluation: Evaluation | None = None
    threshold: float | None = None
    calibration: Calibration | None = None
    manyeyes_version: str = ""
    fingerprint: str = ""
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def with_fingerprint(self) -> BundleInfo:
        """A copy whose fingerprint is that of its fields."""
        values = config.to_dict(self)
        del values["fingerprint"], values["timings"], values["evaluation"], values["calibration"]
        if self.threshold is None:
            # Bundles of before there were thresholds keep their fingerprint.
            del values["threshold"]
        return dataclasses.replace(self, fingerprint=hashlib.sha256(storage.canonical_json(values)).hexdigest()[:16])


@dataclass(frozen=True)
class GoldenExamples:
    """Inputs with the answers that the trained model gave.

    Attributes:
        names: what each example is, for people.
        encoded: n encoded images.
        pixels: uint8 (n, height, width, channels), what preprocessing made of them.
        logits: float32 (n, classes), what the trained model made of the pixels.
    """

    names: tuple[str, ...]
    encoded: tuple[bytes, ...]
    pixels: np.ndarray
    logits: np.ndarray

    def __len__(self) -> int:
        return len(self.encoded)

    def to_bytes(self) -> bytes:
        """As a safetensors file."""
        offsets = np.cumsum([0, *(len(encoded) for encoded in self.encoded)], dtype=np.int64)
        tensors = {
            "encoded": np.frombuffer(b"".join(self.encoded), np.uint8),
            "offsets": offsets,
            "pixels": np.ascontiguousarray(self.pixels),
            "logits": np.ascontiguousarray(self.logits, np.float32),
        }
        return safetensors.numpy.save(tensors, metadata={"names": json.dumps(self.names)})

    @classmethod
    def from_bytes(cls, content: bytes) -> GoldenExamples:
        """The inverse of `to_bytes`.

        Raises:
            BundleError: the content is damaged.
        """
        try:
            tensors = safetensors.numpy.load(content)
            encoded, offsets = tensors["encoded"].tobytes(), tensors["offsets"].tolist()
            # safetensors.numpy gives no metadata; the header is JSON after its length in 8 bytes.
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            return cls(
                names=tuple(json.loads(header["__metadata__"]["names"])),
                encoded=tuple(encoded[start:end] for start, end in itertools.pairwise(offsets)),
                pixels=tensors["pixels"],
                logits=tensors["logits"],
            )
        except (safetensors.SafetensorError, KeyError, ValueError) as error:
            raise BundleError(f"{GOLDEN_NAME} is damaged: {error!r}. Export the run again.") from None


@dataclass(frozen=True)
class Bundle:
    """A bundle that was opened and checked."""

    uri: str
    info: BundleInfo

    @classmethod
    def load(cls, uri: str) -> Bundle:
        """Open the bundle at `uri`: format, version, fingerprints, and the checksum of every file.

        Raises:
            BundleError: something is missing, damaged or was changed since export.
        """
        uri = str(uri).rstrip("/")
        bundle = cls(uri, _read_info(uri))
        for name in (MODEL_NAME, GOLDEN_NAME):
            if name not in bundle.info.files:
                raise BundleError(f"{uri}: {INFO_NAME} does not list {name}. Export the run again.")
        for name in bundle.info.files:
            bundle.read_file(name)
        return bundle

    @property
    def class_names(self) -> tuple[str, ...]:
        """label i is class_names[i]."""
        return self.info.class_names

    @property
    def preprocessing(self) -> Preprocessing:
        """From source bytes to the model's input."""
        return Preprocessing.from_dict(self.info.preprocessing)

    def read_file(self, name: str) -> bytes:
        """Return the bytes of a file that bundle.json lists.

        Raises:
            BundleError: it is missing, or differs from its checksum.
        """
        uri = storage.join(self.uri, name)
        expected = FileInfo(**self.info.files[name])
        try:
            content = storage.read_bytes(uri)
        except FileNotFoundError:
            raise BundleError(
                f"{uri} is missing, but {INFO_NAME} lists it. Copy the bundle again, or export the run again."
            ) from None
        if len(content) != expected.size_bytes:
            raise BundleError(
                f"{uri} has {len(content)} bytes, {INFO_NAME} says {expected.size_bytes}. "
                "Copy the bundle again, or export the run again."
            )
        if (found := hashlib.sha256(content).hexdigest()) != expected.sha256:
            raise BundleError(
                f"{uri} fails its checksum: SHA-256 {found[:12]}…, {INFO_NAME} says {expected.sha256[:12]}…. "
                "Copy the bundle again, or export the run again."
            )
        return content

    def golden_examples(self) -> GoldenExamples:
        """Read the golden examples."""
        return GoldenExamples.from_bytes(self.read_file(GOLDEN_NAME))


def write_bundle(uri: str, info: BundleInfo, files: Mapping[str, bytes]) -> Bundle:
    """Write a bundle directory; bundle.json goes last, with the checksums of `files` and its own fingerprint."""
    listed = {}
    for name, content in files.items():
        storage.write_bytes(storage.join(uri, name), content)
        listed[name] = config.to_dict(FileInfo(len(content), hashlib.sha256(content).hexdigest()))
    info = dataclasses.replace(info, files=listed).with_fingerprint()
    storage.write_json(storage.join(uri, INFO_NAME), config.to_dict(info))
    return Bundle(str(uri).rstrip("/"), info)


def _read_info(bundle_uri: str) -> BundleInfo:
    uri = storage.join(bundle_uri, INFO_NAME)
    try:
        values = storage.read_json(uri)
    except FileNotFoundError:
        if not storage.exists(bundle_uri):
            raise BundleError(
                f"There is no bundle at {bundle_uri}. Make one with: manyeyes export RUN {bundle_uri}"
            ) from None
        raise BundleError(
            f"{bundle_uri} has no {INFO_NAME}: it is not a bundle, or its export did not finish."
        ) from None
    except NotADirectoryError:
        raise BundleError(f"{bundle_uri} is a file; a bundle is a directory with {INFO_NAME}.") from None
    except ValueError as error:
        raise BundleError(f"{uri} is damaged: {error}. Export the run again.") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise BundleError(f"{uri} is not the description of a Manyeyes bundle.")
    if values.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"{uri} has format version {values.get('format_version')}, this Manyeyes reads {FORMAT_VERSION}. "
            "Export the run again."
        )
    try:
        info = config.from_dict(BundleInfo, values)
        preprocessing = Preprocessing.from_dict(info.preprocessing)
    except ConfigError as error:
        raise BundleError(f"{uri} can't be used: {error}") from None
    for name in info.files:
        if not storage.is_file_name(name):
            raise BundleError(f"{uri} lists {name!r}, which is not a file of the bundle. Export the run again.")
    if preprocessing.fingerprint != info.preprocessing_fingerprint:
        raise BundleError(
            f"{uri}: the preprocessing has fingerprint {preprocessing.fingerprint}, but the model was exported with "
            f"{info.preprocessing_fingerprint}. It was changed; export the run again."
        )
    if not _MIN_TEMPERATURE <= info.temperature < math.inf:
        raise BundleError(
            f"{uri} has temperature {info.temperature}, expected a finite number above 0. Export the run again."
        )
    try:
        expected = info.with_fingerprint().fingerprint
    except ValueError as error:  # NaN, which Python's JSON reads but canonical JSON has not
        raise BundleError(f"{uri} is damaged: {error}. Export the run again.") from None
    if expected != info.fingerprint:
        raise BundleError(
            f"{uri}: the content has fingerprint {expected}, but says {info.fingerprint or 'none'}. "
            "It was changed after export; export the run again."
        )
    return info
