"""An evaluation as people read it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from manyeyes.evaluation.evaluate import EvaluationResult
from manyeyes.evaluation.intervals import Interval, level_text
from manyeyes.evaluation.metrics import ClassMetrics, Summary

if TYPE_CHECKING:
    from rich.table import Table

# With more classes only the worst are listed; all are in evaluation.json.
_MAX_CLASSES_SHOWN = 30
_NUM_WORST_SHOWN = 15
_NUM_CONFUSIONS_SHOWN = 5
# Below, intervals of means over classes were measured to hold less often than they claim (docs/decisions/0120).
_FEW_EXAMPLES = 10


def tables(result: EvaluationResult) -> Iterator[Table | str]:
    """Yield what to print: the figures, the classes, the most frequent confusions, and remarks."""
    metrics = result.metrics
    yield f"{result.model_name} ({result.model}) on {metrics.num_examples:,} examples of {result.split}"
    yield _figures(metrics)
    yield _classes(metrics)
    if confusions := _confusions(metrics, result.class_names):
        yield "Most often confused: " + "; ".join(confusions) + "."
    yield from _remarks(metrics)
    yield from result.remarks
    yield from result.notices
    if result.files:
        names = [uri.rpartition("/")[2] for uri in result.files]
        yield f"Written to {result.files[0].rpartition('/')[0]}: {', '.join(names)}"


def _figures(metrics: Summary) -> Table:
    from rich.table import Table

    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    table.add_column(f"{level_text(metrics.confidence)} interval", justify="right")
    table.add_row("accuracy", f"[bold]{metrics.accuracy:.2%}[/bold]", _interval(metrics.accuracy_interval, 2))
    for k, value in metrics.top_k_accuracy.items():
        if k != "1":
            table.add_row(f"top-{k} accuracy", f"{value:.2%}", _interval(metrics.top_k_intervals[k], 2))
    found = metrics.intervals
    table.add_row("balanced accuracy", f"{metrics.balanced_accuracy:.2%}", _interval(found["balanced_accuracy"], 2))
    table.add_section()
    for name, averages in (("macro", metrics.macro), ("weighted", metrics.weighted)):
        # The weighted recall is the accuracy.
        for figure in ("precision", "recall", "f1") if name == "macro" else ("f1",):
            title = f"{name} {'F1' if figure == 'f1' else figure}"
            table.add_row(title, f"{getattr(averages, figure):.2%}", _interval(found[f"{name}_{figure}"], 2))
    table.add_row("Matthews' correlation", f"{metrics.mcc:.4f}", _bounds(found["mcc"]))
    for title, name in (("macro AUC", "roc_auc"), ("macro average precision", "average_precision")):
        value = getattr(metrics, name)
        table.add_row(title, "–" if value is None else f"{value:.2%}", _interval(found[name], 2))
    table.add_section()
    for title, name in (("log loss", "log_loss"), ("Brier score", "brier_score"), ("calibration error", "ece")):
        table.add_row(title, f"{getattr(metrics, name):.4f}", _bounds(found[name]))
    if (before := metrics.uncalibrated) is not None:
        temperature = f"before temperature {metrics.calibration.temperature:.3g}"
        table.add_row(f"log loss {temperature}", f"{before.log_loss:.4f}")
        table.add_row(f"calibration error {temperature}", f"{before.ece:.4f}")
    if (abstention := metrics.abstention) is not None:
        at = f"at probability {abstention.threshold:.4f}"
        table.add_row(f"answered {at}", f"{abstention.coverage:.2%}", _interval(abstention.coverage_interval, 2))
        right = "–" if abstention.precision is None else f"{abstention.precision:.2%}"
        table.add_row("right of those", right, _interval(abstention.precision_interval, 2))
    if metrics.mean_cost is not None:
        table.add_row("mean cost", f"{metrics.mean_cost:.4g}", _bounds(found["mean_cost"]))
    return table


def _classes(metrics: Summary) -> Table:
    from rich.markup import escape
    from rich.table import Table

    shown = metrics.per_class
    title = None
    if len(shown) > _MAX_CLASSES_SHOWN:
        shown = tuple(sorted(shown, key=_f1_or_0)[:_NUM_WORST_SHOWN])
        title = f"The {len(shown)} classes of {len(metrics.per_class)} with the lowest F1"
    table = Table(title=title, title_justify="left")
    table.add_column("class")
    for name in ("precision", "interval", "recall", "interval", "F1", "support"):
        table.add_column(name, justify="right")
    for found in shown:
        table.add_row(
            escape(found.class_name),
            _share(found.precision),
            _interval(found.precision_interval, 1) if found.num_predicted else "",
            _share(found.recall),
            _interval(found.recall_interval, 1) if found.support else "",
            _share(found.f1),
            f"{found.support:,}",
        )
    return table


def _confusions(metrics: Summary, class_names: tuple[str, ...]) -> list[str]:
    cells = [
        (count, row, column)
        for row, counts in enumerate(metrics.confusion_matrix)
        for column, count in enumerate(counts)
        if row != column and count
    ]
    # Most frequent first; of equals the one with the lower labels.
    cells.sort(key=lambda cell: (-cell[0], cell[1], cell[2]))
    return [
        f"{class_names[row]} taken for {class_names[column]} ({count:,}×)"
        for count, row, column in cells[:_NUM_CONFUSIONS_SHOWN]
    ]


def _remarks(metrics: Summary) -> Iterator[str]:
    without, never = metrics.num_classes_without_support, metrics.num_classes_never_predicted
    said = []
    if without:
        said.append(f"{without} {'class has' if without == 1 else 'classes have'} no examples here")
    if never:
        said.append(f"{never} {'class was' if never == 1 else 'classes were'} never predicted")
    few = sum(0 < each.support < _FEW_EXAMPLES for each in metrics.per_class)
    if few:
        yield (
            f"{few} {'class has' if few == 1 else 'classes have'} fewer than {_FEW_EXAMPLES} examples: means over "
            "classes, and their intervals, are less sure than they look."
        )
    if said:
        yield f"{' and '.join(said)}: such values are shown as – and count as 0 in the averages."
    if left_out := metrics.num_classes_left_out:
        have, are = ("class has", "is") if left_out == 1 else ("classes have", "are")
        yield f"{left_out} {have} neither and {are} left out of the averages."


def _f1_or_0(found: ClassMetrics) -> float:
    return found.f1 or 0.0


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _interval(interval: Interval | None, digits: int) -> str:
    return "" if interval is None else f"{interval.low * 100:.{digits}f}–{interval.high:.{digits}%}"


def _bounds(interval: Interval | None) -> str:
    return "" if interval is None else f"{interval.low:.4f}–{interval.high:.4f}"
