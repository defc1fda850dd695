"""`tsa-compile tune`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from tsa_compile.pays import Timing

console = Console(width=None if sys.stdout.isatty() else 160)  # in a file lines have room
PARTS = ("packed", "prefill", "decode")


def tune(
    head_dims: Annotated[str, typer.Option(help="comma separated")] = "64,128",
    only: Annotated[str, typer.Option(help="packed, prefill or decode; none of them: all three")] = "",
    distributed: Annotated[bool, typer.Option("--distributed", help="of torchrun's ranks: what exchanges take")] = False,
) -> None:
    """Measure on this GPU from which length on the packed engine, the default prefill policy, and exact decode steps are faster,
    and keep it."""
    if distributed:
        _tune_distributed()
        return
    from tsa_compile.tools.bench import decode_pays, pays, timing

    if only not in ("", *PARTS):
        raise typer.BadParameter(f"--only is one of {', '.join(PARTS)}, got {only!r}")
    timing.check_gpu()
    dims = [int(d) for d in head_dims.split(",")]
    if only in ("", "packed"):
        _tune_packed(dims)
    for part, measure in (("prefill", pays.measure), ("decode", decode_pays.measure)):
        if only in ("", part):
            _keep(measure(dims, tell=_tell))


def _tune_packed(dims: list[int]) -> None:
    from tsa_compile.kernels.attend.tokens.engines import tuned_file
    from tsa_compile.tools.bench.tune import tune as measure

    console.print(f"packed from (tokens, by compute capability and head dim): {measure(dims)}", markup=False)
    console.print(f"written to {tuned_file()}", markup=False)


def _tell(row: Timing) -> None:
    console.print(f"{row}; pays from {row.pays_from}", markup=False)


def _keep(rows: list[Timing]) -> None:
    from tsa_compile import pays

    pays.write(rows, pays.tuned_file())
    console.print(f"written to {pays.tuned_file()}", markup=False)


def _tune_distributed() -> None:
    """Rank 0 prints the coefficients of `cache/route_cost.py`, and what they say of calls that they were not taken from."""
    import dataclasses
    import json

    import torch.distributed as dist

    from tsa_compile.tools.bench import tune_distributed as job

    device = job.start()
    link = job.measure(device)
    sizes = [(rows, tokens) for rows in (1, 16) for tokens in (1024, 4096)]
    times = [(*size, *job.predicted_and_measured(link, device, *size)) for size in sizes]
    if dist.get_rank() == 0:
        console.print(json.dumps(dataclasses.asdict(link)), markup=False, soft_wrap=True)
        for rows, tokens, expected, taken in times:
            console.print(f"{rows} rows, {tokens} tokens: {1e6 * expected:.0f} us by these, {1e6 * taken:.0f} us measured")
