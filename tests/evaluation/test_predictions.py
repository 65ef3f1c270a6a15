"""Predictions are kept whole, in order and as they were, and read back as a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes import storage
from manyeyes.data.dataset import Dataset
from manyeyes.engines.inline import InlineEngine
from manyeyes.engines.local import LocalEngine
from manyeyes.errors import DataError, UsageError
from manyeyes.evaluation import predictions, tasks
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.predictions import Predictions, open_writer, part_uri, read_predictions
from manyeyes.evaluation.recogniser import Recogniser


def made_up(num_examples: int, num_classes: int, seed: int = 0) -> Predictions:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, num_classes, num_examples)
    paths = [f"photos/ä {i}.jpg" for i in range(num_examples)]
    return Predictions.from_logits(paths, labels, draw.normal(size=(num_examples, num_classes)), temperature=2.0)


def joined(parts: list[Predictions]) -> Predictions:
    arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in list(Predictions.__annotations__)[1:]]
    return Predictions([path for part in parts for path in part.paths], *arrays)


def assert_same(found: Predictions, expected: Predictions) -> None:
    assert found.paths == expected.paths
    for name in ("labels", "predicted", "probability", "logits"):
        one, other = getattr(found, name), getattr(expected, name)
        assert one.dtype == other.dtype
        assert np.array_equal(one, other)


@given(st.integers(1, 40), st.integers(1, 7), st.data())
@settings(deadline=None, max_examples=30)
def test_what_was_written_in_any_pieces_is_read_back(num_examples, num_classes, data):
    expected = made_up(num_examples, num_classes)
    ends = sorted(data.draw(st.lists(st.integers(0, num_examples), max_size=4)))
    row_group_bytes = data.draw(st.sampled_from([1, 100, 1 << 20]))
    directory = f"memory://predictions-{num_examples}-{num_classes}"
    storage.remove(directory, recursive=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "_ROW_GROUP_BYTES", row_group_bytes)
        for index, (start, end) in enumerate(zip([0, *ends], [*ends, num_examples], strict=True)):
            with open_writer(part_uri(directory, index), num_classes) as writer:
                for piece in np.array_split(np.arange(start, end), 2):
                    arrays = (expected.labels, expected.predicted, expected.probability, expected.logits)
                    writer.write(Predictions([expected.paths[i] for i in piece], *(array[piece] for array in arrays)))
    assert_same(joined(list(read_predictions(directory))), expected)


@pytest.mark.slow
def test_every_example_of_a_split_has_its_prediction_for_any_engine(small_bundle, small_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASK_EXAMPLES", 1)
    outs = [tmp_path / "inline", tmp_path / "local"]
    for out, engine in zip(outs, (InlineEngine(), LocalEngine(2)), strict=True):
        result = evaluate(small_bundle, small_dataset, split="train", out=str(out), predictions=True, engine=engine)
        assert str(out / "predictions") in result.files
    names = [f"part-{index:05d}.parquet" for index in range(6)]
    for name in names:
        assert (outs[0] / "predictions" / name).read_bytes() == (outs[1] / "predictions" / name).read_bytes()
    assert sorted(path.name for path in (outs[0] / "predictions").iterdir()) == names

    data = Dataset(small_dataset)
    rows = [rows for shard in data.split("train").shards for rows in data.rows(shard)]
    found = joined(list(read_predictions(str(outs[0] / "predictions"))))
    assert found.paths == [path for group in rows for path in group.paths]
    assert np.array_equal(found.labels, np.concatenate([group.labels for group in rows]))
    images = np.concatenate([group.images for group in rows])
    logits = Recogniser.open(small_bundle).load(64)(images)
    assert np.allclose(found.logits, logits, atol=1e-5)
    assert np.array_equal(found.predicted, found.logits.argmax(axis=1))
    matrix = np.zeros((3, 3), int)
    np.add.at(matrix, (found.labels, found.predicted), 1)
    assert np.array_equal(result.metrics.confusion_matrix, matrix)


def test_predictions_of_an_earlier_evaluation_do_not_stay_beside_new_numbers(small_bundle, small_dataset, tmp_path):
    out = tmp_path / "out"
    evaluate(small_bundle, small_dataset, split="val", out=str(out), predictions=True, engine=InlineEngine())
    (out / "predictions" / "part-00007.parquet").write_bytes(b"of more parts")
    evaluate(small_bundle, small_dataset, split="test", out=str(out), predictions=True, engine=InlineEngine())
    assert [path.name for path in (out / "predictions").iterdir()] == ["part-00000.parquet"]
    evaluate(small_bundle, small_dataset, split="test", out=str(out), engine=InlineEngine())
    assert not (out / "predictions").exists()


class RepeatingEngine(InlineEngine):
    """Runs every task twice, as an engine may that lost sight of a worker."""

    def map_reduce(self, map_fn, reduce_fn, items):
        return super().map_reduce(lambda item: (map_fn(item), map_fn(item))[1], reduce_fn, items)


def test_a_task_that_runs_twice_leaves_one_file(small_bundle, small_dataset, tmp_path):
    outs = [tmp_path / "once", tmp_path / "twice"]
    for out, engine in zip(outs, (InlineEngine(), RepeatingEngine()), strict=True):
        evaluate(small_bundle, small_dataset, split="val", out=str(out), predictions=True, engine=engine)
    once, twice = ({path.name: path.read_bytes() for path in (out / "predictions").iterdir()} for out in outs)
    assert once == twice
    assert list(once) == ["part-00000.parquet"]


def test_predictions_of_a_bundle_need_a_place(small_bundle, small_dataset):
    with pytest.raises(UsageError, match="Give one by --out"):
        evaluate(small_bundle, small_dataset, predictions=True)


def test_a_task_that_fails_leaves_no_file(tmp_path):
    def fail() -> None:
        with open_writer(part_uri(str(tmp_path), 0), 3) as writer:
            writer.write(made_up(10, 3))
            raise RuntimeError("the disk of the model is gone")

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_missing_and_damaged_files_are_said(tmp_path):
    with pytest.raises(DataError, match="There are no predictions at"):
        list(read_predictions(str(tmp_path)))
    uri = part_uri(str(tmp_path), 0)
    with open_writer(uri, 3) as writer:
        writer.write(made_up(500, 3))
    content = bytearray(Path(uri).read_bytes())
    content[len(content) // 3] ^= 0xFF
    Path(uri).write_bytes(content)
    with pytest.raises(DataError, match=r"part-00000\.parquet can't be read"):
        list(read_predictions(str(tmp_path)))
    pq.write_table(pq.read_table(small_table(tmp_path)).drop_columns(["logits"]), uri)
    with pytest.raises(DataError, match=r"part-00000\.parquet can't be read"):
        list(read_predictions(str(tmp_path)))


def small_table(tmp_path: Path) -> str:
    uri = str(tmp_path / "whole")
    with open_writer(uri, 3) as writer:
        writer.write(made_up(5, 3))
    return uri


def test_logits_of_another_width_are_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"logits are of \(5, 4\), expected \(5, 3\)"),
        open_writer(part_uri(str(tmp_path), 0), 3) as writer,
    ):
        writer.write(made_up(5, 4))
