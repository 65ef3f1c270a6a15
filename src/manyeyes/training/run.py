"""A run directory opened for reading: what was trained, on what, and the model it reached."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from manyeyes import config, storage
from manyeyes.data.dataset import Dataset
from manyeyes.errors import CheckpointError, ConfigError, UsageError
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.models.registry import ModelConfig, Precision, build, input_size
from manyeyes.training import backend, checkpoint, weights
from manyeyes.training.checkpoint import CHECKPOINTS, Checkpoint, TrainState
from manyeyes.training.settings import TrainSettings

if TYPE_CHECKING:
    import keras

FORMAT = "manyeyes.run"
FORMAT_VERSION = 1
CONFIG_NAME = "config.json"
METRICS_NAME = "metrics.jsonl"

Which = Literal["best", "last"]


@dataclass(frozen=True)
class Run:
    """What config.json of a run says.

    Attributes:
        uri: where the run directory is.
        class_names: label i is class_names[i].
        model: which model, with input_shape and num_classes.
        preprocessing: from source bytes to the model's input: that of the dataset, then `extra_preprocessing`.
        extra_preprocessing: from an image as stored in the dataset to the model's input.
        dataset, dataset_fingerprint: what it was trained on.
        precision: in which the arithmetic of the training was done.
        averages: whether the weights that count are the exponential moving average.
        settings: the resolved settings, as plain nested values (see training.settings).
        versions: of the libraries that trained it.
        command: that started it.
    """

    uri: str
    class_names: tuple[str, ...]
    model: ModelConfig
    preprocessing: Preprocessing
    extra_preprocessing: Preprocessing
    dataset: str
    dataset_fingerprint: str
    precision: Precision
    averages: bool
    settings: dict[str, Any]
    versions: dict[str, str]
    command: tuple[str, ...]
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    @classmethod
    def open(cls, run_uri: str) -> Run:
        """Read the run at `run_uri`.

        Raises:
            UsageError: there is no run, or it is damaged or of another format version.
        """
        uri = storage.join(run_uri, CONFIG_NAME)
        try:
            values = storage.read_json(uri)
        except FileNotFoundError:
            raise UsageError(
                f"There is no run at {run_uri}. Make one with: manyeyes train DATASET --out {run_uri}"
            ) from None
        except ValueError as error:
            raise UsageError(f"{uri} is damaged: {error}. Restore it or train again.") from None
        if (
            not isinstance(values, dict)
            or values.get("format") != FORMAT
            or values.get("format_version") != FORMAT_VERSION
        ):
            raise UsageError(
                f"{uri} is not the configuration of a run that this Manyeyes reads (version {FORMAT_VERSION})."
            )
        fingerprint = values.pop("preprocessing_fingerprint", "")
        try:
            run = config.from_dict(cls, {**values, "uri": str(run_uri)})
        except ConfigError as error:
            raise UsageError(f"{uri} can't be used: {error}") from None
        if run.preprocessing.fingerprint != fingerprint:
            raise UsageError(
                f"{uri}: the preprocessing does not have its fingerprint {fingerprint}. Restore it or train again."
            )
        return run

    def save(self) -> None:
        """Publish config.json."""
        values = config.to_dict(self)
        del values["uri"]
        values["preprocessing_fingerprint"] = self.preprocessing.fingerprint
        storage.write_json(storage.join(self.uri, CONFIG_NAME), values)

    @property
    def settings_fingerprint(self) -> str:
        """16 hex digits over the settings."""
        return fingerprint_of(self.settings)

    @property
    def checkpoints_uri(self) -> str:
        """The directory of the checkpoints."""
        return storage.join(self.uri, CHECKPOINTS)

    def state(self, which: Which = "best") -> TrainState:
        """Check the checkpoint that `checkpoint` reads, and keep only its state.

        Raises:
            CheckpointError: as `checkpoint` does.
        """
        last = self._newest_state()
        if which == "last" or last.best_name == last.name:
            return last
        return checkpoint.check(self.checkpoints_uri, last.best_name)

    def checkpoint(self, which: Which = "best") -> Checkpoint:
        """Read the last checkpoint, or that with the best val accuracy (the last where there was no validation yet).

        Raises:
            CheckpointError: the run has no whole checkpoint, or the best is damaged.
        """
        last = self._newest_state()
        return checkpoint.load(self.checkpoints_uri, last.name if which == "last" else last.best_name)

    def _newest_state(self) -> TrainState:
        last = checkpoint.newest_whole(self.checkpoints_uri)
        if last is None:
            raise CheckpointError(
                f"{self.uri} has no checkpoint yet. Go on with: manyeyes train {self.dataset} --out {self.uri} --resume"
            )
        return last

    def load_model(self, which: Which = "best", precision: Precision = "float32") -> keras.Model:
        """Build the model with the weights of a checkpoint; averaged weights where the run averages.

        Returns:
            a Keras model from uint8 (N, height, width, channels) to float32 logits (N, num_classes).

        Raises:
            CheckpointError: no whole checkpoint, or one of another model.
        """
        return self.model_of(self.checkpoint(which), precision)

    def model_of(self, chosen: Checkpoint, precision: Precision = "float32") -> keras.Model:
        """Build the model with the weights of a checkpoint of this run that was read already; see `load_model`.

        Raises:
            CheckpointError: it is of another model.
        """
        model = build(config_without_weights(self.model), precision)
        what = f"The checkpoint of step {chosen.state.global_step} of {self.uri}"
        weights.assign(model.variables, chosen.arrays["model"], what)
        if "ema" in chosen.arrays:
            weights.assign(weights.averaged_variables(model), chosen.arrays["ema"], what)
        return model


def describe_run(data: Dataset, uri: str, settings: TrainSettings, command: Sequence[str] = ()) -> Run:
    """What a training of a dataset by settings would make at `uri`.

    Raises:
        UsageError: settings that don't fit the dataset or the model.
    """
    if settings.model.input_shape is not None or settings.model.num_classes is not None:
        raise UsageError(
            "model.input_shape and model.num_classes come from the dataset. Use data.image_size for a size."
        )
    suits_size, suits_short = input_size(settings.model.name)
    extra = settings.data.preprocessing(data.preprocessing, data.image_shape, suits_size, suits_short)
    shape = extra.output_shape or data.image_shape
    model = dataclasses.replace(settings.model, input_shape=shape, num_classes=len(data.class_names))
    return Run(
        uri=uri,
        class_names=data.class_names,
        model=model,
        preprocessing=data.preprocessing.then(extra),
        extra_preprocessing=extra,
        dataset=storage.absolute(data.uri),
        dataset_fingerprint=data.manifest.fingerprint,
        precision=backend.resolve_precision(settings.train.precision),
        averages=settings.optimizer.ema > 0,
        settings=config.to_dict(settings),
        versions=backend.versions(),
        command=tuple(command),
    )


def config_without_weights(model: ModelConfig) -> ModelConfig:
    """The same model with nothing fetched: its weights come from a checkpoint."""
    return ModelConfig(model.name, model.input_shape, model.num_classes, model.dropout, "none", model.options)


def fingerprint_of(settings: dict[str, Any]) -> str:
    """16 hex digits that are equal exactly when the nested settings are."""
    return hashlib.sha256(storage.canonical_json(settings)).hexdigest()[:16]
