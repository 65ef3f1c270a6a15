"""The most confident mistakes and the least certain answers are found, whatever the sharding."""

from __future__ import annotations

import functools
import operator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes.data.dataset import Dataset
from manyeyes.engines.inline import InlineEngine
from manyeyes.evaluation import tasks
from manyeyes.evaluation.evaluate import evaluate
from manyeyes.evaluation.notable import Notable, Place
from manyeyes.recognition.predictor import softmax


@given(st.integers(1, 80), st.integers(1, 5), st.integers(0, 6), st.integers(0, 2**32 - 1), st.randoms())
@settings(deadline=None)
def test_any_sharding_finds_the_same_examples(num_examples, num_classes, size, seed, random):
    draw = np.random.default_rng(seed)
    # Coarse logits and few names, so that ties are frequent.
    logits = np.round(draw.normal(0, 1.5, (num_examples, num_classes)))
    labels = draw.integers(0, num_classes, num_examples)
    paths = [f"{i % 7}.jpg" for i in range(num_examples)]
    places = [Place(f"test-{i % 3:05d}.parquet", i // 9, i) for i in range(num_examples)]

    def of(rows) -> Notable:
        return Notable.from_logits(
            logits[rows], labels[rows], [paths[i] for i in rows], [places[i] for i in rows], size=size
        )

    order = np.array(random.sample(range(num_examples), num_examples))
    parts = [of(part) for part in np.array_split(order, 4)]
    random.shuffle(parts)
    found = functools.reduce(operator.add, parts)
    assert found == of(np.arange(num_examples))

    probabilities = softmax(logits)
    predicted = logits.argmax(axis=1)
    confidence = probabilities.max(axis=1)
    ordered = np.sort(probabilities, axis=1)
    margin = ordered[:, -1] - (ordered[:, -2] if num_classes > 1 else 0)
    wrong = [i for i in range(num_examples) if predicted[i] != labels[i]]
    wrong.sort(key=lambda i: (-confidence[i], paths[i], places[i].shard, places[i].row_group, i))
    assert [each.place.row for each in found.mistakes] == wrong[:size]
    assert [each.margin for each in found.uncertain] == pytest.approx(sorted(margin)[:size])
    for each in (*found.mistakes, *found.uncertain):
        i = each.place.row
        assert (each.path, each.label, each.predicted) == (paths[i], labels[i], predicted[i])
        assert each.probability == confidence[i]


def test_the_place_leads_to_the_stored_image(small_bundle, small_dataset, monkeypatch, tmp_path):
    monkeypatch.setattr(tasks, "TASK_EXAMPLES", 1)
    result = evaluate(
        small_bundle, small_dataset, split="train", num_notable=40, engine=InlineEngine(), out=str(tmp_path)
    )
    data = Dataset(small_dataset)
    shards = {shard.name: shard for shard in data.split("train").shards}
    assert len(result.notable.uncertain) == 40
    assert len({each.place.row_group for each in result.notable.uncertain}) > 1
    for each in result.notable.uncertain:
        with data.open_shard(shards[each.place.shard]) as reader:
            rows = reader.read(each.place.row_group)
        assert rows.paths[each.place.row] == each.path
        assert rows.labels[each.place.row] == each.label
