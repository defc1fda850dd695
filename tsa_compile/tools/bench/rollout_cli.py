"""`tsa-compile bench rollout`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console


def bench_rollout(
    schedules: Annotated[str, typer.Option(help="names, comma separated")] = "sparrow-8b-0.86",
    samples: Annotated[int, typer.Option(help="sequences of the batch", min=1)] = 32,
    past: Annotated[int, typer.Option(help="tokens of the prompt", min=1)] = 16384,
    new: Annotated[int, typer.Option(help="tokens of each sample", min=9)] = 136,
    layers: Annotated[int, typer.Option(help="layers of the random Llama-3.1-8B", min=1)] = 32,
    compiler: Annotated[str, typer.Option(help="eager or inductor, for exact decode and schedules alike")] = "eager",
    json: Annotated[str | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """Tokens a second of a rollout by a random-weight Llama-3.1-8B: published schedules of pages against exact decode."""
    from tsa_compile.tools.bench import output, prefill, rollouts, timing

    console, (gpu, versions) = Console(soft_wrap=True), timing.gpu_and_versions()
    model, names = prefill.build_llama(layers), schedules.split(",")
    rows = rollouts.bench_rollout(model, names, samples, past, new, compiler=compiler)
    console.print("\n".join(map(rollouts.told, rows)), markup=False, highlight=False)
    if json:
        output.write_json(json, rows, environment=versions, ceilings=gpu, layers=layers, compiler=compiler)
