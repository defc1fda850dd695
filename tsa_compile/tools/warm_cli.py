"""`tsa-compile warm`: compile a model's kernels ahead of the processes that serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def warm(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2")],
    plan: Annotated[Path | None, typer.Option(help="a JSON file of a plan or a policy; default: the default plan")] = None,
    max_batch: Annotated[int, typer.Option(help="rows of the largest batch", min=1)] = 8,
    max_tokens: Annotated[int | None, typer.Option(help="of the longest prompt; default: the model's positions", min=1)] = None,
) -> None:
    """Run MODEL on random tokens, so that all kernels that it needs are in Triton's cache folder."""
    from tsa_compile import api
    from tsa_compile.plan import Plan
    from tsa_compile.tools.load_models import load_causal_lm
    from tsa_compile.warm_up import warm as run

    chosen = None if plan is None else Plan.load(plan)
    network = api.transform(load_causal_lm(model), chosen)
    found = run(network, max_batch, max_tokens, console=Console(stderr=True))
    console = Console(soft_wrap=True)
    console.print(f"{model}: {found}", markup=False, highlight=False)
    if next(network.parameters()).device.type != "cuda":
        console.print("no GPU here: the references ran, which compile nothing", markup=False)
