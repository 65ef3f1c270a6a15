"""An audit as people read it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from manyeyes.auditing.findings import AuditResult, Cluster

if TYPE_CHECKING:
    from rich.table import Table

_NUM_SHOWN = 8
_MAX_CLASSES_SHOWN = 30
_UNITS = {"pixels": "pixels", "aspect": "width / height", "brightness": "mean grey", "sharpness": "variance"}


def tables(result: AuditResult) -> Iterator[Table | str]:
    """Yield what to print: the figures first, then examples of each kind of finding."""
    yield f"{result.dataset}: {result.num_examples:,} examples, {len(result.classes):,} classes"
    yield _summary(result)
    for title, clusters in (
        ("Leaks: the same picture in several splits", result.leaks),
        ("Duplicates with conflicting labels", tuple(c for c in result.conflicts if not c.is_leak)),
    ):
        if clusters:
            yield _clusters(title, clusters)
    if result.straddling_groups:
        shown = ", ".join(each.group for each in result.straddling_groups[:_NUM_SHOWN])
        more = len(result.straddling_groups) - _NUM_SHOWN
        yield f"Groups in several splits: {shown}{f' and {more:,} more' if more > 0 else ''}"
    if any(each.problems for each in result.classes):
        yield _classes(result)
    if result.outliers:
        yield _outliers(result)
    if result.label_errors:
        yield _label_errors(result)
    if result.fixed is not None:
        yield from _fixed(result)
    if result.files:
        names = [uri.rpartition("/")[2] for uri in result.files]
        yield f"Written to {result.files[0].rpartition('/')[0]}: {', '.join(names)}"


def _summary(result: AuditResult) -> Table:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column(justify="right")
    leaking = sum(len(cluster.examples) for cluster in result.leaks)
    table.add_row("exact copies beyond the first", f"{result.num_copies:,}")
    table.add_row(f"near duplicates (≤ {result.distance} of 64 bits)", f"{result.num_near_duplicates:,}")
    table.add_row("leaks between splits", f"{len(result.leaks):,} clusters of {leaking:,} examples")
    table.add_row("groups in several splits", f"{len(result.straddling_groups):,}")
    table.add_row("duplicates with conflicting labels", f"{len(result.conflicts):,} clusters")
    table.add_row("images without structure", f"{result.num_flat:,}")
    imbalance = "a class has none" if result.imbalance is None else f"{result.imbalance:,.1f} : 1"
    table.add_row("largest : smallest class in train", imbalance)
    table.add_row("classes with a problem", f"{sum(bool(each.problems) for each in result.classes):,}")
    table.add_row("odd images", f"{len({outlier.example for outlier in result.outliers}):,}")
    judged = "not looked for" if result.num_judged is None else f"{len(result.label_errors):,} of {result.num_judged:,}"
    table.add_row("probable label errors", judged)
    return table


def _clusters(title: str, clusters: tuple[Cluster, ...]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=_title(title, len(clusters)), title_justify="left")
    for name in ("examples", "kind", "splits", "classes", "the first of each split and class"):
        table.add_column(name, justify="right" if name == "examples" else "left")
    for cluster in clusters[:_NUM_SHOWN]:
        firsts = {(example.split, example.class_name): example.path for example in reversed(cluster.examples)}
        table.add_row(
            f"{len(cluster.examples):,}",
            "copies" if cluster.all_copies else "near",
            ", ".join(cluster.splits),
            escape(", ".join(sorted({example.class_name for example in cluster.examples}))),
            escape("\n".join(path for _, path in sorted(firsts.items()))),
        )
    return table


def _classes(result: AuditResult) -> Table:
    from rich.markup import escape
    from rich.table import Table

    shown = [each for each in result.classes if each.problems]
    table = Table(title=_title("Classes with a problem", len(shown), _MAX_CLASSES_SHOWN), title_justify="left")
    table.add_column("class")
    splits = list(result.classes[0].num_examples)
    for split in splits:
        table.add_column(split, justify="right")
    table.add_column("problem")
    for each in shown[:_MAX_CLASSES_SHOWN]:
        counts = [f"{each.num_examples[split]:,}" for split in splits]
        table.add_row(escape(each.class_name), *counts, ", ".join(each.problems).replace("_", " "))
    return table


def _outliers(result: AuditResult) -> Table:
    from rich.markup import escape
    from rich.table import Table

    measure_of = {"small": "pixels", "large": "pixels", "narrow": "aspect", "wide": "aspect", "blurred": "sharpness"}
    counts = Counter(outlier.kind for outlier in result.outliers)
    table = Table(title="Odd images", title_justify="left")
    for name in ("kind", "images", "farthest", "beyond", "measured as", "image"):
        table.add_column(name, justify="right" if name in ("images", "farthest", "beyond") else "left")
    for kind, count in counts.items():
        first = next(outlier for outlier in result.outliers if outlier.kind == kind)
        measure = measure_of.get(kind, "brightness")
        distribution = result.distributions[measure]
        is_low = kind in ("small", "narrow", "dark", "blurred")
        fence = distribution.low_fence if is_low else distribution.high_fence
        row = (kind, f"{count:,}", f"{first.value:,.4g}", f"{fence:,.4g}", _UNITS[measure], escape(first.example.path))
        table.add_row(*row)
    return table


def _label_errors(result: AuditResult) -> Table:
    from rich.markup import escape
    from rich.table import Table

    title = _title("Probable label errors", len(result.label_errors))
    table = Table(title=title, title_justify="left")
    for name in ("image", "split", "label", "the model says", "probability of the label"):
        table.add_column(name)
    for error in result.label_errors[:_NUM_SHOWN]:
        example = error.example
        names = (escape(example.class_name), escape(error.predicted))
        table.add_row(escape(example.path), example.split, *names, f"{error.label_probability:.2%}")
    return table


def _fixed(result: AuditResult) -> Iterator[str]:
    fixed = result.fixed
    assert fixed is not None
    out = sum(fixed.left_out.values())
    reasons = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in fixed.left_out.items())
    splits = ", ".join(f"{split} {count:,}" for split, count in fixed.written.items())
    yield (
        f"Mended: {fixed.dataset}: {result.num_examples:,} examples = {fixed.num_examples:,} kept ({splits}) "
        f"+ {out:,} left out{f' ({reasons})' if reasons else ''}; {fixed.num_moved:,} moved to another split. "
        f"Each is listed in {fixed.changes}. The images stay in {result.dataset}."
    )
    for split, names in fixed.emptied.items():
        if split not in fixed.written:
            yield f"Nothing is left in {split}."
        else:
            more = f" and {len(names) - _NUM_SHOWN:,} more" if len(names) > _NUM_SHOWN else ""
            yield f"In {split} no example is left of {', '.join(names[:_NUM_SHOWN])}{more}."


def _title(text: str, count: int, most: int = _NUM_SHOWN) -> str:
    return f"{text}, the first {most} of {count:,}" if count > most else text
