"""Metrics equal those of scikit-learn, however the examples were sharded."""

from __future__ import annotations

import functools
import operator
import pickle
import tracemalloc
import warnings

import numpy as np
import pytest
import sklearn.calibration
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from manyeyes.errors import DataError
from manyeyes.evaluation import ranking
from manyeyes.evaluation.metrics import ClassificationSums, summarize
from manyeyes.evaluation.ranking import score_bins
from manyeyes.evaluation.sums import UNITS


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
    temperature, threshold = random.choice([1.0, 0.7]), random.choice([None, 0.4])

    def sums_of(part) -> ClassificationSums:
        return ClassificationSums.from_logits(
            logits[part],
            labels[part],
            temperature=temperature,
            threshold=threshold,
            example_indices=np.array(part),
        )

    whole = sums_of(range(len(labels)))
    order = random.sample(range(len(labels)), len(labels))
    cuts = sorted(random.sample(range(len(labels) + 1), min(3, len(labels))))
    parts = [sums_of(part) for part in np.split(order, cuts)]
    random.shuffle(parts)
    assert functools.reduce(operator.add, parts) == whole
    assert parts[0] + ClassificationSums.zero(whole.num_classes, temperature, threshold) == parts[0]
    assert pickle.loads(pickle.dumps(whole)) == whole


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
        # By default scikit-learn averages over the classes that have an example or a prediction.
        expected = sklearn.metrics.precision_recall_fscore_support(labels, predicted, average=name, zero_division=0)
        found = getattr(summary, name)
        assert (found.precision, found.recall, found.f1) == close(expected[:3])
    assert summary.num_classes_left_out == num_classes - len(np.union1d(labels, predicted))
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


@given(labelled_logits(), st.sampled_from([1.0, 0.5, 3.0]))
@settings(deadline=None)
def test_brier_score_mcc_and_reliability_equal_those_of_scikit_learn(examples, temperature):
    logits, labels = examples
    num_classes = logits.shape[1]
    found = ClassificationSums.from_logits(logits, labels, temperature=temperature)
    summary = summarize(found, names(num_classes))
    probabilities = softmax(logits.astype(np.float64) / temperature)
    predicted = logits.argmax(axis=1)
    assert summary.mcc == pytest.approx(sklearn.metrics.matthews_corrcoef(labels, predicted), abs=1e-9)
    brier = np.mean(((probabilities - np.eye(num_classes)[labels]) ** 2).sum(axis=1))
    assert summary.brier_score == pytest.approx(brier, abs=1e-9)
    confidences, right = probabilities.max(axis=1), predicted == labels
    filled = [each for each in summary.calibration.bins if each.num_examples]
    accuracies, means = sklearn.calibration.calibration_curve(right, np.minimum(confidences, 1), n_bins=15)
    assert [each.accuracy for each in filled] == pytest.approx(accuracies.tolist(), abs=1e-9)
    assert [each.confidence for each in filled] == pytest.approx(means.tolist(), abs=1e-9)
    gaps = [each.num_examples * abs(each.accuracy - each.confidence) for each in filled]
    assert summary.ece == pytest.approx(sum(gaps) / len(labels), abs=1e-9)
    assert summary.calibration.temperature == temperature
    if temperature == 1.0:
        assert summary.uncalibrated is None
    else:
        plain = summarize(ClassificationSums.from_logits(logits, labels), names(num_classes))
        assert summary.uncalibrated == plain.calibration
        assert summary.accuracy == plain.accuracy


@given(labelled_logits())
@settings(deadline=None)
def test_roc_auc_equals_that_of_scikit_learn_on_the_binned_scores(examples):
    logits, labels = examples
    num_classes = logits.shape[1]
    summary = summarize(ClassificationSums.from_logits(logits, labels), names(num_classes))
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    bins = score_bins(np.exp(shifted), shifted)
    expected = []
    for found in summary.per_class:
        of_class = labels == found.label
        if 0 < of_class.sum() < len(labels):
            expected.append(sklearn.metrics.roc_auc_score(of_class, bins[:, found.label]))
            assert found.roc_auc == pytest.approx(expected[-1], abs=1e-9)
        else:
            assert found.roc_auc is None
            assert found.average_precision is None
    if expected:
        assert summary.roc_auc == pytest.approx(np.mean(expected), abs=1e-9)
    else:
        assert summary.roc_auc is None
        assert summary.average_precision is None


@given(st.integers(2, 60), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_average_precision_of_scores_in_bins_of_their_own_equals_that_of_scikit_learn(num_examples, seed):
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 2, num_examples)
    # A step of the grid is wider beyond 8, up to 1.26 at 32.
    logits = np.stack([np.zeros(num_examples), draw.permutation(num_examples) - num_examples / 2], axis=1)
    logits[:, 1] *= 1.3
    summary = summarize(ClassificationSums.from_logits(logits, labels), names(2))
    for found in summary.per_class:
        if found.average_precision is not None:
            scores = logits[:, 1] if found.label == 1 else -logits[:, 1]
            expected = sklearn.metrics.average_precision_score(labels == found.label, scores)
            assert found.average_precision == pytest.approx(expected, abs=1e-9)


def test_binned_scores_cost_less_than_a_thousandth():
    draw = np.random.default_rng(0)
    for num_classes, num_examples in ((2, 1000), (10, 5000), (100, 10_000)):
        labels = draw.integers(0, num_classes, num_examples)
        logits = draw.normal(size=(num_examples, num_classes))
        logits[np.arange(num_examples), labels] += draw.uniform(0, 6, num_examples)
        summary = summarize(ClassificationSums.from_logits(logits, labels), names(num_classes))
        probabilities = softmax(logits)
        truth = np.eye(num_classes)[labels]
        for found, score in (
            (summary.roc_auc, sklearn.metrics.roc_auc_score),
            (summary.average_precision, sklearn.metrics.average_precision_score),
        ):
            assert found == pytest.approx(score(truth, probabilities, average="macro"), abs=1e-3)


@given(labelled_logits())
@settings(deadline=None)
def test_the_figures_of_a_class_move_with_single_examples_as_the_slopes_say(examples):
    logits, labels = examples
    num_examples, num_classes = logits.shape
    found = ClassificationSums.from_logits(logits, labels, example_indices=np.arange(num_examples))
    ranked = ranking.rank(found.score_counts, found.sample)
    if ranked.macro_roc_auc is None:
        return
    found_deviations = [
        0.0 if each is None else each.value
        for each in (ranked.macro_roc_auc_deviation, ranked.macro_average_precision_deviation)
    ]
    # The jackknife itself: every example a little heavier, one after the other.
    weight = 1e-5
    moved = []
    for bins, label in zip(found.sample.bins, found.sample.labels, strict=True):
        counts = found.score_counts.astype(np.float64)
        counts[(np.arange(num_classes) == label).astype(int), np.arange(num_classes), bins] += weight
        values = [values for values, _ in ranking._figures(counts[:, :, ::-1])]
        moved.append(np.nanmean(np.array(values), axis=1))
    unmoved = np.array([ranked.macro_roc_auc, ranked.macro_average_precision])
    deviations = np.sqrt(num_examples) * np.std((np.array(moved) - unmoved) / weight, axis=0)
    assert found_deviations == pytest.approx(deviations.tolist(), rel=1e-2, abs=1e-4)


def test_the_sums_of_many_classes_travel_in_a_small_part_of_their_memory():
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 300, 500)
    found = ClassificationSums.from_logits(draw.normal(size=(500, 300)).astype(np.float32), labels)
    in_memory = found.confusion_matrix.nbytes + found.score_counts.nbytes
    assert len(pickle.dumps(found)) < in_memory / 10


def test_memory_does_not_grow_with_the_examples_that_are_given_at_once():
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(size=(400_000, 7)).astype(np.float32), draw.integers(0, 7, 400_000)
    tracemalloc.start()
    whole = ClassificationSums.from_logits(logits, labels, example_indices=np.arange(400_000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < logits.nbytes, peak
    halves = [
        ClassificationSums.from_logits(logits[part], labels[part], example_indices=part)
        for part in np.split(np.arange(400_000), [150_001])
    ]
    assert halves[0] + halves[1] == whole


def test_the_sample_is_that_of_the_smallest_hashes_however_parts_are_merged(monkeypatch):
    monkeypatch.setattr(ranking, "SAMPLE_SIZE", 10)
    draw = np.random.default_rng(0)
    logits, labels, indices = draw.normal(size=(90, 3)), draw.integers(0, 3, 90), np.arange(90)
    parts = [
        ClassificationSums.from_logits(logits[part], labels[part], example_indices=part)
        for part in np.split(indices, [5, 50])
    ]
    one, other = parts[0] + parts[1] + parts[2], parts[2] + (parts[1] + parts[0])
    assert one == other
    assert len(one.sample) == 10
    assert max(one.sample.example_indices) > 50


def test_of_equal_logits_the_lowest_label_is_predicted():
    sums = ClassificationSums.from_logits(np.zeros((4, 4), np.float32), np.arange(4, dtype=np.int32))
    assert sums.confusion_matrix[:, 0].tolist() == [1, 1, 1, 1]
    assert sums.top_k_hits.tolist() == [1, 2, 3, 4, 4]


def test_coverage_and_precision_of_a_threshold_are_those_of_the_answers_that_are_given():
    draw = np.random.default_rng(0)
    logits, labels = draw.normal(0, 2, (300, 4)).astype(np.float32), draw.integers(0, 4, 300)
    confidences, right = softmax(logits / np.float32(2)).max(axis=1), logits.argmax(axis=1) == labels
    for threshold in (0.0, float(confidences[7]), 1.0):
        found = summarize(
            ClassificationSums.from_logits(logits, labels, temperature=2.0, threshold=threshold), names(4)
        ).abstention
        given = confidences >= threshold
        assert found.num_given == given.sum()
        assert found.coverage == given.mean()
        assert found.precision == (right[given].mean() if given.any() else None)
    assert summarize(ClassificationSums.from_logits(logits, labels), names(4)).abstention is None


def test_huge_losses_are_summed_exactly():
    logits = np.array([[3e38, -3e38]] * 100, np.float32)
    one = ClassificationSums.from_logits(logits[:1], np.array([1], np.int32)).probabilities
    hundred = ClassificationSums.from_logits(logits, np.ones(100, np.int32)).probabilities
    assert hundred.log_loss_units == 100 * one.log_loss_units
    assert hundred.log_loss_units / UNITS == pytest.approx(100 * 6e38, rel=1e-6)


def test_a_class_without_examples_and_a_class_that_is_never_predicted_are_said():
    logits = np.eye(3, dtype=np.float32)[[0, 0, 2]]
    logits = np.pad(logits, ((0, 0), (0, 1)), constant_values=-1)
    summary = summarize(ClassificationSums.from_logits(logits, np.array([0, 1, 0], np.int32)), ["a", "b", "c", "d"])
    a, b, c, d = summary.per_class
    assert (a.precision, a.recall, a.support, a.num_predicted) == (0.5, 0.5, 2, 2)
    assert (b.precision, b.recall, b.f1) == (None, 0.0, 0.0)
    assert (c.precision, c.recall, c.f1) == (0.0, None, 0.0)
    assert (d.precision, d.recall, d.f1, d.support, d.num_predicted) == (None, None, None, 0, 0)
    assert (summary.num_classes_without_support, summary.num_classes_never_predicted) == (2, 2)
    assert summary.num_classes_left_out == 1
    assert summary.macro.precision == pytest.approx(0.5 / 3)
    assert summary.balanced_accuracy == pytest.approx(0.25)


def test_a_perfect_model_has_perfect_averages_and_the_classes_that_no_fold_has_count_for_nothing():
    labels = np.repeat(np.arange(18), 2)
    logits = np.eye(30, dtype=np.float32)[labels]
    # One mistake between two of them, so that there are intervals.
    for truth, expected in ((labels, 1.0), (np.where(np.arange(36) == 0, 1, labels), None)):
        summary = summarize(ClassificationSums.from_logits(logits, truth), names(30))
        assert summary.num_classes_left_out == 12
        for name in ("precision", "recall", "f1"):
            value, interval = getattr(summary.macro, name), summary.intervals[f"macro_{name}"]
            if expected is not None:
                assert (value, interval) == (expected, None)
            else:
                assert interval.low < value < 1
                assert interval.high > 0.95


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        ([[0, 0, 0], [0, 0, 0]], [0, 0, 0], "don't fit"),
        ([0, 0, 0], [0, 0, 0], "don't fit"),
        ([[0, 0, 0], [0, 0, 0]], [0, 3], r"labels are in \[0, 3\], expected \[0, 2\]"),
        ([[0, 0, 0], [0, 0, 0]], [-1, 0], r"labels are in \[-1, 0\]"),
        ([[np.nan, 0], [0, np.inf], [0, 0]], [0, 0, 0], "2 of 3 examples have logits that are NaN"),
    ],
)
def test_bad_logits_and_labels_are_refused(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        ClassificationSums.from_logits(np.array(logits, np.float32), np.array(labels))


def test_sums_of_different_classes_and_summaries_of_nothing_are_refused():
    with pytest.raises(ValueError, match="can't be added"):
        ClassificationSums.zero(2) + ClassificationSums.zero(3)
    with pytest.raises(ValueError, match="can't be added"):
        ClassificationSums.zero(2) + ClassificationSums.zero(2, temperature=2.0)
    with pytest.raises(DataError, match="no examples"):
        summarize(ClassificationSums.zero(2), ["a", "b"])
    with pytest.raises(DataError, match="3 class names for sums over 2 classes"):
        summarize(ClassificationSums.zero(2), ["a", "b", "c"])
