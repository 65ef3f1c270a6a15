"""Cross-validation: every example held out once, folds that resume, and honest intervals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.registry import create_engine
from manyeyes.errors import EngineError, UsageError
from manyeyes.evaluation import crossval as module
from manyeyes.evaluation.crossval import CrossvalResult, crossval, held_out_predictions, load_crossval
from manyeyes.evaluation.folds import FoldSettings, divide
from manyeyes.evaluation.paired import compare
from manyeyes.evaluation.predictions import read_predictions
from manyeyes.training.settings import TrainSettings

FOLDS = FoldSettings(folds=3, group_duplicates=False)
RECIPE = TrainSettings.load(
    None,
    [
        "model.name=cnn",
        "model.options.width=4",
        "model.options.stages=2",
        "model.options.convolutions=1",
        "train.epochs=2",
        "train.tensorboard=false",
        "optimizer.learning_rate=0.01",
    ],
)


@pytest.fixture(scope="module")
def result(small_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> CrossvalResult:
    out = str(tmp_path_factory.mktemp("crossval") / "out")
    return crossval(small_dataset, out, RECIPE, FOLDS, engine=create_engine("inline"))


def _paths(dataset: Dataset, split: str) -> set[str]:
    return {path for shard in dataset.split(split).shards for rows in dataset.rows(shard) for path in rows.paths}


def test_each_example_is_held_out_once_by_a_model_that_was_not_trained_on_it(
    result: CrossvalResult, small_dataset: str
) -> None:
    everything = _paths(Dataset(small_dataset), "train") | _paths(Dataset(small_dataset), "val")
    held_out: list[str] = []
    for fold in range(3):
        view = Dataset(f"{result.out}/folds/repeat-0-fold-{fold}/dataset")
        splits = [_paths(view, name) for name in ("train", "val", "test")]
        assert set.union(*splits) == everything
        assert sum(map(len, splits)) == len(everything)
        held_out += splits[2]
    assert sorted(held_out) == sorted(everything)
    found = list(read_predictions(held_out_predictions(result.out)))
    assert sorted(path for part in found for path in part.paths) == sorted(everything)
    assert result.pooled.num_examples == len(everything)
    right = sum(int((part.predicted == part.labels).sum()) for part in found)
    assert result.pooled.accuracy == right / len(everything)


def test_the_figures_are_those_of_the_folds(result: CrossvalResult) -> None:
    losses = [fold.figures["log_loss"] for fold in result.folds]
    found = result.figures["log_loss"]
    assert found.mean == pytest.approx(np.mean(losses))
    assert found.std == pytest.approx(np.std(losses, ddof=1))
    assert found.low is not None and found.high is not None
    assert found.low <= found.mean <= found.high
    assert load_crossval(result.out) == dataclasses.replace(result, folds=result.folds)
    assert result.figures["accuracy"].mean > 0.5  # three colours; chance is a third


def test_two_workers_find_what_one_process_finds(small_dataset: str, tmp_path: Path) -> None:
    settings = FoldSettings(folds=2, group_duplicates=False, val=0)
    recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, epochs=1))
    results = [
        crossval(small_dataset, str(tmp_path / engine.name), recipe, settings, engine=engine)
        for engine in (create_engine("inline"), create_engine("local", 2))
    ]
    one, two = (result.folds for result in results)
    assert [fold.num_train for fold in one] == [fold.num_held_out for fold in reversed(one)]
    assert [(fold.fold, fold.num_train, fold.num_val) for fold in one] == [
        (fold.fold, fold.num_train, fold.num_val) for fold in two
    ]
    # Threads differ, so that sums are made in another order: the same examples, not the same bits.
    for first, second in zip(one, two, strict=True):
        assert second.figures["log_loss"] == pytest.approx(first.figures["log_loss"], rel=0.02)


def test_a_failed_fold_loses_no_other_and_is_all_that_is_done_again(
    small_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    recipe = dataclasses.replace(RECIPE, train=dataclasses.replace(RECIPE.train, epochs=1))
    ran: list[int] = []
    real = module.train

    def train(view: str, run: str, *arguments: Any, **options: Any) -> Any:
        fold = int(run.split("fold-")[1].split("/")[0])
        ran.append(fold)
        if fold == 1 and len(ran) == 2:
            raise UsageError("no luck")
        return real(view, run, *arguments, **options)

    monkeypatch.setattr(module, "train", train)
    with pytest.raises(EngineError, match=r"1 of 3 folds failed: repeat 0, fold 1 \(no luck\)"):
        crossval(small_dataset, out, recipe, FOLDS, engine=create_engine("inline"))
    assert ran == [0, 1, 2]
    seen: list[int] = []
    result = crossval(
        small_dataset,
        out,
        recipe,
        FOLDS,
        engine=create_engine("inline"),
        on_fold=lambda num_done, num_all, last: seen.append(num_done),
    )
    assert ran == [0, 1, 2, 1]
    assert seen == [0, 1, 2, 3]
    assert len(result.folds) == 3


def test_another_recipe_in_the_same_place_is_refused(result: CrossvalResult, small_dataset: str) -> None:
    with pytest.raises(UsageError, match="another recipe"):
        crossval(small_dataset, result.out, TrainSettings(), FOLDS, engine=create_engine("inline"))


def test_a_recipe_compared_with_itself_differs_by_nothing(result: CrossvalResult) -> None:
    comparison = compare(result.out, result.out)
    assert comparison.figures["accuracy"].difference.mean == 0
    assert comparison.figures["accuracy"].p_value == 1
    assert (comparison.mcnemar.only_first, comparison.mcnemar.only_second) == (0, 0)


def test_other_folds_are_not_compared(result: CrossvalResult, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    content = json.loads(Path(result.out, "crossval.json").read_text())
    content["folds_fingerprint"] = "0123456789abcdef"
    (other / "crossval.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match="it has other folds"):
        compare(result.out, str(other))


def test_a_comparison_with_other_folds_is_refused_before_anything_is_trained(
    result: CrossvalResult, small_dataset: str, tmp_path: Path
) -> None:
    settings = dataclasses.replace(FOLDS, seed=1)
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"has other folds\..*--folds 3 --repeats 1 --seed 0"):
        crossval(small_dataset, str(out), RECIPE, settings, engine=create_engine("inline"), against=result.out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("splits", "message"),
    [(("train", "train"), "each split once"), (("",), "each split once"), (("train", "vla"), "has no split 'vla'")],
)
def test_splits_that_can_not_be_divided_are_told(small_dataset: str, splits: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        divide(Dataset(small_dataset), FoldSettings(splits=splits, group_duplicates=False), create_engine("inline"))


def test_the_val_split_has_the_share_that_was_asked_for_whatever_the_groups_are(small_dataset: str) -> None:
    data = Dataset(small_dataset)
    folds = divide(data, dataclasses.replace(FOLDS, val=0.4), create_engine("inline"))
    num_left = int((folds.assignments[0] != 0).sum())
    assert abs(int((folds.splits_of(0, 0) == "val").sum()) - 0.4 * num_left) <= 2
    # One group holds two fifths of what is left: a val split of a tenth does not take it.
    units = folds.units.copy()
    units[np.flatnonzero(folds.assignments[0] != 0)[: 2 * num_left // 5]] = 0
    grouped = dataclasses.replace(folds, units=units, settings=dataclasses.replace(FOLDS, val=0.1))
    splits = grouped.splits_of(0, 0)
    assert 0 < int((splits == "val").sum()) <= 0.15 * num_left


def test_near_duplicates_and_groups_are_never_divided(tmp_path: Path) -> None:
    """Twelve pictures, each in two qualities; two of them are of one group."""
    draw = np.random.default_rng(0)
    rows = ["path,label,group"]
    for index in range(12):
        photo = cv2.resize(draw.integers(0, 256, (9, 9, 3), np.uint8), (96, 96), interpolation=cv2.INTER_CUBIC)
        for version, quality in enumerate((95, 60)):
            name = f"{index}-{version}.jpg"
            cv2.imwrite(str(tmp_path / name), photo, [cv2.IMWRITE_JPEG_QUALITY, quality])
            rows.append(f"{name},{'ab'[index % 2]},{'pair' if index in (3, 4) else ''}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    dataset = str(tmp_path / "dataset")
    engine = create_engine("inline")
    ingest(str(tmp_path / "table.csv"), dataset, settings=IngestSettings(val=0, test=0, size=(96, 96)), engine=engine)
    data = Dataset(dataset)
    folds = divide(data, FoldSettings(folds=4, splits=("train",), val=0.25), engine)
    paths = [path for shard in folds.shards for rows in data.rows(shard) for path in rows.paths]
    for repeat_and_fold in ((0, 0), (0, 1)):
        splits = dict(zip(paths, folds.splits_of(*repeat_and_fold).tolist(), strict=True))
        for index in range(12):
            assert splits[f"{index}-0.jpg"] == splits[f"{index}-1.jpg"]
        assert splits["3-0.jpg"] == splits["4-0.jpg"]
    without = divide(data, FoldSettings(folds=4, splits=("train",), group_duplicates=False), engine)
    fold_of = dict(zip(paths, without.assignments[0].tolist(), strict=True))
    assert any(fold_of[f"{index}-0.jpg"] != fold_of[f"{index}-1.jpg"] for index in range(12))


def test_divisions_of_repeats_differ_and_depend_on_nothing_but_the_seed(small_dataset: str) -> None:
    settings = FoldSettings(folds=4, repeats=2, group_duplicates=False)
    first = divide(Dataset(small_dataset), settings, create_engine("inline"))
    second = divide(Dataset(small_dataset), settings, create_engine("local", 2))
    assert (first.assignments == second.assignments).all()
    assert (first.assignments[0] != first.assignments[1]).any()
    assert (
        first.fingerprint
        != divide(Dataset(small_dataset), dataclasses.replace(settings, seed=5), create_engine("inline")).fingerprint
    )
