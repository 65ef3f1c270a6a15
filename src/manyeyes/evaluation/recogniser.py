"""What is evaluated: a run's Keras model or a bundle, both as a function from pixels to logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from manyeyes import storage
from manyeyes.errors import UsageError
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.recognition.bundle import INFO_NAME, Bundle
from manyeyes.training.run import CONFIG_NAME, Run

Kind = Literal["run", "bundle"]
Logits = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Recogniser:
    """What is known of a model without loading its weights.

    Attributes:
        kind: "run" or "bundle".
        name: of the model, for people.
        class_names: label i is class_names[i].
        preprocessing: from source bytes to the model's input.
        input_shape: (height, width, channels) in pixels.
        fingerprint: 16 hex digits that change with the weights.
        temperature: logits are divided by it before softmax; 1 for a run.
        threshold: a prediction of a lower probability abstains; None: none does.
    """

    uri: str
    kind: Kind
    name: str
    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    input_shape: tuple[int, int, int]
    fingerprint: str
    temperature: float = 1.0
    threshold: float | None = None

    @classmethod
    def open(cls, uri: str) -> Recogniser:
        """Find out whether a run or a bundle is at `uri`, and check it.

        Raises:
            UsageError: there is neither, or the run is damaged.
            CheckpointError: the run has no whole checkpoint.
            BundleError: the bundle is damaged.
        """
        uri = str(uri).rstrip("/")
        if storage.exists(storage.join(uri, INFO_NAME)):
            bundle = Bundle.load(uri)
            info = bundle.info
            return cls(
                uri,
                "bundle",
                info.name,
                info.class_names,
                bundle.preprocessing,
                info.input_shape,
                info.fingerprint,
                info.temperature,
                info.threshold,
            )
        if storage.exists(storage.join(uri, CONFIG_NAME)):
            run = Run.open(uri)
            if run.model.input_shape is None:
                raise UsageError(f"{storage.join(uri, CONFIG_NAME)} is damaged: it has no input_shape. Train again.")
            fingerprint, shape = run.state("best").fingerprint, run.model.input_shape
            return cls(uri, "run", run.model.name, run.class_names, run.preprocessing, shape, fingerprint)
        what = f"{uri} holds neither a run ({CONFIG_NAME}) nor a bundle ({INFO_NAME})"
        if not storage.exists(uri):
            what = f"There is nothing at {uri}"
        raise UsageError(f"{what}. Give what `manyeyes train` or `manyeyes export` made.")

    def load(self, batch_size: int) -> Logits:
        """Load the weights, once per process.

        Returns:
            A function from uint8 (n, height, width, channels), n <= batch_size, to float32 logits (n, classes). The
            logits of an image don't depend on its neighbours in the batch.

        Raises:
            MissingExtraError: a library is not installed.
        """
        return _load(self, batch_size)


# The key holds the fingerprint: a run that was trained on, or a bundle that was exported again, is loaded anew.
@functools.lru_cache(maxsize=1)
def _load(recogniser: Recogniser, batch_size: int) -> Logits:
    return _load_run(recogniser, batch_size) if recogniser.kind == "run" else _load_bundle(recogniser)


def _load_bundle(recogniser: Recogniser) -> Logits:
    from manyeyes.recognition.predictor import Predictor

    # One thread: sums are then made in one order, so that any number of workers gives the same logits.
    return Predictor.load(recogniser.uri, num_threads=1, measure=False).logits


def _load_run(recogniser: Recogniser, batch_size: int) -> Logits:
    from manyeyes.training import backend

    backend.prepare(seed=0)
    model = Run.open(recogniser.uri).load_model("best")

    def logits(images: np.ndarray) -> np.ndarray:
        # Every batch has the same shape: the model is traced once, and every image goes the same way through it.
        padded = np.zeros((batch_size, *images.shape[1:]), np.uint8)
        padded[: len(images)] = images
        return np.asarray(model.predict_on_batch(padded), np.float32)[: len(images)]

    return logits
