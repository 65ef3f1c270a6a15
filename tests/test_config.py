"""Settings refuse what they don't know and say what was meant."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from manyeyes import config
from manyeyes.errors import ConfigError


@dataclass(frozen=True)
class Optimizer:
    name: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.1
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be above 0")


@dataclass(frozen=True)
class Recipe:
    model: str
    num_epochs: int = 10
    seed: int | None = None
    size: tuple[int, int] = (28, 28)
    boundaries: tuple[int, ...] = ()
    counts: dict[str, list[int]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = Optimizer()


def test_a_recipe_becomes_nested_settings_and_back():
    values = {
        "model": "cnn",
        "size": [3, 4],
        "boundaries": [1, 2, 3],
        "counts": {"train": [1, 2]},
        "extra": {"a": {"b": 1}},
        "optimizer": {"name": "adamw", "learning_rate": 1},
    }
    recipe = config.from_dict(Recipe, values)
    assert recipe == Recipe(
        "cnn",
        size=(3, 4),
        boundaries=(1, 2, 3),
        counts={"train": [1, 2]},
        extra={"a": {"b": 1}},
        optimizer=Optimizer("adamw", 1.0),
    )
    assert isinstance(recipe.optimizer.learning_rate, float)
    assert config.from_dict(Recipe, config.to_dict(recipe)) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": "cnn"}, r"Unknown setting modle\. Did you mean model\?"),
        ({"model": "a", "optimizer": {"lerning_rate": 1}}, r"optimizer\.lerning_rate\. Did you mean learning_rate\?"),
        ({"model": "a", "zzz": 1}, r"Unknown setting zzz\. Known: model, num_epochs"),
        ({}, r"Recipe lacks model\."),
        ({"model": 3}, r"model=3 must be of type str"),
        ({"model": "a", "num_epochs": 1.5}, r"num_epochs=1\.5 must be of type int"),
        ({"model": "a", "num_epochs": True}, r"num_epochs=True must be of type int"),
        ({"model": "a", "seed": "x"}, r"seed='x' must be of type int"),
        ({"model": "a", "size": [1]}, r"size=\[1\] must have 2 values"),
        ({"model": "a", "size": 28}, r"size=28 must be a list"),
        ({"model": "a", "boundaries": [1, "b"]}, r"boundaries\[1\]='b' must be of type int"),
        ({"model": "a", "counts": {"train": ["1"]}}, r"counts\.train\[0\]='1' must be of type int"),
        ({"model": "a", "counts": {"train": 1}}, r"counts\.train=1 must be a list"),
        ({"model": "a", "counts": [1]}, r"counts=\[1\] must be a section"),
        ({"model": "a", "optimizer": {"name": "adam"}}, r"optimizer\.name='adam' is not one of sgd, adamw"),
        ({"model": "a", "optimizer": {"learning_rate": True}}, r"learning_rate=True must be of type float"),
        ({"model": "a", "optimizer": {"nesterov": 1}}, r"nesterov=1 must be of type bool"),
        ({"model": "a", "optimizer": {"learning_rate": 0}}, r"optimizer: learning_rate=0\.0 must be above 0"),
        ({"model": "a", "optimizer": "sgd"}, r"optimizer must be a section of settings, got 'sgd'"),
    ],
)
def test_a_bad_setting_is_named_with_what_was_expected(values, message):
    with pytest.raises(ConfigError, match=message):
        config.from_dict(Recipe, values)


def test_overrides_are_typed_as_in_toml_and_leave_the_original_alone():
    original = {"optimizer": {"deep": {"x": 1}}, "seed": 1}
    changed = config.override(
        original,
        ["optimizer.deep.x=2", "model=cnn", "optimizer.nesterov=true", "size=[1, 2]", "new.y=0.5", 'text="a=b"'],
    )
    assert changed == {
        "optimizer": {"deep": {"x": 2}, "nesterov": True},
        "seed": 1,
        "model": "cnn",
        "size": [1, 2],
        "new": {"y": 0.5},
        "text": "a=b",
    }
    assert original == {"optimizer": {"deep": {"x": 1}}, "seed": 1}


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("model", "not an assignment"),
        ("=3", "not an assignment"),
        ("seed.x=1", "seed is a value, not a section"),
    ],
)
def test_a_bad_override_is_refused(assignment, message):
    with pytest.raises(ConfigError, match=message):
        config.override({"seed": 1}, [assignment])


def test_a_missing_or_broken_recipe_file_is_one_clear_line(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no recipe at .*nowhere\.toml"):
        config.load_toml(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="can't be read"):
        config.load_toml(tmp_path)
    (tmp_path / "broken.toml").write_text("a = [1,")
    with pytest.raises(ConfigError, match=r"broken\.toml is not a valid TOML file"):
        config.load_toml(tmp_path / "broken.toml")
    (tmp_path / "good.toml").write_text("model = 'cnn'\n[optimizer]\nname = 'sgd'\n")
    assert config.load_toml(tmp_path / "good.toml") == {"model": "cnn", "optimizer": {"name": "sgd"}}


def test_properties_of_java_may_be_written_with_dots_or_as_sections():
    expected = {"mapreduce.job.priority": "HIGH", "mapreduce.map.speculative": "true", "spark.cores.max": "4"}
    dotted = {"mapreduce.job.priority": "HIGH", "mapreduce.map.speculative": True, "spark.cores.max": 4}
    assert config.flatten(dotted) == expected
    nested = config.override({}, ["mapreduce.job.priority=HIGH", "mapreduce.map.speculative=true", "spark.cores.max=4"])
    assert config.flatten(nested) == expected
