"""`manyeyes report`."""

from __future__ import annotations

from typing import Annotated

import typer

from manyeyes.cli import common


def command(
    subject: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="A run, or a directory that evaluate or crossval wrote.", show_default=False
        ),
    ],
    out: Annotated[
        str | None, typer.Option("--out", "-o", help="File to write; default: report.html in the directory.")
    ] = None,
    split: Annotated[
        str | None, typer.Option(help="Of a run: which evaluation; default: test, else val, else train.")
    ] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write model_card.md beside the report, to be completed by you.")
    ] = False,
    saliency: Annotated[
        bool, typer.Option("--saliency/--no-saliency", help="Whether to show which pixels decided: takes up to 10 s.")
    ] = True,
    json_output: common.JsonOutput = False,
) -> None:
    """Write one page about a RUN, an evaluation or a cross-validation that opens without a network.

    Shows the figures with intervals, learning curves, the confusion matrix, every class, calibration, the most
    confident mistakes as pictures, what became of the data, and how to make it all again.

    Example: `manyeyes report runs/fashion --card`
    """
    from manyeyes.report.build import SALIENCY_SECONDS, write_report

    console = common.console()
    with console.status("Reading") as status:
        written = write_report(
            subject,
            out,
            split=split,
            card=card,
            explain_seconds=SALIENCY_SECONDS if saliency else 0.0,
            on_progress=status.update,
        )
    if json_output:
        common.print_json({"files": list(written)})
        return
    for uri in written:
        common.output().print(f"Written: {uri}", soft_wrap=True, markup=False)
