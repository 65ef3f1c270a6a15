"""The search of settings: what is declared is searched, what is bad is given up, what was done is not done again."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path
from typing import Any

import pytest

from manyeyes.engines.registry import create_engine
from manyeyes.errors import ConfigError, TrainingError, UsageError
from manyeyes.training import tune as module
from manyeyes.training.search import Search, Trial, is_worse_than_most
from manyeyes.training.settings import TrainSettings
from manyeyes.training.tune import TuneResult, tune

RECIPE = """
[model]
name = "cnn"
options = {width = 4, stages = 2, convolutions = 1}

[train]
epochs = 3
tensorboard = false

[search]
"optimizer.learning_rate" = {low = 1e-6, high = 1e-1, log = true}
"optimizer.name" = ["sgd", "adamw"]
"train.global_batch_size" = {low = 8, high = 32, step = 8}
"""


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> Search:
    path = tmp_path_factory.mktemp("recipe") / "search.toml"
    path.write_text(RECIPE)
    return Search.load(str(path))


@pytest.fixture(scope="module")
def result(small_dataset: str, search: Search, tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    out = str(tmp_path_factory.mktemp("tune") / "out")
    return tune(small_dataset, out, search, num_trials=7, engine=create_engine("inline"))


def test_the_best_trial_becomes_a_recipe_that_trains(result: TuneResult) -> None:
    complete = [trial for trial in result.trials if trial.state == "complete"]
    assert result.best.best == max(trial.best or 0 for trial in complete)
    settings = TrainSettings.load(result.recipe)
    assert settings.optimizer.name == result.best.values["optimizer.name"]
    assert settings.optimizer.learning_rate == result.best.values["optimizer.learning_rate"]
    assert settings.model.options["width"] == 4
    assert "search" not in tomllib.loads(Path(result.recipe).read_text())


def test_every_trial_takes_its_values_from_the_declared_ranges(result: TuneResult) -> None:
    assert [trial.number for trial in result.trials] == list(range(7))
    for trial in result.trials:
        assert 1e-6 <= trial.values["optimizer.learning_rate"] <= 1e-1
        assert trial.values["optimizer.name"] in ("sgd", "adamw")
        assert trial.values["train.global_batch_size"] in (8, 16, 24, 32)
    assert len({trial.values["optimizer.learning_rate"] for trial in result.trials}) == 7


def test_only_the_best_trial_keeps_its_checkpoints(result: TuneResult) -> None:
    runs = Path(result.recipe).parent / "trials"
    kept = [int(path.parents[1].name) for path in runs.glob("*/run/checkpoints")]
    assert kept == [result.best.number]


def test_an_interrupted_search_goes_on_as_if_it_had_not_been(
    result: TuneResult, small_dataset: str, search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of the fifth trial; two trials more than at first are asked for."""
    real, trained = module.train, []

    class KilledError(BaseException):
        pass

    def train(dataset: str, run: str, settings: TrainSettings, **options: Any) -> Any:
        number = int(Path(run).parent.name)
        trained.append(number)
        if number == 4 and trained.count(4) == 1:

            def die_after_an_epoch(event: Any, watch: Any = options["on_event"]) -> None:
                watch(event)
                if type(event).__name__ == "EpochEnd":
                    raise KilledError

            options["on_event"] = die_after_an_epoch
        return real(dataset, run, settings, **options)

    monkeypatch.setattr(module, "train", train)
    out = str(tmp_path / "out")
    with pytest.raises(KilledError):
        tune(small_dataset, out, search, num_trials=5, engine=create_engine("inline"))
    assert trained == [0, 1, 2, 3, 4]
    again = tune(small_dataset, out, search, num_trials=7, engine=create_engine("inline"))
    assert trained == [0, 1, 2, 3, 4, 4, 5, 6]
    without_time = [dataclasses.replace(trial, seconds=0.0) for trial in again.trials]
    assert without_time == [dataclasses.replace(trial, seconds=0.0) for trial in result.trials]


def test_a_trial_is_given_up_when_it_is_worse_than_the_median_of_the_others(search: Search) -> None:
    values = {"optimizer.learning_rate": 0.01, "optimizer.name": "sgd", "train.global_batch_size": 8}
    others = [
        Trial(number, values, "complete", (reached, reached + 0.1, reached + 0.2), reached + 0.2)
        for number, reached in enumerate((0.3, 0.4, 0.5, 0.6))
    ]
    assert is_worse_than_most(search, "val_accuracy", others, [0.3])
    assert not is_worse_than_most(search, "val_accuracy", others, [0.46])
    assert is_worse_than_most(search, "val_accuracy", others, [0.46, 0.5])
    assert not is_worse_than_most(search, "val_loss", others, [0.3])
    assert not is_worse_than_most(search, "val_accuracy", others[:3], [0.0])  # too few to judge by


def test_a_trial_that_fails_is_told_and_the_others_go_on(
    small_dataset: str, search: Search, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.train

    def train(dataset: str, run: str, settings: TrainSettings, **options: Any) -> Any:
        if run.endswith("0000/run"):
            raise TrainingError("the loss became NaN")
        return real(dataset, run, settings, **options)

    monkeypatch.setattr(module, "train", train)
    result = tune(small_dataset, str(tmp_path / "out"), search, num_trials=2, engine=create_engine("inline"))
    assert [trial.state for trial in result.trials] == ["failed", "complete"]
    assert result.trials[0].why == "the loss became NaN"
    # What was in the way has gone: the same command tries it again.
    monkeypatch.setattr(module, "train", real)
    again = tune(small_dataset, str(tmp_path / "out"), search, num_trials=2, engine=create_engine("inline"))
    assert [trial.state for trial in again.trials] == ["complete", "complete"]
    assert again.trials[0].values == result.trials[0].values


def test_another_search_in_the_same_place_is_refused(result: TuneResult, small_dataset: str, search: Search) -> None:
    other = dataclasses.replace(search, ranges={"optimizer.learning_rate": [0.1, 0.2]})
    with pytest.raises(UsageError, match="another search"):
        tune(small_dataset, str(Path(result.recipe).parent), other, engine=create_engine("inline"))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("", "has no \\[search\\] section"),
        ('[search]\n"optimizer.learning_rte" = [0.1]', "learning_rate"),
        ('[search]\n"model.dropout" = 0.5', "is no range"),
        ('[search]\n"model.dropout" = {low = 0.5}', "is no range"),
        ('[search]\n"optimizer.name" = ["sgdd"]', "sgdd"),
        ('[search]\n"model.dropout" = {low = 0.5, high = 0.1}', "is no range"),
    ],
)
def test_a_range_that_can_not_be_searched_is_told_before_anything_is_trained(
    section: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.toml").write_text(section)
    with pytest.raises(ConfigError, match=message):
        Search.load(str(tmp_path / "recipe.toml"))
