"""`manyeyes export`."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from manyeyes.cli import common


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run to export.", show_default=False)],
    bundle: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE", help="The directory to make; an older bundle there is replaced.", show_default=False
        ),
    ],
    precision: Annotated[
        str, typer.Option(help="Of the arithmetic when it is served: float32 or bfloat16.")
    ] = "float32",
    backend: Annotated[str, typer.Option(help="That serves it: auto, openvino or onnxruntime.")] = "auto",
    which: Annotated[str, typer.Option(help="The checkpoint: best or last.")] = "best",
    dataset: Annotated[
        str | None, typer.Option(help="Whose images both models are compared on; default: that of the run.")
    ] = None,
    json_output: common.JsonOutput = False,
) -> None:
    """Make a BUNDLE of a RUN: what predict and serve need, proven to answer as the trained model.

    Example: `manyeyes export runs/fashion bundles/fashion`
    """
    from rich.table import Table

    from manyeyes import config
    from manyeyes.errors import UsageError
    from manyeyes.training.export import export

    if which not in ("best", "last"):
        raise UsageError(f"--which {which!r} is not one of best, last.")
    with common.console().status("Exporting and comparing …"):
        result = export(run, bundle, precision=precision, backend=backend, which=which, dataset=dataset)  # type: ignore[arg-type]
    if json_output:
        common.print_json(config.to_dict(result))
        return
    parity = result.parity
    table = Table(
        title=f"Served in {result.precision} by {result.backend}, compared with the trained model", title_justify="left"
    )
    for name in ("compared on", "largest difference of a logit", "allowed", "same top-1"):
        table.add_column(name, justify="right" if name != "compared on" else "left")
    table.add_row(
        f"{parity.num_golden} golden examples", f"{parity.golden_max_difference:.2g}", f"{parity.tolerance:.2g}", ""
    )
    allowed = f"{parity.tolerance:.2g}" if result.precision == "float32" else "top-1 decides"
    table.add_row(
        f"{parity.num_images} images", f"{parity.max_difference:.2g}", allowed, f"{parity.top1_agreement:.2%}"
    )
    out = common.output()
    out.print(table)
    size = f"{result.model_bytes / 1e6:.2f} MB"
    out.print(
        f"Bundle {result.bundle}: {result.name}, {result.num_classes} classes, {size}, version {result.fingerprint}.",
        soft_wrap=True,
    )
    out.print(f"Next: manyeyes serve {shlex.quote(result.bundle)}", soft_wrap=True, markup=False)
