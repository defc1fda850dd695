"""`tsa-compile diffusion`: train a small block-diffusion model and measure remembered keys on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def diffusion(
    out: Annotated[Path, typer.Option(help="folder for model.pt, results.json and report.html")],
    steps: Annotated[int, typer.Option(help="training steps", min=1)] = 2500,
    minutes: Annotated[float | None, typer.Option(help="stop training after so long")] = None,
    prefix: Annotated[int, typer.Option(help="tokens before the block of questions, a multiple of 32", min=64)] = 1024,
    batch: Annotated[int, typer.Option(help="sequences of a training step", min=1)] = 32,
    rate: Annotated[float, typer.Option(help="learning rate")] = 1e-3,
    device: Annotated[str, typer.Option(help="cuda or cpu")] = "cuda",
) -> None:
    """Train some five million parameters on recall in prose, then compare remembered keys with dense attention."""
    from tsa_compile.tools.diffusion import experiment

    console = Console(soft_wrap=True)
    chosen = experiment.Experiment(steps=steps, prefix=prefix, batch=batch, rate=rate)

    def told(step: int, prefix: int, loss: float) -> None:
        console.print(f"step {step}, prefix {prefix}: loss of the answers {loss:.3f}", highlight=False)

    found = experiment.run(chosen, out, device, None if minutes is None else 60 * minutes, told)
    for loop, outcomes in found.items():
        console.print(f"{loop}:", *experiment.lines(outcomes), sep="\n  ", markup=False, highlight=False)
