"""`manyeyes doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from manyeyes.cli import common

if TYPE_CHECKING:
    from manyeyes.diagnosis import Finding

_STYLE = {"works": "green", "missing": "yellow", "broken": "red", "absent": "dim"}


def command(
    uris: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="URI", help="Places to try too, e.g. hdfs://namenode:8020/photos or s3://bucket/photos."
        ),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", help="Try only this engine, by a small job.", rich_help_panel="Execution")
    ] = None,
    engine_config: common.EngineConfig = None,
    engine_set: common.EngineSet = None,
    json_output: common.JsonOutput = False,
) -> None:
    """Show which engines, file systems and accelerators work here, and what mends those that do not.

    Each is really tried: an engine runs a small job, a file system is asked for a listing. Exit code 1 if anything that
    you asked for by name, or any of the defaults, does not work.

    Example: `manyeyes doctor hdfs://namenode:8020/photos`
    """
    from manyeyes import config, diagnosis

    settings = common.engine_settings(engine_config, engine_set)
    findings: list[Finding] = []
    with common.progress_bar("checks", hidden=json_output) as progress:
        task = progress.add_task("Trying", total=None)
        for finding in diagnosis.examine(uris or [], engine, settings):
            findings.append(finding)
            progress.update(task, completed=len(findings))
    if json_output:
        common.print_json([config.to_dict(finding) for finding in findings])
    else:
        _print(findings)
    if any(finding.needed and finding.status != "works" for finding in findings):
        raise typer.Exit(1)


def _print(findings: list[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console = common.output()
    table = Table(box=None, pad_edge=False)
    for heading in ("part", "name", "state", "what was found"):
        table.add_column(heading, overflow="fold")
    kind = ""
    for finding in findings:
        style = _STYLE[finding.status]
        shown = "" if finding.kind == kind else finding.kind
        kind = finding.kind
        table.add_row(shown, escape(finding.name), f"[{style}]{finding.status}[/{style}]", escape(finding.detail))
    console.print(table)
    mends = {finding.mend: finding.name for finding in findings if finding.status != "works" and finding.mend}
    if mends:
        console.print("\nWhat mends it:")
        width = max(map(len, mends.values()))
        for mend, name in mends.items():
            console.print(f"  {name:<{width}}  {mend}", markup=False, soft_wrap=True)
