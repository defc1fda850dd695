"""`tsa-compile bench diffusion`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console


def bench_diffusion(
    only: Annotated[str | None, typer.Option(help="cases whose name contains this; several: 'B1 prefix 16K,B4'")] = None,
    attention: Annotated[bool, typer.Option("--attention", help="attention alone, without the 8B model")] = False,
    repeats: Annotated[int, typer.Option(help="timed runs; the median counts", min=1)] = 9,
    json: Annotated[str | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """Denoising steps over a prefix of 16K to 128K, dense and with remembered keys; each result is checked before it is timed."""
    import torch

    from tsa_compile.tools.bench import diffusion, diffusion_cases, output, timing
    from tsa_compile.tools.diffusion.model import BlockLM

    console, (gpu, versions) = Console(soft_wrap=True), timing.gpu_and_versions()
    model = None
    if not attention:
        with torch.device("cuda"):
            model = BlockLM(diffusion_cases.CASES[0].sizes).bfloat16().eval()
    rows = list[diffusion_cases.DiffusionRow]()
    for case in diffusion_cases.CASES:
        if only is not None and not any(part.strip() in case.name for part in only.split(",")):
            continue
        rows.append(diffusion.bench_diffusion(case, model, repeats))
        console.print("\n".join(diffusion_cases.told(rows[-1])), markup=False, highlight=False)
        if json:  # after each, so that a cut run leaves what it has
            output.write_json(json, rows, environment=versions, ceilings=gpu)
