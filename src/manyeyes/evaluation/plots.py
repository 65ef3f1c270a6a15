"""Pictures of an evaluation: the confusion matrix, and how a run learned. Needs the extra "plots"."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from manyeyes import storage
from manyeyes.errors import MissingExtraError
from manyeyes.evaluation.intervals import level_text
from manyeyes.evaluation.metrics import Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Up to so many classes every cell says its numbers; up to the second number every class has its name on the axes.
_MAX_CLASSES_WITH_NUMBERS = 20
_MAX_CLASSES_WITH_NAMES = 60
_LONGEST_NAME = 24
_TRAIN_COLOR, _VAL_COLOR, _RATE_COLOR = "#4c78a8", "#e4572e", "#54a24b"
_DPI = 120


def confusion_matrix_png(metrics: Summary, class_names: Sequence[str]) -> bytes:
    """Draw the confusion matrix; colours are shares of each row, so that rare classes show as well as frequent ones.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    matrix = np.array(metrics.confusion_matrix)
    num_classes = len(matrix)
    support = matrix.sum(axis=1, keepdims=True)
    shares = np.divide(matrix, support, out=np.zeros(matrix.shape), where=support > 0)
    with_numbers = num_classes <= _MAX_CLASSES_WITH_NUMBERS
    inches = min(14.0, max(4.2, 0.62 * num_classes + 2.0)) if with_numbers else min(14.0, 5.0 + 0.15 * num_classes)
    figure = _figure(inches + 1.4, inches)
    axes = figure.add_subplot()
    # Small shares are what one looks for: the square root makes 1 % visible beside 90 %.
    image = axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if with_numbers:
        _write_numbers(axes, matrix, shares)
    step = 1 if num_classes <= _MAX_CLASSES_WITH_NAMES else 10
    ticks = list(range(0, num_classes, step))
    labels = [_short(class_names[i]) if step == 1 else f"{i}  {_short(class_names[i])}" for i in ticks]
    size = 9 if with_numbers else 7
    longest = max(map(len, labels))
    axes.set_xticks(ticks, labels, rotation=0 if longest * num_classes <= 24 else 90, fontsize=size)
    axes.set_yticks(ticks, labels, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    low, high = metrics.accuracy_interval.low, metrics.accuracy_interval.high
    axes.set_title(
        f"accuracy {metrics.accuracy:.2%}  ({level_text(metrics.confidence)} interval {low:.2%} to {high:.2%})\n"
        f"{metrics.num_examples:,} examples, {num_classes} classes",
        fontsize=10,
        loc="left",
    )
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03)
    shown = [0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 1.0]
    bar.set_ticks([float(np.sqrt(share)) for share in shown], labels=[f"{share:.0%}" for share in shown])
    bar.ax.tick_params(labelsize=8)
    bar.set_label("share of the true class", fontsize=9)
    bar.outline.set_visible(False)
    axes.tick_params(length=2)
    return _png(figure)


def learning_curves_png(epochs: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw loss, accuracy and learning rate over the epochs of a run.

    Args:
        epochs: lines of kind "epoch" of metrics.jsonl, at least one.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    figure = _figure(12.0, 3.8)
    loss, accuracy, rate = figure.subplots(1, 3)
    _curve(loss, epochs, "loss", "train", _TRAIN_COLOR)
    _curve(loss, epochs, "val_loss", "val", _VAL_COLOR)
    loss.set_title("loss", loc="left", fontsize=11)
    _curve(accuracy, epochs, "accuracy", "train", _TRAIN_COLOR)
    best = _curve(accuracy, epochs, "val_accuracy", "val", _VAL_COLOR)
    title = "accuracy"
    if best is not None:
        axis, value = best
        title += f": best val {value:.2%} in epoch {axis}"
        accuracy.plot([axis], [value], "o", markersize=9, markerfacecolor="none", color=_VAL_COLOR)
    accuracy.set_title(title, loc="left", fontsize=11)
    accuracy.yaxis.set_major_formatter(importlib.import_module("matplotlib.ticker").PercentFormatter(xmax=1))
    _curve(rate, epochs, "learning_rate", "", _RATE_COLOR)
    rate.set_title("learning rate at the end of the epoch", loc="left", fontsize=11)
    rate.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    last = max(int(epoch["epoch"]) for epoch in epochs)
    for axes in (loss, accuracy, rate):
        axes.set_xlabel("epoch")
        axes.set_xlim(0.5, last + 0.5)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(frameon=False, fontsize=9)
    return _png(figure)


def read_epochs(metrics_uri: str) -> list[dict[str, Any]]:
    """The lines of kind "epoch" of a run's metrics.jsonl; none if there is no such file."""
    if not storage.exists(metrics_uri):
        return []
    lines = storage.read_bytes(metrics_uri).decode("utf-8", "replace").splitlines()
    # A killed training may have left half a line at the end.
    values = (json.loads(line) for line in lines if line.startswith("{") and line.endswith("}"))
    return [value for value in values if value.get("kind") == "epoch"]


def _curve(
    axes: Axes, epochs: Sequence[Mapping[str, Any]], key: str, label: str, color: str
) -> tuple[int, float] | None:
    """Draw one value over the epochs; returns the epoch and the value where it is highest."""
    points = [(int(epoch["epoch"]), float(epoch[key])) for epoch in epochs if epoch.get(key) is not None]
    if not points:
        return None
    marker = "o" if len(points) <= 30 else ""
    axes.plot(*zip(*points, strict=True), marker=marker, markersize=3.5, color=color, label=label or None)
    return max(points, key=lambda point: point[1])


def _write_numbers(axes: Axes, matrix: np.ndarray, shares: np.ndarray) -> None:
    size = 10 if len(matrix) <= 5 else 8 if len(matrix) <= 12 else 6.5
    for row, column in zip(*np.nonzero(matrix), strict=True):
        count, share = int(matrix[row, column]), float(shares[row, column])
        text = f"{count:,}" if row != column else f"{count:,}\n{share:.0%}"
        color = "white" if share > 0.4 else "#08306b"
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=color, linespacing=1.1)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _figure(width: float, height: float) -> Figure:
    """A figure that belongs to nobody: pyplot would keep it, and might open a window."""
    try:
        figure_class = importlib.import_module("matplotlib.figure").Figure
    except ModuleNotFoundError:
        raise MissingExtraError("Drawing", "plots") from None
    return figure_class(figsize=(width, height), dpi=_DPI, layout="constrained")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib inside, equal numbers give equal bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
