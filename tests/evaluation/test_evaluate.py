"""`evaluate` measures every example once, on runs and bundles, with the same numbers for any engine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import sklearn.metrics
from typer.testing import CliRunner

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.data.ingest import IngestSettings, ingest
from manyeyes.engines.inline import InlineEngine
from manyeyes.engines.local import LocalEngine
from manyeyes.errors import DatasetError, EngineError, ManyeyesError, UsageError
from manyeyes.evaluation import tasks
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.recogniser import Recogniser


def examples_of(dataset: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    data = Dataset(dataset)
    row_groups = [rows for shard in data.split(split).shards for rows in data.rows(shard)]
    return np.concatenate([rows.images for rows in row_groups]), np.concatenate([rows.labels for rows in row_groups])


@pytest.fixture(scope="module")
def evaluated_run(small_run, small_dataset, tmp_path_factory):
    """A copy of the run, with its evaluation inside."""
    uri = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(small_run, uri)
    lines = [
        {"kind": "step", "epoch": 1, "global_step": 3, "loss": 1.2},
        {"kind": "epoch", "epoch": 1, "global_step": 6, "loss": 1.0, "accuracy": 0.5, "learning_rate": 0.02}
        | {"val_loss": 0.9, "val_accuracy": 0.6},
        {"kind": "epoch", "epoch": 2, "global_step": 12, "loss": 0.4, "accuracy": 0.9, "learning_rate": 0.01}
        | {"val_loss": None, "val_accuracy": None},
    ]
    text = "\n".join(json.dumps(line) for line in lines) + '\n{"kind": "epoch", "epo'
    (uri / "metrics.jsonl").write_text(text)
    return evaluate(str(uri), small_dataset)


def test_the_numbers_of_a_run_are_those_of_its_model(evaluated_run, small_run, small_dataset):
    from manyeyes.training.run import Run

    images, labels = examples_of(small_dataset, "test")
    logits = Run.open(small_run).load_model("best").predict(images, verbose=0)
    metrics = evaluated_run.metrics
    assert metrics.num_examples == len(labels) == 30
    assert metrics.accuracy == pytest.approx(sklearn.metrics.accuracy_score(labels, logits.argmax(axis=1)))
    assert metrics.accuracy > 0.9
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    assert metrics.log_loss == pytest.approx(sklearn.metrics.log_loss(labels, probabilities), abs=1e-5)


def test_a_run_gets_its_numbers_and_pictures_into_its_directory(evaluated_run, small_dataset):
    directory = Path(evaluated_run.model) / "evaluation" / "test"
    names = ["evaluation.json", "confusion_matrix.png", "learning_curves.png"]
    assert [Path(uri) for uri in evaluated_run.files] == [directory / name for name in names]
    for name in names[1:]:
        assert (directory / name).read_bytes().startswith(b"\x89PNG")
    written = json.loads((directory / names[0]).read_text())
    assert written["dataset_fingerprint"] == Dataset(small_dataset).manifest.fingerprint
    assert written["model_kind"] == "run"
    assert written["metrics"]["accuracy_interval"]["low"] < written["metrics"]["accuracy"]
    assert np.sum(written["metrics"]["confusion_matrix"]) == 30


def test_a_second_evaluation_writes_the_same_bytes(evaluated_run, small_dataset, tmp_path):
    again = evaluate(evaluated_run.model, small_dataset, out=str(tmp_path / "again"))
    for first, second in zip(evaluated_run.files, again.files, strict=True):
        assert Path(first).read_bytes() == Path(second).read_bytes()


def test_a_bundle_gets_the_numbers_of_its_run_and_writes_only_where_told(
    evaluated_run, small_bundle, small_dataset, tmp_path
):
    before = sorted(Path(small_bundle).iterdir())
    result = evaluate(small_bundle, small_dataset)
    assert result.files == ()
    assert sorted(Path(small_bundle).iterdir()) == before
    assert result.metrics.confusion_matrix == evaluated_run.metrics.confusion_matrix
    assert result.metrics.log_loss == pytest.approx(evaluated_run.metrics.log_loss, abs=1e-4)
    told = evaluate(small_bundle, small_dataset, out=f"file://{tmp_path}/deep/er", engine=InlineEngine())
    assert told.metrics == result.metrics
    assert [uri.rpartition("/")[2] for uri in told.files] == ["evaluation.json", "confusion_matrix.png"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "bundle"])
def test_any_number_of_workers_and_any_cut_give_the_same_numbers(
    kind, small_run, small_bundle, small_dataset, tmp_path, monkeypatch
):
    model = small_run if kind == "run" else small_bundle
    out = str(tmp_path / "out")
    whole = evaluate(model, small_dataset, split="train", out=out, engine=InlineEngine())
    monkeypatch.setattr(tasks, "TASK_EXAMPLES", 1)
    drawn = []
    parted = evaluate(
        model, small_dataset, split="train", out=out, engine=LocalEngine(2), on_progress=lambda *n: drawn.append(n)
    )
    assert parted.metrics == whole.metrics
    assert parted.notable == whole.notable
    assert len(whole.notable.uncertain) == 24
    assert drawn == [(done, 96) for done in (0, 16, 32, 48, 64, 80, 96)]


def test_the_manifest_of_a_dataset_is_read_once_however_many_tasks_there_are(small_bundle, small_dataset, monkeypatch):
    opened = []
    verify = Dataset.verify
    monkeypatch.setattr(
        Dataset, "verify", lambda dataset, how="full": (opened.append(dataset.uri), verify(dataset, how))
    )
    monkeypatch.setattr(tasks, "TASK_EXAMPLES", 1)
    assert evaluate(small_bundle, small_dataset, split="train", engine=InlineEngine()).metrics.num_examples == 96
    assert opened == [small_dataset]


def test_the_logits_of_an_image_do_not_depend_on_its_neighbours(small_run, small_dataset):
    images, _ = examples_of(small_dataset, "test")
    logits_of = Recogniser.open(small_run).load(batch_size=8)
    alone = np.concatenate([logits_of(images[i : i + 1]) for i in range(8)])
    reversed_in_company = logits_of(images[7::-1])
    assert np.array_equal(alone, reversed_in_company[::-1])


def test_encoded_images_of_any_size_go_through_the_whole_preprocessing(
    small_run, small_bundle, small_dataset, tmp_path
):
    class_names = Dataset(small_dataset).class_names
    images, labels = examples_of(small_dataset, "test")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        larger = cv2.resize(image, (20 + 7 * (index % 5), 24 + 5 * (index % 3)))[:, :, ::-1]
        folder = tmp_path / "photos" / class_names[label]
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{index}.png"), larger)
    settings = IngestSettings(encoding="jpeg", val=0.0, test=0.0, class_names=class_names)
    ingest(str(tmp_path / "photos"), str(tmp_path / "data"), settings=settings, engine=InlineEngine())

    run = Recogniser.open(small_run)
    files = sorted((tmp_path / "photos").glob("*/*.png"))
    logits = run.load(64)(np.stack([run.preprocessing(file.read_bytes()) for file in files]))
    truth = np.array([class_names.index(file.parent.name) for file in files])
    expected = sklearn.metrics.confusion_matrix(truth, logits.argmax(axis=1), labels=[0, 1, 2])
    for model in (small_run, small_bundle):
        result = evaluate(
            model, str(tmp_path / "data"), split="train", out=str(tmp_path / "out"), engine=InlineEngine()
        )
        assert np.array_equal(result.metrics.confusion_matrix, expected)


class ForgetfulEngine(InlineEngine):
    """Loses the last task."""

    def map_reduce(self, map_fn, reduce_fn, items):
        return super().map_reduce(map_fn, reduce_fn, list(items)[:-1])


def test_a_lost_task_is_noticed(small_run, small_dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "TASK_EXAMPLES", 1)
    with pytest.raises(EngineError, match="16 examples were evaluated, but the split 'test' has 30"):
        evaluate(small_run, small_dataset, engine=ForgetfulEngine(), out=str(tmp_path))


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@pytest.mark.parametrize("with_predictions", [False, True])
@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["crossval.json", "plan.json", "predictions/repeat-0/fold-000-part-00000.parquet"],
            "holds a cross-validation",
        ),
        (["plan.json"], "holds an unfinished job"),
        (["tune.json"], "holds a search"),
        (["predictions/part-00000.parquet"], r"has predictions, but no evaluation\.json"),
        (["confusion_matrix.png"], r"has confusion_matrix\.png, but no evaluation\.json"),
        (["evaluation.json"], r"evaluation\.json was not written by evaluate"),
    ],
)
def test_what_evaluate_did_not_make_is_never_touched(
    small_bundle, small_dataset, tmp_path, files, message, with_predictions
):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=message):
        evaluate(small_bundle, small_dataset, out=str(tmp_path), predictions=with_predictions, engine=InlineEngine())
    assert contents(tmp_path) == before


def test_an_earlier_evaluation_is_replaced_only_when_the_new_one_is_there(
    small_bundle, small_dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(tasks, "TASK_EXAMPLES", 1)

    def run(engine: InlineEngine, predictions: bool) -> None:
        evaluate(small_bundle, small_dataset, out=str(tmp_path), predictions=predictions, engine=engine)

    run(InlineEngine(), predictions=True)
    before = contents(tmp_path)
    assert "predictions/part-00001.parquet" in before
    for predictions in (True, False):
        with pytest.raises(EngineError, match="lost or repeated"):
            run(ForgetfulEngine(), predictions)
        assert contents(tmp_path) == before
    run(InlineEngine(), predictions=True)
    assert contents(tmp_path) == before
    note = tmp_path / "predictions" / "notes.txt"
    note.write_text("mine")
    with pytest.raises(UsageError, match=r"predictions has 'notes\.txt', which evaluate did not write"):
        run(InlineEngine(), predictions=False)
    assert note.read_text() == "mine"
    note.unlink()
    run(InlineEngine(), predictions=False)
    assert not (tmp_path / "predictions").exists(), "they would not fit other numbers"


def copy_with_classes(dataset: str, target: Path, *class_names: str) -> str:
    shutil.copytree(dataset, target)
    manifest = json.loads((target / "manifest.json").read_text())
    manifest["class_names"] = class_names
    manifest["counts"]["written"] = {"test": [10, *[0] * (len(class_names) - 1)]}
    (target / "manifest.json").write_text(json.dumps(manifest))
    return str(target)


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (("red", "green", "violet"), "only the model knows 'blue'; only the dataset has 'violet'"),
        (("red", "green", "blue", "grey"), "only the dataset has 'grey'"),
        (("red", "blue", "green"), "order differs, first at label 1: 'green' in the model, 'blue' in the dataset"),
    ],
)
def test_other_classes_than_the_models_are_listed(small_run, small_dataset, tmp_path, class_names, message):
    with pytest.raises(DatasetError, match=message):
        evaluate(small_run, copy_with_classes(small_dataset, tmp_path / "data", *class_names))


def test_bad_input_is_one_clear_line(small_run, small_dataset, tmp_path):
    with pytest.raises(DatasetError, match=r"no split 'holdout'\. It has: train, val, test"):
        evaluate(small_run, small_dataset, split="holdout")
    with pytest.raises(DatasetError, match="There is no dataset at"):
        evaluate(small_run, str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"There is nothing at .*nowhere"):
        evaluate(str(tmp_path / "nowhere"), small_dataset)
    with pytest.raises(UsageError, match="holds neither a run"):
        evaluate(small_dataset, small_dataset)
    with pytest.raises(UsageError, match="batch_size=0 is below 1"):
        evaluate(small_run, small_dataset, batch_size=0)
    with pytest.raises(UsageError, match="confidence=95"):
        evaluate(small_run, small_dataset, confidence=95)


def test_a_damaged_shard_is_named(small_run, small_dataset, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(small_dataset, damaged)
    shard = damaged / "shards" / "test-00000.parquet"
    content = bytearray(shard.read_bytes())
    content[len(content) // 4] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(DatasetError, match=r"test-00000\.parquet fails its checksum"):
        evaluate(small_run, str(damaged))


def test_a_model_that_gives_nan_is_said(small_run, small_dataset, tmp_path):
    from safetensors.numpy import load_file

    from manyeyes.training import checkpoint

    broken = tmp_path / "run"
    shutil.copytree(small_run, broken)
    (old,) = (broken / "checkpoints").glob("step-*")
    arrays = {name: np.full_like(value, np.nan) for name, value in load_file(old / "model.safetensors").items()}
    state = checkpoint.load(str(broken / "checkpoints"), old.name).state
    checkpoint.save(str(broken / "checkpoints"), state, {"model": arrays})
    with pytest.raises(ManyeyesError, match="30 of 30 examples have logits that are NaN"):
        evaluate(str(broken), small_dataset)


def test_a_place_that_takes_no_numbers_is_said_before_anything_is_computed(small_bundle, small_dataset, tmp_path):
    class IdleEngine(InlineEngine):
        def map_reduce(self, *_):
            pytest.fail("it began")

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UsageError, match=r"file/out can't be written: .*/file takes no files"):
        evaluate(small_bundle, small_dataset, engine=IdleEngine(), out=str(tmp_path / "file" / "out"))


def test_without_matplotlib_the_numbers_still_come(small_bundle, small_dataset, tmp_path):
    code = (
        "import sys\nsys.modules['matplotlib'] = None\n"
        "from manyeyes.engines.inline import InlineEngine\nfrom manyeyes.evaluation.evaluate import evaluate\n"
        "result = evaluate(sys.argv[1], sys.argv[2], out=sys.argv[3], engine=InlineEngine())\n"
        "print(result.notices, [name for name in ('keras', 'tensorflow') if name in sys.modules])\n"
    )
    arguments = [small_bundle, small_dataset, str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert "pip install 'manyeyes[plots]'" in done.stdout
    assert done.stdout.endswith(" []\n"), "a bundle is evaluated without Keras"
    assert storage.list_files(tmp_path) == ["evaluation.json"]


def run_command(*arguments: str):
    from manyeyes.cli.main import app

    return CliRunner().invoke(app, ["evaluate", *arguments])


def test_the_command_prints_a_table_and_the_next_command(evaluated_run, small_dataset):
    result = run_command(evaluated_run.model, small_dataset)
    assert result.exit_code == 0, result.output
    for expected in ("accuracy", "95% interval", "top-2 accuracy", "macro F1", "green", "Next: manyeyes export"):
        assert expected in result.stdout
    assert "evaluation.json" in result.stdout.replace("\n", "")


def test_the_command_prints_json_and_nothing_else(small_bundle, small_dataset):
    result = run_command(small_bundle, small_dataset, "--split", "val", "--workers", "1", "--json")
    assert result.exit_code == 0, result.output
    values = json.loads(result.stdout)
    assert values["metrics"]["num_examples"] == 45
    assert values["split"] == "val"
    assert list(values["metrics"]["top_k_accuracy"]) == ["1", "2"]
