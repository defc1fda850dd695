"""`tsa-compile zoo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

console = Console()


def zoo(
    only: Annotated[str | None, typer.Option(help="models whose name contains this; several, comma separated")] = None,
    processes: Annotated[int, typer.Option(help="models checked at the same time", min=1)] = 1,
    json: Annotated[str | None, typer.Option("--json", help="write the results to this file")] = None,
    markdown: Annotated[str | None, typer.Option(help="write the support table to this file")] = None,
    results: Annotated[list[str] | None, typer.Option(help="show this --json file instead of running; several times")] = None,
) -> None:
    """Check tiny random models of every family: what is replaced, what stays dense and why, and that all outputs are right."""
    from tsa_compile.progress import track
    from tsa_compile.tools.zoo import all_entries, support_table
    from tsa_compile.tools.zoo.jobs import jobs_of, run

    if results:
        runs = support_table.joined([support_table.read_json(path) for path in results])
    else:
        jobs = jobs_of(all_entries.select_entries(only))
        checked = track(run(jobs, processes), "checking", len(jobs), console)
        runs = [(support_table.environment(), [r for group in checked for r in group])]
    found = [r for _, part in runs for r in part]
    console.print(support_table.rich_table(found))
    if json:
        support_table.write_json(json, found)
    if markdown:
        Path(markdown).write_text(support_table.markdown(runs))
    failures = [r for r in found if r.status == "failed"]
    for r in failures:
        console.print(f"failed: {r.model}, {r.implementation}, {r.scenario}: {r.detail}", markup=False)
    if failures:
        raise typer.Exit(1)
