"""`manyeyes compare`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from manyeyes.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from manyeyes.report.comparing import Against, ComparedResult
    from manyeyes.report.figures import Figure


def command(
    first: Annotated[
        str,
        typer.Argument(
            metavar="FIRST", help="A run, or a directory that evaluate or crossval wrote.", show_default=False
        ),
    ],
    second: Annotated[
        str, typer.Argument(metavar="SECOND", help="What it is compared with the first.", show_default=False)
    ],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="MORE", help="More of the kind.", show_default=False)
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of runs: which evaluation; default: test, else val, else train.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="File for a page that shows it, e.g. compare.html.")
    ] = None,
    json_output: common.JsonOutput = False,
) -> None:
    """Compare runs, evaluations or cross-validations side by side: each of the others less the FIRST.

    Cross-validations on the same folds are compared by paired tests over folds; evaluations on the same split by the
    examples that only one gets right, where both kept their predictions (evaluate --predictions).

    Example: `manyeyes compare runs/cnn runs/resnet --out compare.html`
    """
    from manyeyes.report.comparing import compare, write_comparison

    result = compare([first, second, *(more or [])], split=split)
    written = write_comparison(result, out) if out is not None else None
    if json_output:
        common.print_json(result.to_dict() | ({"files": [written]} if written else {}))
        return
    console = common.output()
    what = "held-out examples" if result.kind == "crossval" else f"examples of {result.split}"
    console.print(f"{result.num_examples:,} {what} of {result.dataset}", soft_wrap=True, markup=False)
    for table in _tables(result):
        console.print(table)
    for notice in result.notices:
        console.print(notice, soft_wrap=True, markup=False)
    if written:
        console.print(f"Written: {written}", soft_wrap=True, markup=False)


def _tables(result: ComparedResult) -> Iterator[Table]:
    from rich.markup import escape
    from rich.table import Table

    figures = {figure.name: figure for entry in result.entries for figure in entry.figures}
    table = Table()
    table.add_column("figure")
    for entry in result.entries:
        table.add_column(escape(entry.name), justify="right")
    for name, figure in figures.items():
        row = [next((each for each in entry.figures if each.name == name), None) for entry in result.entries]
        table.add_row(figure.title, *("–" if each is None else _cell(each) for each in row))
    yield table
    for against in result.against:
        yield _differences(against, result.entries[0].name, figures, result.confidence)


def _cell(figure: Figure) -> str:
    return figure.text(figure.value) + (f"\n[dim]{figure.interval_text}[/dim]" if figure.interval_text else "")


def _differences(against: Against, first: str, figures: dict[str, Figure], confidence: float) -> Table:
    from rich.markup import escape
    from rich.table import Table

    from manyeyes.evaluation.intervals import level_text

    table = Table(title=f"{escape(against.name)} less {escape(first)}", title_justify="left")
    table.add_column("figure")
    for name in ("difference", f"{level_text(confidence)} interval", "p"):
        table.add_column(name, justify="right")
    for each in against.differences:
        # A difference of shares is told in percentage points: "-24%" would be taken for a part of the first.
        of_shares = figures[each.name].form == "share"
        scale, form, unit = (100, "+.2f", " points") if of_shares else (1, "+.4f", "")
        interval = ""
        if each.low is not None and each.high is not None:
            interval = f"{scale * each.low:{form}} to {scale * each.high:{form}}{unit}"
        p_value = "" if each.p_value is None else f"{each.p_value:.3g}"
        table.add_row(figures[each.name].title, f"{scale * each.value:{form}}{unit}", interval, p_value)
    if against.mcnemar is not None:
        counts = against.mcnemar
        table.add_row(
            "only one is right", f"{counts.only_first} : {counts.only_second}", "McNemar", f"{counts.p_value:.3g}"
        )
    return table
