"""The figures of an evaluation as one list: title, value, interval, and which way is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from manyeyes.evaluation.crossval import CrossvalResult
from manyeyes.evaluation.intervals import Interval
from manyeyes.evaluation.metrics import Summary
from manyeyes.evaluation.resampling import Resampled

_WILSON = "Wilson score"
_RESAMPLED = "corrected resampled t over the folds, whose training sets overlap (Nadeau and Bengio)"
_OF_SEEN = "mean over the classes with an example or a prediction"
# name -> (title, form, whether higher is better, what it is)
_TITLES: dict[str, tuple[str, Literal["share", "number"], bool, str]] = {
    "accuracy": ("Accuracy", "share", True, "share of examples whose likeliest class is right"),
    "balanced_accuracy": ("Balanced accuracy", "share", True, "mean recall over the classes that have examples"),
    "macro_f1": ("Macro F1", "share", True, f"harmonic mean of precision and recall, {_OF_SEEN}"),
    "macro_precision": ("Macro precision", "share", True, _OF_SEEN),
    "macro_recall": ("Macro recall", "share", True, f"{_OF_SEEN}; one without examples counts as 0"),
    "weighted_f1": ("Weighted F1", "share", True, "mean over the classes, by their examples"),
    "mcc": ("Matthews' correlation", "number", True, "1 is perfect, 0 no better than chance"),
    "roc_auc": ("Macro AUC", "share", True, "chance that an example of a class scores above another, mean of classes"),
    "average_precision": ("Macro average precision", "share", True, "area under precision and recall, mean of classes"),
    "log_loss": ("Log loss", "number", False, "mean −ln of the probability of the true class"),
    "brier_score": (
        "Brier score",
        "number",
        False,
        "mean squared distance of probabilities from the truth, 0 to 2",
    ),
    "ece": ("Calibration error", "number", False, "mean gap between confidence and accuracy, 15 bins"),
    "mean_cost": ("Mean cost", "number", False, "of an example, by the cost matrix"),
}


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: as in evaluation.json; "top_5_accuracy" for k = 5.
        form: "share" is shown in percent.
        is_better_higher: which way is better.
        low, high: its interval; None where the examples don't tell.
        method: how the interval is made.
        meaning: what it is, in a few words.
        std: over folds, of a cross-validation.
    """

    name: str
    title: str
    value: float
    low: float | None
    high: float | None
    form: Literal["share", "number"]
    is_better_higher: bool
    method: str
    meaning: str
    std: float | None = None

    def text(self, value: float) -> str:
        """A value of this figure for people."""
        return f"{value:.2%}" if self.form == "share" else f"{value:.4f}"

    @property
    def interval_text(self) -> str:
        """The interval for people; "" where there is none."""
        return "" if self.low is None or self.high is None else f"{self.text(self.low)} to {self.text(self.high)}"


def title_of(name: str) -> str:
    """The title of a figure."""
    return _TITLES[name][0]


def figures_of(metrics: Summary) -> tuple[Figure, ...]:
    """The figures of one evaluation, the most asked for first."""
    found = [_figure("accuracy", metrics.accuracy, metrics.accuracy_interval, _WILSON)]
    for k, value in metrics.top_k_accuracy.items():
        if k != "1":
            interval = metrics.top_k_intervals[k]
            meaning = f"share of examples whose class is among the {k} likeliest"
            name, title = f"top_{k}_accuracy", f"Top-{k} accuracy"
            found.append(Figure(name, title, value, interval.low, interval.high, "share", True, _WILSON, meaning))
    values = {
        "balanced_accuracy": metrics.balanced_accuracy,
        "macro_f1": metrics.macro.f1,
        "macro_precision": metrics.macro.precision,
        "macro_recall": metrics.macro.recall,
        "weighted_f1": metrics.weighted.f1,
        "mcc": metrics.mcc,
        "roc_auc": metrics.roc_auc,
        "average_precision": metrics.average_precision,
        "log_loss": metrics.log_loss,
        "brier_score": metrics.brier_score,
        "ece": metrics.ece,
        "mean_cost": metrics.mean_cost,
    }
    for name, known in values.items():
        if known is not None:
            method = metrics.interval_methods.get(name, "")
            found.append(_figure(name, known, metrics.intervals.get(name), method))
    return tuple(found)


def fold_figures_of(result: CrossvalResult) -> tuple[Figure, ...]:
    """The figures of a cross-validation: means over its folds."""
    # Its file has them in the order of their names.
    found = [(name, result.figures[name]) for name in _TITLES if name in result.figures]
    return tuple(_figure(name, each.mean, each, _RESAMPLED, each.std) for name, each in found)


def _figure(
    name: str, value: float, interval: Interval | Resampled | None, method: str, std: float | None = None
) -> Figure:
    title, form, is_better_higher, meaning = _TITLES[name]
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return Figure(name, title, value, low, high, form, is_better_higher, method, meaning, std)
