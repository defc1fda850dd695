"""`tsa-compile bench host`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from tsa_compile.tools.option_values import numbers


def bench_host(
    lengths: Annotated[str, typer.Option(help="tokens, comma separated")] = "512,1024,2048,4096,8192",
    json: Annotated[str | None, typer.Option("--json", help="write the results to this file, after each row")] = None,
) -> None:
    """What one call of each default operator takes of the host, beside SDPA: one layer, 32/8 heads of 128, bfloat16."""
    from tsa_compile.tools.bench import host_time, output, timing

    timing.check_gpu()
    console, versions, rows = Console(width=160), timing.environment(), []
    for row in host_time.bench_host(numbers("--lengths", lengths, int)):
        rows.append(row)
        console.print(f"{row.form}, {row.length:,} tokens: {row.host:.0f} us (in a row of calls {row.call:.0f})", highlight=False)
        if json:
            output.write_json(json, rows, environment=versions)
    console.print(host_time.table(rows))
