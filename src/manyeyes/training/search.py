"""What `tune` searches: the [search] section of a recipe, and what was found so far as Optuna's study."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from manyeyes import config
from manyeyes.errors import ConfigError, MissingExtraError
from manyeyes.training.settings import TrainSettings

if TYPE_CHECKING:
    import optuna

Metric = Literal["val_accuracy", "val_loss"]
State = Literal["complete", "pruned", "failed"]
# Before so many trials are complete there is nothing that others are held against.
_MIN_COMPLETE = 4
_SECTION = "search"
_EXAMPLE = '"optimizer.learning_rate" = {low = 1e-4, high = 1e-1, log = true} or "optimizer.name" = ["sgd", "adamw"]'


@dataclass(frozen=True)
class Trial:
    """One choice of values, and what became of it.

    Attributes:
        number: from 0, in the order in which they were chosen.
        values: by the dotted key of the setting.
        state: None while it is under way.
        by_epoch: the metric after each epoch, from epoch 1.
        best: of `by_epoch`; None where no epoch ended.
        seconds: that it took, in the session that finished it.
        why: it failed.
    """

    number: int
    values: dict[str, Any]
    state: State | None = None
    by_epoch: tuple[float, ...] = ()
    best: float | None = None
    seconds: float = 0.0
    why: str = ""


@dataclass(frozen=True)
class Search:
    """A recipe with ranges.

    Attributes:
        base: the sections of the recipe.
        ranges: by dotted key: a list of choices, or {low, high, log, step}.
    """

    base: dict[str, Any]
    ranges: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, recipe: str, assignments: Iterable[str] = ()) -> Search:
        """Read a recipe whose [search] section declares ranges.

        Raises:
            ConfigError: no such file or section, or a range or setting that can't be used.
        """
        values = config.load_toml(recipe)
        ranges = values.pop(_SECTION, None)
        if not isinstance(ranges, Mapping) or not ranges:
            raise ConfigError(f"{recipe} has no [{_SECTION}] section with ranges, e.g. {_EXAMPLE}.")
        search = cls(config.override(values, assignments), dict(ranges))
        # A key that is none is told before anything is trained.
        search.settings({key: _first_of(key, given) for key, given in ranges.items()})
        return search

    def settings(self, values: Mapping[str, Any]) -> TrainSettings:
        """The settings of a trial.

        Raises:
            ConfigError: values that don't fit together.
        """
        return config.from_dict(TrainSettings, self.recipe(values))

    def recipe(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The sections of a recipe with these values."""
        return config.override(self.base, [f"{key}={json.dumps(value)}" for key, value in values.items()])

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """As Optuna has them."""
        distributions = require_optuna().distributions
        found: dict[str, optuna.distributions.BaseDistribution] = {}
        for key, given in self.ranges.items():
            if isinstance(given, list):
                found[key] = distributions.CategoricalDistribution(given)
                continue
            kind = distributions.FloatDistribution
            if isinstance(given["low"], int) and isinstance(given["high"], int):
                kind = distributions.IntDistribution
            try:
                found[key] = kind(**given)
            except ValueError as error:
                raise ConfigError(f"{_SECTION}.{key}={given!r} is no range: {error}") from None
        return found


def require_optuna() -> Any:
    """Optuna, quiet.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import optuna
    except ImportError:
        raise MissingExtraError("Tuning", "tune") from None
    optuna.logging.set_verbosity(logging.WARNING)
    return optuna


def create_study(search: Search, metric: Metric, seed: int, trials: Iterable[Trial]) -> optuna.Study:
    """A study that knows the trials so far; theirs must be the numbers from 0 on."""
    optuna = require_optuna()
    study = optuna.create_study(
        direction="maximize" if metric == "val_accuracy" else "minimize",
        sampler=optuna.samplers.TPESampler(seed=seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_MIN_COMPLETE),
    )
    distributions = search.distributions()
    for trial in trials:
        study.add_trial(_frozen(trial, distributions))
    return study


def is_worse_than_most(search: Search, metric: Metric, others: Iterable[Trial], by_epoch: Iterable[float]) -> bool:
    """Whether a trial that reached `by_epoch` so far should be given up: its best is worse than the median of theirs.

    Only complete trials count, and four are needed.
    """
    complete = [trial for trial in others if trial.state == "complete"]
    study = create_study(search, metric, 0, complete)
    trial = study.ask(search.distributions())
    for epoch, value in enumerate(by_epoch, start=1):
        trial.report(value, epoch)
    return bool(trial.should_prune())


def _frozen(trial: Trial, distributions: Mapping[str, Any]) -> optuna.trial.FrozenTrial:
    optuna = require_optuna()
    states = {
        "complete": optuna.trial.TrialState.COMPLETE,
        "pruned": optuna.trial.TrialState.PRUNED,
        "failed": optuna.trial.TrialState.FAIL,
        None: optuna.trial.TrialState.RUNNING,
    }
    return optuna.trial.create_trial(
        state=states[trial.state],
        value=trial.best if trial.state in ("complete", "pruned") else None,
        params=trial.values,
        distributions=dict(distributions),
        intermediate_values=dict(enumerate(trial.by_epoch, start=1)),
    )


def _first_of(key: str, given: Any) -> Any:
    if isinstance(given, list) and given and all(isinstance(each, bool | int | float | str) for each in given):
        return given[0]
    if isinstance(given, Mapping) and {"low", "high"} <= set(given) <= {"low", "high", "log", "step"}:
        low, high = given["low"], given["high"]
        if isinstance(low, int | float) and isinstance(high, int | float) and low <= high:
            return low
    raise ConfigError(f"{_SECTION}.{key}={given!r} is no range. Write e.g. {_EXAMPLE}.")
