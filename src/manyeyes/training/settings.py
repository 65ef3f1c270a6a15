"""The settings of a training run: one frozen dataclass for each section of a recipe.

Every field has a default, so that `manyeyes train DATASET --out RUN` works with no recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from manyeyes import config
from manyeyes.data.mix import Mix
from manyeyes.errors import ConfigError, UsageError
from manyeyes.imaging.augment import Augmentation
from manyeyes.imaging.preprocessing import Fit, Preprocessing
from manyeyes.models.registry import ModelConfig

# Settings that change how a run is kept and shown, but not the weights it reaches: free to differ on resume.
KEEPING = frozenset(
    f"train.{name}"
    for name in (
        "checkpoint_every_steps",
        "checkpoint_every_seconds",
        "keep_checkpoints",
        "log_every_steps",
        "tensorboard",
        "mlflow",
    )
) | {
    f"strategy.{name}"
    for name in ("collective", "step_timeout_seconds", "max_restarts", "restart_seconds", "max_lost_workers")
}


@dataclass(frozen=True)
class DataSettings:
    """What the model sees of the dataset.

    Attributes:
        train_split, val_split: names of splits.
        image_size: (height, width) of the model's input in pixels; empty: as stored, or what suits the model
            where stored sizes differ.
        fit: how another size is reached: "crop", "pad" or "stretch" (see Preprocessing.for_size).
        resize_short: with fit "crop": the shorter side before the cut, in pixels; None: just enough.
    """

    train_split: str = "train"
    val_split: str = "val"
    image_size: tuple[int, ...] = ()
    fit: Fit = "crop"
    resize_short: int | None = None

    def __post_init__(self) -> None:
        if self.image_size and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ConfigError(
                f"data.image_size={list(self.image_size)} must be [height, width] in pixels, e.g. [224, 224]."
            )
        if self.resize_short is not None and self.fit != "crop":
            raise ConfigError(f"data.resize_short goes with data.fit=crop only, not with {self.fit}.")

    def preprocessing(
        self,
        stored: Preprocessing,
        stored_shape: tuple[int, int, int] | None,
        default_size: int,
        default_resize_short: int | None = None,
    ) -> Preprocessing:
        """The steps from a stored image to the model's input; none where the stored shape is used as it is.

        Args:
            stored: how stored images were made.
            stored_shape: (height, width, channels) of all stored images, or None where they differ.
            default_size, default_resize_short: what suits the model, where sizes differ and none is set.
        """
        size, resize_short = tuple(self.image_size), self.resize_short
        if not size and stored_shape is None:
            size, resize_short = (default_size, default_size), resize_short or default_resize_short
        if not size or (stored_shape is not None and size == stored_shape[:2]):
            return Preprocessing(stored.channels, stored.background, stored.interpolation, (), stored.decoder)
        return Preprocessing.for_size(size[0], size[1], self.fit, stored.channels, resize_short)


@dataclass(frozen=True)
class OptimizerSettings:
    """How gradients become weights.

    Attributes:
        name: "sgd", "adamw", "lamb", "lars" or "muon".
        learning_rate: the peak that the schedule scales; None: that of DEFAULT_LEARNING_RATES.
        learning_rate_rule: how the peak follows the global batch size: "none"; "linear" (times global_batch_size /
            base_batch_size, for sgd) or "sqrt" (times its root, for adamw and lamb).
        base_batch_size: the global batch size for which learning_rate was chosen; matters with a rule only.
        momentum: of sgd, lars and muon; 0 is plain gradient descent.
        nesterov: with sgd and muon: look ahead along the momentum.
        weight_decay: decoupled for every optimizer, also sgd: each step first takes learning_rate * weight_decay * w
            off a weight w, apart from the gradient; never off biases and norms.
        clip_norm: the global norm that a gradient is cut to; 0: not cut.
        ema: decay of the exponential moving average of the weights, in [0, 1); 0: none.
    """

    name: Literal["sgd", "adamw", "lamb", "lars", "muon"] = "adamw"
    learning_rate: float | None = None
    learning_rate_rule: Literal["none", "linear", "sqrt"] = "none"
    base_batch_size: int = 64
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    clip_norm: float = 0.0
    ema: float = 0.0

    def __post_init__(self) -> None:
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"optimizer.learning_rate={self.learning_rate} must be above 0.")
        if self.base_batch_size < 1:
            raise ConfigError(f"optimizer.base_batch_size={self.base_batch_size} must be at least 1.")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum={self.momentum} must be in [0, 1).")
        if not 0 <= self.ema < 1:
            raise ConfigError(f"optimizer.ema={self.ema} must be in [0, 1); 0.999 averages over about 1,000 steps.")
        if self.weight_decay < 0 or self.clip_norm < 0:
            raise ConfigError("optimizer.weight_decay and optimizer.clip_norm must not be below 0.")

    def peak_learning_rate(self, global_batch_size: int | None) -> float:
        """The learning rate that the schedule scales."""
        rate = DEFAULT_LEARNING_RATES[self.name] if self.learning_rate is None else self.learning_rate
        if self.learning_rate_rule == "none" or global_batch_size is None:
            return rate
        return rate * (global_batch_size / self.base_batch_size) ** (0.5 if self.learning_rate_rule == "sqrt" else 1.0)


DEFAULT_LEARNING_RATES = {"sgd": 0.05, "adamw": 1e-3, "lamb": 2e-3, "lars": 1.0, "muon": 1e-3}


@dataclass(frozen=True)
class ScheduleSettings:
    """How the learning rate goes over the run; see training.schedules for the formulas.

    Attributes:
        name: "constant", "cosine", "step" or "one_cycle".
        warmup_epochs: epochs of linear rise from 0 to the peak; not for one_cycle, which has its own.
        final_scale: with cosine and one_cycle: the last learning rate as a share of the peak.
        step_epochs: with step: the epochs at which the learning rate is multiplied by step_scale.
        rise_share: with one_cycle: share of the run in which the learning rate rises.
        initial_scale: with one_cycle: the first learning rate as a share of the peak.
    """

    name: Literal["constant", "cosine", "step", "one_cycle"] = "cosine"
    warmup_epochs: float = 0.5
    final_scale: float = 0.01
    step_epochs: tuple[float, ...] = ()
    step_scale: float = 0.1
    rise_share: float = 0.3
    initial_scale: float = 0.04

    def __post_init__(self) -> None:
        if self.warmup_epochs < 0:
            raise ConfigError(f"schedule.warmup_epochs={self.warmup_epochs} must not be below 0.")
        if not 0 < self.rise_share < 1:
            raise ConfigError(f"schedule.rise_share={self.rise_share} must be between 0 and 1.")
        if self.name == "step" and not self.step_epochs:
            raise ConfigError("schedule.name=step needs schedule.step_epochs, e.g. [10, 15].")


@dataclass(frozen=True)
class LoopSettings:
    """The [train] section.

    Attributes:
        epochs: passes over the train split.
        global_batch_size: examples per step over all workers; 1 is plain stochastic gradient descent. None: 64, or
            an eighth of a train split of fewer than 512 examples, so that an epoch has some steps.
        seed: of the initial weights, the order, the augmentation and dropout.
        label_smoothing: share of the target that is spread evenly over all classes, in [0, 1).
        class_weights: "balanced" weighs each class by num_examples / (num_classes * its examples).
        precision: of the computation; weights are kept in float32. "auto": see docs/decisions/0050.
        freeze_backbone_epochs: epochs in which only the head learns; then all does, with a fresh optimizer state.
        freeze_norms: with freeze_backbone_epochs: the batch normalisations of the backbone stay as they are to the end.
        unfrozen_scale: factor on the learning rate after the backbone is freed.
        early_stop_epochs: stop after so many epochs without a better val accuracy; 0: never.
        checkpoint_every_seconds, checkpoint_every_steps: between checkpoints inside an epoch; 0: only at epoch ends.
        keep_checkpoints: how many of the last are kept, beside the best.
        log_every_steps: steps between two lines of metrics.jsonl.
        tensorboard: whether TensorBoard events are written.
        mlflow: a tracking URI of MLflow, to which metrics go too; "": none.
        xla: let XLA compile the computation of gradients; not with norms synchronized over workers. On a GPU, a model
            with max pooling is then not the same bits when it is trained again.
    """

    epochs: int = 10
    global_batch_size: int | None = None
    seed: int = 0
    label_smoothing: float = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    precision: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    freeze_backbone_epochs: int = 0
    freeze_norms: bool = True
    unfrozen_scale: float = 1.0
    early_stop_epochs: int = 0
    checkpoint_every_seconds: float = 300.0
    checkpoint_every_steps: int = 0
    keep_checkpoints: int = 2
    log_every_steps: int = 50
    tensorboard: bool = True
    mlflow: str = ""
    xla: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "global_batch_size", "keep_checkpoints", "log_every_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1.")
        for name in (
            "seed",
            "freeze_backbone_epochs",
            "early_stop_epochs",
            "checkpoint_every_seconds",
            "checkpoint_every_steps",
        ):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name}={getattr(self, name)} must not be below 0.")
        if self.seed >= 2**32:
            raise ConfigError(f"train.seed={self.seed} must be below {2**32}.")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(f"train.label_smoothing={self.label_smoothing} must be in [0, 1).")
        if not self.unfrozen_scale > 0:
            raise ConfigError(f"train.unfrozen_scale={self.unfrozen_scale} must be above 0.")


@dataclass(frozen=True)
class StrategySettings:
    """How several workers train one model; see docs/guides/training.md.

    Attributes:
        name: "allreduce" (all workers take every step together) or "diloco" (each takes local steps of its own, and
            their weights are brought together once a round).
        virtual_workers: parts that a global batch is always cut into, whichever workers compute them. With allreduce
            the weights are then the same bits on any number of workers; None: one a worker, as fast as it goes. With
            diloco: the slices that train side by side; None: one a worker of the first session.
        threads_per_virtual_worker: that compute one part; fixed, as sums depend on it.
        accumulate_steps: with allreduce: parts that each worker computes one after another, to save memory.
        sync_norms: with allreduce: whether batch normalisations take their moments over the global batch; None: they
            do, except with virtual workers, which have moments of their own.
        collective: with allreduce: what sums gradients: "ring" over sockets, for CPUs; "tensorflow", NCCL on GPUs;
            or "auto", by whether a worker has a GPU.
        step_timeout_seconds: a worker that has not finished a step (the first, with its compilation, too) after so
            long hangs, and the run is started again. 0: never.
        max_restarts: how often a run is started again after a worker died, without a new checkpoint in between.
        restart_seconds: the wait before that; it doubles each time.
        local_steps: with diloco: steps of a round (H).
        outer_learning_rate, outer_momentum: with diloco: of the outer optimizer, SGD with Nesterov's momentum; 1 and 0
            average the weights.
        keep_inner_state: with diloco: whether a slice's optimizer goes on with its momentum in the next round, by a
            file; else it starts each round afresh, and no bytes are spent on it.
        wire: with diloco: the dtype in which weights and pseudogradients travel.
        max_lost_workers: with diloco: slices of a round that may fail; the others are averaged then.
    """

    name: Literal["allreduce", "diloco"] = "allreduce"
    virtual_workers: int | None = None
    threads_per_virtual_worker: int = 1
    accumulate_steps: int = 1
    sync_norms: bool | None = None
    collective: Literal["auto", "ring", "tensorflow"] = "auto"
    step_timeout_seconds: float = 600.0
    max_restarts: int = 3
    restart_seconds: float = 1.0
    local_steps: int = 100
    outer_learning_rate: float = 1.0
    outer_momentum: float = 0.6
    keep_inner_state: bool = True
    wire: Literal["float32", "bfloat16", "float16"] = "float32"
    max_lost_workers: int = 0

    def __post_init__(self) -> None:
        for name in ("virtual_workers", "threads_per_virtual_worker", "accumulate_steps", "local_steps"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"strategy.{name}={value} must be at least 1.")
        for name in ("step_timeout_seconds", "max_restarts", "restart_seconds", "max_lost_workers"):
            if getattr(self, name) < 0:
                raise ConfigError(f"strategy.{name}={getattr(self, name)} must not be below 0.")
        if not self.outer_learning_rate > 0 or not 0 <= self.outer_momentum < 1:
            raise ConfigError("strategy.outer_learning_rate must be above 0, strategy.outer_momentum in [0, 1).")
        if self.virtual_workers and (self.sync_norms or self.accumulate_steps > 1) and self.name == "allreduce":
            raise ConfigError(
                "strategy.virtual_workers has normalisations and parts of its own: leave sync_norms and "
                "accumulate_steps out, or give no virtual workers."
            )

    def num_parts(self, world_size: int) -> int:
        """The parts that a global batch is cut into."""
        return self.virtual_workers or world_size * self.accumulate_steps

    def num_sharers(self, world_size: int) -> int:
        """Among how many the parts are shared out: the workers; with diloco slices, however many workers there are."""
        return self.num_parts(world_size) if self.name == "diloco" else world_size

    def syncs_norms(self, world_size: int) -> bool:
        """Whether normalisations exchange their moments among so many workers."""
        wanted = self.virtual_workers is None if self.sync_norms is None else self.sync_norms
        return wanted and world_size > 1


@dataclass(frozen=True)
class TrainSettings:
    """All settings of a run; the sections of a recipe are its fields."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataSettings = field(default_factory=DataSettings)
    augment: Augmentation = field(default_factory=Augmentation)
    mix: Mix = field(default_factory=Mix)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    train: LoopSettings = field(default_factory=LoopSettings)
    strategy: StrategySettings = field(default_factory=StrategySettings)

    def for_split(self, num_examples: int, num_parts: int = 1) -> TrainSettings:
        """The same with what depends on the number of train examples filled in.

        Args:
            num_parts: of which a batch size that nobody chose is made a multiple.

        Raises:
            UsageError: the global batch is larger than the split.
        """
        size = self.train.global_batch_size
        if size is None:
            size = min(64, max(8, num_examples // 8), num_examples)
            size = max(1, size // num_parts) * num_parts
        if size > num_examples:
            raise UsageError(
                f"global_batch_size={size} is larger than the split {self.data.train_split!r} with {num_examples} "
                f"examples. Use at most --batch-size {num_examples}."
            )
        return dataclasses.replace(self, train=dataclasses.replace(self.train, global_batch_size=size))

    def for_workers(self, world_size: int, before: Mapping[str, Any] | None = None) -> TrainSettings:
        """The same with what depends on the number of workers filled in: the slices of diloco.

        Args:
            before: the settings of the run that is resumed; its slices stay, however many workers there are now.
        """
        if self.strategy.name != "diloco" or self.strategy.virtual_workers is not None:
            return self
        slices = ((before or {}).get("strategy") or {}).get("virtual_workers") or world_size
        return dataclasses.replace(self, strategy=dataclasses.replace(self.strategy, virtual_workers=slices))

    @classmethod
    def load(
        cls, recipe: str | None = None, assignments: Iterable[str] = (), base: Mapping[str, Any] | None = None
    ) -> TrainSettings:
        """Defaults (or `base`), then the recipe file, then `section.key=value` assignments.

        Raises:
            ConfigError: a missing recipe, an unknown key or a bad value.
        """
        values = {section: dict(content) for section, content in (base or {}).items()}
        for section, content in (config.load_toml(recipe) if recipe else {}).items():
            if not isinstance(content, Mapping):
                raise ConfigError(
                    f"{recipe}: {section}={content!r} stands outside a section. Put it under one, e.g. [train]."
                )
            values.setdefault(section, {}).update(content)
        return config.from_dict(cls, config.override(values, assignments))


def differing_keys(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested settings, sorted."""
    keys = []
    for key in sorted({*first, *second}):
        a, b = first.get(key), second.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            keys += differing_keys(a, b, f"{prefix}{key}.")
        elif _plain(a) != _plain(b):
            keys.append(f"{prefix}{key}")
    return keys


def _plain(value: Any) -> Any:
    # JSON has no tuples: a list and a tuple of the same values are the same setting.
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
