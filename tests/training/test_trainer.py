"""Whole runs in this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from manyeyes.data.dataset import Dataset
from manyeyes.data.pipeline import InputPipeline
from manyeyes.errors import CheckpointError, DatasetError, NonFiniteLossError, UsageError
from manyeyes.training import checkpoint
from manyeyes.training.events import EpochEnd, Event, Notice
from manyeyes.training.run import Run
from manyeyes.training.settings import TrainSettings
from manyeyes.training.trainer import TrainResult, train

TINY = (
    "model.options={width=4, stages=2, convolutions=1}",
    "model.dropout=0.2",
    "train.epochs=3",
    "train.global_batch_size=10",
    "train.precision=float32",
    "train.tensorboard=false",
    "train.log_every_steps=4",
    "optimizer.learning_rate=0.02",
    "augment.shift=0.1",
)


class StopNowError(Exception):
    """Raised by a watcher, as if the process had died."""


def run_tiny(dataset: str, out: Path, *assignments: str, **arguments: Any) -> TrainResult:
    return train(dataset, str(out), TrainSettings.load(None, [*TINY, *assignments]), **arguments)


def read_metrics(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def last_weights(out: Path) -> dict[str, bytes]:
    last = out / "checkpoints" / checkpoint.names(str(out / "checkpoints"))[-1]
    return {path.name: path.read_bytes() for path in last.iterdir()}


@pytest.fixture(scope="module")
def finished(small_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult, list[Event]]:
    out = tmp_path_factory.mktemp("finished") / "run"
    events: list[Event] = []
    result = run_tiny(small_dataset, out, "train.tensorboard=true", on_event=events.append, command=["manyeyes"])
    return out, result, events


def test_a_run_learns_and_says_what_it_reached(finished: tuple[Path, TrainResult, list[Event]]) -> None:
    out, result, events = finished
    assert (result.epochs, result.global_step, result.interrupted_by) == (3, 30, None)
    assert result.val_accuracy is not None
    assert result.val_accuracy > 0.8
    ends = [event for event in events if isinstance(event, EpochEnd)]
    assert [event.epoch for event in ends] == [1, 2, 3]
    assert max(event.val_accuracy or 0 for event in ends) == result.val_accuracy
    epochs, steps = read_metrics(out, "epoch"), read_metrics(out, "step")
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert [line["val_accuracy"] for line in epochs] == [event.val_accuracy for event in ends]
    assert [line["global_step"] for line in steps] == [4, 8, 14, 18, 24, 28]
    assert all(line["loss"] > 0 and line["images_per_second"] >= 0 for line in steps)


def test_tensorboard_events_hold_the_metrics(finished: tuple[Path, TrainResult, list[Event]]) -> None:
    out, _, _ = finished
    (file,) = (out / "tb").iterdir()
    found = {}
    for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
        event = tf.compat.v1.Event.FromString(record)
        for value in event.summary.value:
            found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
            assert value.metadata.plugin_data.plugin_name == "scalars"
    for line in read_metrics(out, "epoch"):
        assert found["epoch/val_accuracy", line["global_step"]] == pytest.approx(line["val_accuracy"])


def test_the_model_of_a_run_has_the_accuracy_that_was_measured(
    finished: tuple[Path, TrainResult, list[Event]], small_dataset: str
) -> None:
    out, result, _ = finished
    run = Run.open(str(out))
    assert run.class_names == ("red", "green", "blue")
    assert run.model.input_shape == (24, 20, 3)
    model = run.load_model("best")
    pipeline = InputPipeline(Dataset(small_dataset), "val", global_batch_size=45, shuffle=False)
    (batch,) = pipeline.batches(0)
    right = model.predict(batch.images, verbose=0).argmax(axis=1) == batch.labels
    assert right.mean() == result.val_accuracy


def test_the_last_step_of_an_epoch_counts_the_examples_that_are_left(small_dataset: str, tmp_path: Path) -> None:
    # Nothing moves at this learning rate, so steps of 10 and a last one of 6 must measure what one step of 96 does.
    still = ("optimizer.learning_rate=1e-12", "optimizer.weight_decay=0", "train.epochs=1", "model.dropout=0")
    still += ("augment.shift=0", "train.freeze_backbone_epochs=1")
    for size, num_steps in ((10, 10), (96, 1), (1, 96)):
        out = tmp_path / str(size)
        run_tiny(small_dataset, out, *still, f"train.global_batch_size={size}")
        (line,) = read_metrics(out, "epoch")
        assert line["global_step"] == num_steps
        if size == 10:
            expected = line
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert line["accuracy"] == expected["accuracy"]


def test_two_runs_with_one_seed_are_the_same_and_with_two_are_not(small_dataset: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        options = (f"train.seed={seed}", "train.epochs=1", "train.class_weights=balanced", "train.label_smoothing=0.1")
        run_tiny(small_dataset, tmp_path / name, *options, "mix.mixup=0.2")
    assert last_weights(tmp_path / "a") == last_weights(tmp_path / "b")
    assert last_weights(tmp_path / "a")["model.safetensors"] != last_weights(tmp_path / "c")["model.safetensors"]


def test_a_run_finds_its_dataset_from_every_working_directory(
    small_dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(small_dataset).parent)
    run_tiny(Path(small_dataset).name, tmp_path / "run", "train.epochs=1")
    assert Run.open(str(tmp_path / "run")).dataset == small_dataset


def test_averaged_weights_are_what_a_run_gives(small_dataset: str, tmp_path: Path) -> None:
    run_tiny(small_dataset, tmp_path / "run", "optimizer.ema=0.9", "train.epochs=1")
    run = Run.open(str(tmp_path / "run"))
    found = run.checkpoint("last").arrays
    model = run.load_model("last")
    np.testing.assert_array_equal(model.get_layer("logits").kernel.numpy(), found["ema"]["logits/kernel"])
    assert not np.array_equal(found["ema"]["logits/kernel"], found["model"]["logits/kernel"])


def test_freeze_then_unfreeze_resumes_to_the_same_weights(small_dataset: str, tmp_path: Path) -> None:
    freezing = ("train.freeze_backbone_epochs=1", "train.unfrozen_scale=0.1", "optimizer.ema=0.9")
    run_tiny(small_dataset, tmp_path / "whole", *freezing)

    def stop(event: Event) -> None:
        if isinstance(event, EpochEnd) and event.epoch < 3:
            raise StopNowError

    with pytest.raises(StopNowError):
        run_tiny(small_dataset, tmp_path / "parts", *freezing, on_event=stop)
    with pytest.raises(StopNowError):
        train(small_dataset, str(tmp_path / "parts"), resume=True, on_event=stop)
    result = train(small_dataset, str(tmp_path / "parts"), resume=True)
    assert result.epochs == 3
    assert last_weights(tmp_path / "parts") == last_weights(tmp_path / "whole")
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "whole", "epoch")]
    assert rates[1] < rates[0] / 10


@pytest.mark.parametrize("freeze_norms", [True, False])
def test_a_fine_tuned_backbone_learns_and_its_norms_stay_unless_told(
    small_dataset: str, tmp_path: Path, freeze_norms: bool
) -> None:
    setting = f"train.freeze_norms={str(freeze_norms).lower()}"
    run_tiny(small_dataset, tmp_path / "run", "train.freeze_backbone_epochs=1", setting, "train.keep_checkpoints=3")
    directory = str(tmp_path / "run/checkpoints")
    frozen, *_, free = (checkpoint.load(directory, name).arrays["model"] for name in checkpoint.names(directory))
    changed = {key for key in frozen if not np.array_equal(frozen[key], free[key])}
    norms = {key for key in frozen if "_norm" in key}
    assert norms and {key for key in frozen if "_conv" in key} <= changed
    assert not (norms & changed) if freeze_norms else norms <= changed


def test_the_last_and_the_best_checkpoints_are_kept(small_dataset: str, tmp_path: Path) -> None:
    # The best is the first epoch: after it the learning rate is far too high.
    out = tmp_path / "run"
    worse = ("schedule.name=step", "schedule.step_epochs=[1]", "schedule.step_scale=500", "schedule.warmup_epochs=0")
    run_tiny(small_dataset, out, *worse, "train.epochs=4", "optimizer.name=sgd", "train.keep_checkpoints=1")
    accuracies = [line["val_accuracy"] for line in read_metrics(out, "epoch")]
    best = 10 * (1 + accuracies.index(max(accuracies)))
    assert best < 40
    assert checkpoint.names(str(out / "checkpoints")) == [f"step-{step:08d}" for step in (best, 40)]
    assert Run.open(str(out)).checkpoint("best").state.global_step == best


def test_checkpoints_are_made_inside_an_epoch_by_time(small_dataset: str, tmp_path: Path) -> None:
    often = ("train.checkpoint_every_seconds=1e-6", "train.keep_checkpoints=100", "train.epochs=1")
    run_tiny(small_dataset, tmp_path / "run", *often)
    found = checkpoint.names(str(tmp_path / "run/checkpoints"))
    assert found == [checkpoint.name_of_step(step) for step in range(1, 11)]


def test_a_run_that_died_before_its_first_checkpoint_resumes_from_the_start(
    finished: tuple[Path, TrainResult, list[Event]], small_dataset: str, tmp_path: Path
) -> None:
    out, _, _ = finished

    def stop(event: Event) -> None:
        raise StopNowError

    with pytest.raises(StopNowError):
        run_tiny(small_dataset, tmp_path / "run", "train.tensorboard=true", on_event=stop)
    train(small_dataset, str(tmp_path / "run"), resume=True)
    assert last_weights(tmp_path / "run") == last_weights(out)


def test_a_run_that_is_older_than_a_setting_resumes(small_dataset: str, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        raise StopNowError

    with pytest.raises(StopNowError):
        run_tiny(small_dataset, tmp_path / "run", "train.epochs=1", on_event=stop)
    config_file = tmp_path / "run" / "config.json"
    values = json.loads(config_file.read_text())
    del values["settings"]["train"]["freeze_norms"]
    config_file.write_text(json.dumps(values))
    assert train(small_dataset, str(tmp_path / "run"), resume=True).epochs == 1


def test_a_damaged_checkpoint_is_passed_over_on_resume(small_dataset: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_tiny(small_dataset, out)
    whole = last_weights(out)
    newest = out / "checkpoints/step-00000030/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    events: list[Event] = []
    train(small_dataset, str(out), resume=True, on_event=events.append)
    assert any(isinstance(event, Notice) and "fails its checksum" in event.text for event in events)
    assert last_weights(out) == whole
    for file in (out / "checkpoints").glob("*/state.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"All checkpoints .* are damaged"):
        train(small_dataset, str(out), resume=True)


def test_a_run_whose_first_checkpoint_was_half_published_on_s3_starts_again(small_dataset: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_tiny(small_dataset, out)
    whole = last_weights(out)
    shutil.rmtree(out / "checkpoints/step-00000020")
    (out / "checkpoints/step-00000030/state.json").unlink()
    events: list[Event] = []
    train(small_dataset, str(out), resume=True, on_event=events.append)
    assert any(isinstance(event, Notice) and "incomplete" in event.text for event in events)
    assert last_weights(out) == whole


def test_training_stops_when_val_accuracy_no_longer_rises(small_dataset: str, tmp_path: Path) -> None:
    still = ("optimizer.learning_rate=1e-12", "optimizer.weight_decay=0", "train.freeze_backbone_epochs=50")
    result = run_tiny(small_dataset, tmp_path / "run", *still, "train.epochs=50", "train.early_stop_epochs=2")
    assert (result.epochs, result.best_epoch, result.stopped_early) == (3, 1, True)
    again = train(small_dataset, str(tmp_path / "run"), resume=True)
    assert (again.epochs, again.global_step) == (3, 30)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_bad_checkpoint(
    small_dataset: str, tmp_path: Path, steps: int
) -> None:
    out = tmp_path / "run"
    with pytest.raises(
        NonFiniteLossError, match=r"became NaN or infinite in step \d+ of epoch 1 .* Try a lower"
    ) as caught:
        run_tiny(
            small_dataset,
            out,
            "optimizer.name=sgd",
            "optimizer.learning_rate=1e30",
            "schedule.name=constant",
            "schedule.warmup_epochs=0",
            f"train.checkpoint_every_steps={steps}",
        )
    assert "\n" not in str(caught.value)
    assert "learning rate 1e+30" in str(caught.value)
    for name in checkpoint.names(str(out / "checkpoints")):
        for arrays in checkpoint.load(str(out / "checkpoints"), name).arrays.values():
            assert all(np.isfinite(array).all() for array in arrays.values())


def test_bfloat16_and_float16_learn_too(small_dataset: str, tmp_path: Path) -> None:
    for precision in ("bfloat16", "float16"):
        result = run_tiny(small_dataset, tmp_path / precision, f"train.precision={precision}")
        assert result.precision == precision
        assert (result.val_accuracy or 0) > 0.8
        model = Run.open(str(tmp_path / precision)).load_model()
        assert model.compute_dtype == "float32"


def test_a_dataset_without_val_trains_with_a_notice(small_dataset: str, tmp_path: Path) -> None:
    events: list[Event] = []
    result = run_tiny(
        small_dataset, tmp_path / "run", "data.val_split=holdout", "train.epochs=1", on_event=events.append
    )
    assert result.val_accuracy is None
    assert any(isinstance(event, Notice) and "no split 'holdout'" in event.text for event in events)
    assert Run.open(str(tmp_path / "run")).load_model("best") is not None


def test_a_train_split_of_one_class_is_refused_and_an_absent_class_is_told(small_dataset: str, tmp_path: Path) -> None:
    dataset = tmp_path / "dataset"
    shutil.copytree(small_dataset, dataset)
    manifest = json.loads((dataset / "manifest.json").read_text())
    for written, outcome in (
        ([96, 0, 0], "one class only in its split 'train', none of green, blue"),
        ([64, 32, 0], ""),
    ):
        manifest["counts"]["written"]["train"] = written
        (dataset / "manifest.json").write_text(json.dumps(manifest))
        if outcome:
            with pytest.raises(DatasetError, match=outcome):
                run_tiny(str(dataset), tmp_path / "run")
        else:
            events: list[Event] = []
            run_tiny(str(dataset), tmp_path / "run", "train.epochs=1", on_event=events.append)
            assert Notice("The split 'train' has no example of: blue.") in events


def test_another_input_size_is_made_of_the_stored_one(small_dataset: str, tmp_path: Path) -> None:
    run_tiny(small_dataset, tmp_path / "run", "data.image_size=[16, 12]", "data.fit=stretch", "train.epochs=1")
    run = Run.open(str(tmp_path / "run"))
    assert run.model.input_shape == (16, 12, 3)
    assert run.preprocessing.steps == Dataset(small_dataset).preprocessing.steps + run.extra_preprocessing.steps
    assert run.extra_preprocessing.output_shape == (16, 12, 3)


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["train.global_batch_size=97"],
            "is larger than the split 'train' with 96 examples. Use at most --batch-size 96",
        ),
        (["data.image_size=[1, 1]"], "can't take images of 1 x 1"),
        (["model.name=cmn"], "There is no model 'cmn'. Did you mean cnn"),
        (["model.num_classes=4"], "come from the dataset"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    small_dataset: str, tmp_path: Path, assignments: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run_tiny(small_dataset, tmp_path / "run", *assignments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_run_is_neither_overwritten_nor_resumed_as_another(
    finished: tuple[Path, TrainResult, list[Event]], small_dataset: str, tmp_path: Path
) -> None:
    out, _, _ = finished
    with pytest.raises(UsageError, match=r"already holds a run. Go on with it by --resume"):
        run_tiny(small_dataset, out)
    with pytest.raises(UsageError, match=r"other settings: model.dropout, train.seed differ"):
        run_tiny(small_dataset, out, "train.seed=9", "model.dropout=0.5", resume=True)
    with pytest.raises(UsageError, match="There is no run at"):
        run_tiny(small_dataset, tmp_path / "none", resume=True)
    # What only changes how the run is kept may differ.
    assert run_tiny(small_dataset, out, "train.keep_checkpoints=7", resume=True).global_step == 30
