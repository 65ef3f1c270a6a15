"""The model card of a run, as Markdown: what is known is filled in, what only people know is left to them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from manyeyes.evaluation.intervals import level_text
from manyeyes.evaluation.metrics import ClassMetrics, Summary

if TYPE_CHECKING:
    from manyeyes.report.build import Report

_NUM_EXTREMES = 5
_TO_FILL_IN = "*To be filled in by whoever publishes the model.*"


def model_card(report: Report) -> str:
    """Write the card; names of classes and paths are escaped, as they come from others."""
    parts = [f"# Model card: {_text(report.subject.name)}\n"]
    parts.append(f"Made by Manyeyes on {report.made_at[:10]} from {_code(report.subject.uri)}.\n")
    parts += [f"> {_text(notice)}\n" for notice in report.notices]
    parts.append(
        f"## Intended use\n\n{_TO_FILL_IN} What it is for, what it is not for, who may be harmed by its mistakes.\n"
    )
    parts.append(_model(report))
    parts.append(_data(report))
    if report.metrics is not None:
        parts += [_figures(report), _calibration(report.metrics), _extremes(report.metrics)]
    parts.append(
        f"## Limits\n\n{_TO_FILL_IN} The figures hold for images like those of the split they were measured on.\n"
    )
    parts.append(_provenance(report))
    return "\n".join(parts)


def _model(report: Report) -> str:
    run = report.subject.run
    rows = [("Classes", f"{len(report.class_names):,}")]
    if run is not None:
        shape = run.model.input_shape
        rows = [
            ("Architecture", _text(run.model.name)),
            ("Begins with", _text(run.settings.get("model", {}).get("weights", run.model.weights))),
            (
                "Input",
                "unknown" if shape is None else f"{shape[0]} × {shape[1]} pixels, {'RGB' if shape[2] == 3 else 'grey'}",
            ),
            *rows,
        ]
    listed = ", ".join(_text(name) for name in report.class_names[:50])
    more = f" and {len(report.class_names) - 50} more" if len(report.class_names) > 50 else ""
    return f"## Model\n\n{_table(('', ''), rows)}\nClasses: {listed}{more}.\n"


def _data(report: Report) -> str:
    balance = report.balance
    if balance is None:
        return "## Data\n\nThe dataset is not where it was.\n"
    rows = []
    for split, counts in balance.written.items():
        rows.append((_text(split), f"{sum(counts):,}", f"{min(counts):,}", f"{max(counts):,}"))
    refused = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in balance.quarantined.items())
    return (
        f"## Data\n\n{_code(balance.uri)} (fingerprint {_code(balance.fingerprint)}): {balance.num_seen:,} inputs "
        f"seen, {sum(map(sum, balance.written.values())):,} written, {sum(balance.quarantined.values()):,} quarantined"
        f"{f' ({refused})' if refused else ''}, {sum(balance.skipped.values()):,} skipped.\n\n"
        f"{_table(('Split', 'Images', 'Fewest of a class', 'Most of a class'), rows)}"
        f"\n{_TO_FILL_IN} Who is shown, who took the images, under which terms.\n"
    )


def _figures(report: Report) -> str:
    metrics, found = report.metrics, report.subject.evaluation
    assert metrics is not None and found is not None
    rows = [(figure.title, figure.text(figure.value), figure.interval_text or "–") for figure in report.figures]
    return (
        f"## Figures\n\nOn {metrics.num_examples:,} images of {_code(found.split)} of {_code(found.dataset)}.\n\n"
        f"{_table(('Figure', 'Value', f'{level_text(metrics.confidence)} interval'), rows)}"
    )


def _calibration(metrics: Summary) -> str:
    after, before = metrics.calibration, metrics.uncalibrated
    text = f"calibration error {after.ece:.4f}, log loss {after.log_loss:.4f}"
    if before is not None:
        text += f" with the temperature {after.temperature:.3g}; before, {before.ece:.4f} and {before.log_loss:.4f}"
    elif after.temperature == 1.0:
        text += "; the probabilities are not calibrated"
    return f"## Calibration\n\n{text[0].upper()}{text[1:]}.\n"


def _extremes(metrics: Summary) -> str:
    known = sorted((found for found in metrics.per_class if found.f1 is not None), key=lambda found: found.f1 or 0.0)
    number = min(_NUM_EXTREMES, len(known) // 2)
    if not number:
        return ""

    def rows(classes: Iterable[ClassMetrics]) -> list[tuple[str, ...]]:
        return [
            (
                _text(found.class_name),
                "–" if found.recall is None else f"{found.recall:.1%}",
                f"{found.recall_interval.low:.1%} to {found.recall_interval.high:.1%}" if found.support else "–",
                "–" if found.precision is None else f"{found.precision:.1%}",
                f"{found.support:,}",
            )
            for found in classes
        ]

    titles = ("Class", "Recall", "interval", "Precision", "Images")
    return (
        f"## Classes\n\nHardest (lowest F1):\n\n{_table(titles, rows(known[:number]))}"
        f"\nEasiest:\n\n{_table(titles, rows(reversed(known[-number:])))}"
    )


def _provenance(report: Report) -> str:
    lines = ["## Provenance\n"]
    for block in report.provenance:
        if block.title == "Commands":
            commands = "\n".join(value for _, value in block.facts)
            fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", commands)), default=0))
            lines.append(f"To make it again:\n\n{fence}sh\n{commands}\n{fence}\n")
        else:
            lines.append(_table((block.title, ""), [(term, _code(value)) for term, value in block.facts]))
    return "\n".join(lines)


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    """Text that stays text: no markup of Markdown or HTML, on one line."""
    line = " ".join(str(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]{}|#!~])", r"\\\1", line)


def _code(value: str) -> str:
    """A code span, whatever is in it; a bar would end the cell of a table."""
    line = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"
