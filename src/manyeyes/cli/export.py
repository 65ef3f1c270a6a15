"""`manyeyes export`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from manyeyes.cli import common

if TYPE_CHECKING:
    from rich.table import Table

    from manyeyes.training.export import ExportResult
    from manyeyes.training.held_out import Accuracy


def command(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run to export.", show_default=False)],
    bundle: Annotated[
        str,
        typer.Argument(
            metavar="BUNDLE", help="The directory to make; an older bundle there is replaced.", show_default=False
        ),
    ],
    precision: Annotated[
        str,
        typer.Option(
            help="Of the arithmetic when it is served: float32, bfloat16, int8, or auto for the fastest that costs at "
            "most 0.5 points of accuracy."
        ),
    ] = "float32",
    backend: Annotated[
        str, typer.Option(help="That serves it: openvino, onnxruntime, or auto for the faster, as measured.")
    ] = "auto",
    which: Annotated[str, typer.Option(help="The checkpoint: best or last.")] = "best",
    dataset: Annotated[
        str | None, typer.Option(help="Whose images both models are compared on; default: that of the run.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Fit a temperature on val, so that probabilities can be believed.")
    ] = True,
    target_precision: Annotated[
        float | None,
        typer.Option(help="Abstain where the answer is less sure than it takes to be right so often, e.g. 0.99."),
    ] = None,
    json_output: common.JsonOutput = False,
) -> None:
    """Make a BUNDLE of a RUN: what predict and serve need, proven to answer as the trained model.

    Example: `manyeyes export runs/fashion bundles/fashion --precision auto`
    """
    from manyeyes import config
    from manyeyes.errors import UsageError
    from manyeyes.training.export import export

    if which not in ("best", "last"):
        raise UsageError(f"--which {which!r} is not one of best, last.")
    with common.console().status("Exporting and comparing …"):
        result = export(
            run,
            bundle,
            precision=precision,  # type: ignore[arg-type]
            backend=backend,  # type: ignore[arg-type]
            which=which,  # type: ignore[arg-type]
            dataset=dataset,
            calibrate=calibrate,
            target_precision=target_precision,
        )
    if json_output:
        common.print_json(config.to_dict(result))
        return
    out = common.output()
    out.print(_parity_table(result))
    out.print(_precision_table(result))
    out.print(_told_accuracy(result.accuracy, result.precision), soft_wrap=True)
    if result.calibration is not None:
        out.print(_told_calibration(result), soft_wrap=True, markup=False)
    for candidate in result.candidates:
        if candidate.refusal:
            out.print(f"Not {candidate.precision}: {candidate.refusal}", soft_wrap=True, markup=False)
    size = f"{result.model_bytes / 1e6:.2f} MB"
    out.print(
        f"Bundle {result.bundle}: {result.name}, {result.num_classes} classes, {size}, version {result.fingerprint}.",
        soft_wrap=True,
    )
    out.print(_told_evaluation(result), soft_wrap=True, markup=False)
    out.print(f"Next: manyeyes serve {shlex.quote(result.bundle)}", soft_wrap=True, markup=False)


def _parity_table(result: ExportResult) -> Table:
    from rich.table import Table

    parity = result.parity
    table = Table(
        title=f"Served in {result.precision} by {result.backend}, compared with the trained model", title_justify="left"
    )
    for name in ("compared on", "largest difference of a logit", "allowed", "same top-1"):
        table.add_column(name, justify="right" if name != "compared on" else "left")
    table.add_row(
        f"{parity.num_golden} golden examples", f"{parity.golden_max_difference:.2g}", f"{parity.tolerance:.2g}", ""
    )
    allowed = {"float32": f"{parity.tolerance:.2g}", "int8": "accuracy decides"}.get(result.precision, "top-1 decides")
    table.add_row(
        f"{parity.num_images} images", f"{parity.max_difference:.2g}", allowed, f"{parity.top1_agreement:.2%}"
    )
    return table


def _precision_table(result: ExportResult) -> Table:
    from rich.table import Table

    split = result.accuracy.split
    table = Table(title="Measured on this machine", title_justify="left")
    for name in ("precision", "backend", "threads", "ms, one image", "ms in a batch", f"right on {split}", "verdict"):
        table.add_column(name, justify="left" if name in ("precision", "backend", "verdict") else "right")
    for each in result.candidates:
        right = f"{each.accuracy.accuracy:.2%}" if each.accuracy is not None else "-"
        served = (each.precision, each.refusal) == (result.precision, "")
        verdict = "refused" if each.refusal else "served" if served else "passed"
        if each.note:
            verdict += f"; {each.note}"
        timings = (f"{each.milliseconds:.3g}", f"{each.batch_milliseconds:.3g}") if each.backend else ("-", "-")
        table.add_row(each.precision, each.backend or "-", f"{each.num_threads or '-'}", *timings, right, verdict)
    return table


def _told_evaluation(result: ExportResult) -> str:
    found = result.evaluation
    if found is None:
        return (
            f"Hint: the bundle has no figures for its model card, because {result.not_evaluated}. For them: "
            f"manyeyes evaluate {shlex.quote(result.run)} DATASET, then export again."
        )
    low, high = found.accuracy_interval
    return (
        f"Its model card says: accuracy {found.accuracy:.2%} ({low:.2%} to {high:.2%}) of {found.num_examples:,} "
        f"images of {found.split}, macro F1 {found.macro_f1:.3f}."
    )


def _told_calibration(result: ExportResult) -> str:
    found = result.calibration
    assert found is not None
    if not found.split:
        return f"Not calibrated: {found.note}"
    told = found.note or (
        f"Temperature {result.temperature:.3g}, by {found.num_examples:,} images of {found.split}: log loss "
        f"{found.log_loss_before:.4f} before, {found.log_loss:.4f} with it; calibration error {found.ece_before:.4f} "
        f"before, {found.ece:.4f} with it."
    )
    if found.target_precision is not None:
        told += (
            f" Abstains below probability {result.threshold:.4f}: of {found.num_examples:,} images of {found.split} "
            f"{found.coverage:.1%} are answered, {found.precision:.2%} of these right; 95 % sure of "
            f"{found.precision_low:.2%}."
        )
    return told


def _told_accuracy(accuracy: Accuracy, precision: str) -> str:
    images = f"{accuracy.num_images:,} images of {accuracy.split}"
    if precision == "float32":
        return f"Accuracy in float32: {accuracy.float32:.2%} of {images}."
    told = "" if accuracy.labelled else " (without labels of this model: against the answers of float32)"
    high = accuracy.loss_points_high
    shows = "" if high <= 0.5 else f"; more images than {accuracy.num_images:,} would be needed to show less than 0.5"
    return (
        f"Accuracy in {precision}{told}: {accuracy.accuracy:.2%} of {images}, in float32 {accuracy.float32:.2%}: "
        f"{accuracy.num_lost} lost, {accuracy.num_gained} gained, {accuracy.loss_points:+.2g} points lost; "
        f"95 % sure that it is at most {high:.2g}{shows}."
    )
