"""Recipes and what they refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyeyes import config
from manyeyes.errors import ConfigError, UsageError
from manyeyes.imaging.preprocessing import Preprocessing
from manyeyes.training.settings import DataSettings, TrainSettings, differing_keys


def test_later_settings_win_over_the_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\nname = "gru"\n[train]\nepochs = 3\nseed = 5\n[augment]\nflip_horizontal = 0.5\n')
    settings = TrainSettings.load(str(recipe), ["train.epochs=7", "optimizer.name=sgd"])
    assert (settings.model.name, settings.train.epochs, settings.train.seed) == ("gru", 7, 5)
    assert (settings.optimizer.name, settings.augment.flip_horizontal) == ("sgd", 0.5)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.epoch=3", "Unknown setting train.epoch. Did you mean epochs?"),
        ("trian.epochs=3", "Did you mean train?"),
        ("train.epochs=0", "train.epochs=0 must be at least 1"),
        ("train.seed=4294967296", "must be below 4294967296"),
        ("train.precision=int8", "is not one of auto, float32, bfloat16, float16"),
        ("optimizer.name=adam", "is not one of sgd, adamw, lamb, lars, muon"),
        ("optimizer.learning_rate=-1", "must be above 0"),
        ("optimizer.ema=1.0", r"must be in \[0, 1\)"),
        ("train.label_smoothing=1", r"must be in \[0, 1\)"),
        ("schedule.name=step", "needs schedule.step_epochs"),
        ("data={fit='pad', resize_short=256}", "goes with data.fit=crop only"),
        ("data.image_size=[3]", r"must be \[height, width\]"),
    ],
)
def test_a_bad_setting_is_named_with_what_is_possible(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings.load(None, [assignment])


def test_a_recipe_with_a_value_outside_of_sections_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text("epochs = 3\n")
    with pytest.raises(ConfigError, match="outside a section"):
        TrainSettings.load(str(recipe))


def test_settings_survive_json_and_differences_are_named() -> None:
    settings = TrainSettings.load(None, ["schedule.step_epochs=[1,2]", "data.image_size=[8,9]"])
    values = config.to_dict(settings)
    assert TrainSettings.load(base=values) == settings
    other = config.to_dict(TrainSettings.load(None, ["schedule.step_epochs=[1,3]", "data.image_size=[8,9]"]))
    assert differing_keys(values, other) == ["schedule.step_epochs"]


def test_a_crop_of_more_than_the_resize_leaves_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 24"):
        DataSettings(image_size=(20, 24), resize_short=22).preprocessing(Preprocessing(), None, 64)


def test_images_are_resized_only_where_the_size_differs() -> None:
    stored = Preprocessing.for_size(28, 28, channels=1)
    assert DataSettings().preprocessing(stored, (28, 28, 1), 64).steps == ()
    assert DataSettings(image_size=(28, 28)).preprocessing(stored, (28, 28, 1), 64).steps == ()
    assert DataSettings(image_size=(20, 24)).preprocessing(stored, (28, 28, 1), 64).output_shape == (20, 24, 1)
    assert DataSettings().preprocessing(Preprocessing(), None, 64).output_shape == (64, 64, 3)


@pytest.mark.parametrize(("num_examples", "size"), [(3, 3), (40, 8), (200, 25), (512, 64), (54_000, 64)])
def test_without_a_batch_size_a_small_dataset_still_gives_an_epoch_some_steps(num_examples: int, size: int) -> None:
    assert TrainSettings().for_split(num_examples).train.global_batch_size == size


def test_a_batch_size_that_was_asked_for_is_kept_or_refused() -> None:
    settings = TrainSettings.load(None, ["train.global_batch_size=41"])
    assert settings.for_split(41).train.global_batch_size == 41
    with pytest.raises(UsageError, match="Use at most --batch-size 40"):
        settings.for_split(40)
