"""Metrics equal those of scikit-learn, however the examples were sharded."""

from __future__ import annotations

import functools
import json
import operator
import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes.errors import DataError
from manyeyes.evaluation.metrics import ClassificationSums, summarize


@st.composite
def labelled_logits(draw):
    """Few classes and coarse logits, so that ties, unused classes and classes without a prediction are frequent."""
    num_classes = draw(st.integers(2, 9))
    num_examples = draw(st.integers(1, 60))
    used = draw(st.integers(1, num_classes))
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    labels = random.integers(0, used, num_examples).astype(np.int32)
    scale = draw(st.sampled_from([0.5, 3.0, 30.0]))
    logits = random.normal(0, scale, (num_examples, num_classes))
    if draw(st.booleans()):
        logits = np.round(logits)
    return logits.astype(np.float32), labels


def names(num_classes: int) -> list[str]:
    return [f"class {label}" for label in range(num_classes)]


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@given(labelled_logits(), st.randoms())
@settings(deadline=None)
def test_any_sharding_in_any_order_gives_equal_sums(examples, random):
    logits, labels = examples
    whole = ClassificationSums.from_logits(logits, labels)
    order = random.sample(range(len(labels)), len(labels))
    cuts = sorted(random.sample(range(len(labels) + 1), min(3, len(labels))))
    parts = [ClassificationSums.from_logits(logits[part], labels[part]) for part in np.split(order, cuts)]
    random.shuffle(parts)
    assert functools.reduce(operator.add, parts) == whole
    assert parts[0] + ClassificationSums.zero(whole.num_classes) == parts[0]


@given(labelled_logits())
@settings(deadline=None)
def test_all_metrics_equal_those_of_scikit_learn(examples):
    logits, labels = examples
    num_classes = logits.shape[1]
    summary = summarize(ClassificationSums.from_logits(logits, labels), names(num_classes))
    predicted = logits.argmax(axis=1)
    every_label = list(range(num_classes))

    def close(value):
        return pytest.approx(value, abs=1e-9)

    assert summary.num_examples == len(labels)
    assert summary.accuracy == close(sklearn.metrics.accuracy_score(labels, predicted))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # classes that are predicted but have no examples are left out, as by us
        assert summary.balanced_accuracy == close(sklearn.metrics.balanced_accuracy_score(labels, predicted))
    matrix = sklearn.metrics.confusion_matrix(labels, predicted, labels=every_label)
    assert np.array_equal(summary.confusion_matrix, matrix)
    for name in ("macro", "micro", "weighted"):
        expected = sklearn.metrics.precision_recall_fscore_support(
            labels, predicted, labels=every_label, average=name, zero_division=0
        )
        found = getattr(summary, name)
        assert (found.precision, found.recall, found.f1) == close(expected[:3])
    by_class = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=every_label, average=None, zero_division=np.nan
    )
    for found, precision, recall, f1, support in zip(summary.per_class, *by_class, strict=True):
        assert found.support == support
        assert found.num_predicted == (predicted == found.label).sum()
        for value, expected in ((found.precision, precision), (found.recall, recall), (found.f1, f1)):
            if np.isnan(expected):
                assert value is None
            else:
                assert value == close(expected)


@given(labelled_logits())
@settings(deadline=None)
def test_top_k_and_log_loss_equal_those_of_scikit_learn(examples):
    logits, labels = examples
    num_classes = logits.shape[1]
    sums = ClassificationSums.from_logits(logits, labels)
    every_label = list(range(num_classes))
    summary = summarize(sums, names(num_classes))
    assert list(summary.top_k_accuracy) == [str(k) for k in range(1, min(5, num_classes - 1) + 1)]
    # scikit-learn orders equal scores otherwise, so the ranks are made unique as the lower label first.
    unique = -np.argsort(np.argsort(-logits, axis=1, kind="stable"), axis=1).astype(np.float64)
    for k in range(1, min(5, num_classes - 1) + 1):
        if num_classes == 2:
            expected = sklearn.metrics.accuracy_score(labels, unique.argmax(axis=1))
        else:
            expected = sklearn.metrics.top_k_accuracy_score(labels, unique, k=k, labels=every_label)
        assert summary.top_k_accuracy[str(k)] == pytest.approx(expected, abs=1e-9)
    if np.abs(logits).max() < 10:  # beyond, scikit-learn clips probabilities
        expected = sklearn.metrics.log_loss(labels, softmax(logits), labels=every_label)
        assert summary.log_loss == pytest.approx(expected, abs=1e-9)


@given(labelled_logits())
@settings(deadline=None)
def test_sums_survive_json(examples):
    sums = ClassificationSums.from_logits(*examples)
    assert ClassificationSums.from_dict(json.loads(json.dumps(sums.to_dict()))) == sums


def test_of_equal_logits_the_lowest_label_is_predicted():
    sums = ClassificationSums.from_logits(np.zeros((4, 4), np.float32), np.arange(4, dtype=np.int32))
    assert sums.confusion_matrix[:, 0].tolist() == [1, 1, 1, 1]
    assert sums.top_k_hits.tolist() == [1, 2, 3, 4, 4]


def test_huge_losses_are_summed_exactly():
    logits = np.array([[3e38, -3e38]] * 100, np.float32)
    one = ClassificationSums.from_logits(logits[:1], np.array([1], np.int32))
    hundred = ClassificationSums.from_logits(logits, np.ones(100, np.int32))
    assert hundred.log_loss_units == 100 * one.log_loss_units
    assert hundred.log_loss == pytest.approx(6e38, rel=1e-6)


def test_a_class_without_examples_and_a_class_that_is_never_predicted_are_said():
    logits = np.eye(3, dtype=np.float32)[[0, 0, 2]]
    summary = summarize(ClassificationSums.from_logits(logits, np.array([0, 1, 0], np.int32)), ["a", "b", "c"])
    a, b, c = summary.per_class
    assert (a.precision, a.recall, a.support, a.num_predicted) == (0.5, 0.5, 2, 2)
    assert (b.precision, b.recall, b.f1) == (None, 0.0, 0.0)
    assert (c.precision, c.recall, c.f1) == (0.0, None, 0.0)
    assert (summary.num_classes_without_support, summary.num_classes_never_predicted) == (1, 1)
    assert summary.macro.precision == pytest.approx(0.5 / 3)
    assert summary.balanced_accuracy == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((2, 3)), np.zeros(3, int), "don't fit"),
        (np.zeros(3), np.zeros(3, int), "don't fit"),
        (np.zeros((2, 3)), np.array([0, 3]), r"labels are in \[0, 3\], expected \[0, 2\]"),
        (np.zeros((2, 3)), np.array([-1, 0]), r"labels are in \[-1, 0\]"),
        (np.array([[np.nan, 0], [0, np.inf], [0, 0]]), np.zeros(3, int), "2 of 3 examples have logits that are NaN"),
    ],
)
def test_bad_logits_and_labels_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        ClassificationSums.from_logits(logits, labels)


def test_sums_of_different_classes_and_summaries_of_nothing_are_refused():
    with pytest.raises(ValueError, match="can't be added"):
        ClassificationSums.zero(2) + ClassificationSums.zero(3)
    with pytest.raises(DataError, match="no examples"):
        summarize(ClassificationSums.zero(2), ["a", "b"])
    with pytest.raises(DataError, match="3 class names for sums over 2 classes"):
        summarize(ClassificationSums.zero(2), ["a", "b", "c"])
