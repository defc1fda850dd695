"""`tsa-compile bench resident`."""

from __future__ import annotations

from typing import Annotated

import typer


def bench_resident(
    cases: Annotated[str, typer.Option(help="batch x length, comma separated; 69 GB with 32 layers")] = "4x131072,16x32768",
    keep: Annotated[float, typer.Option(help="share of the pages that is resident", min=0, max=1)] = 0.13,
    fetched: Annotated[float, typer.Option(help="share of the pages that each step brings where nothing is kept")] = 0.05,
    interval: Annotated[int, typer.Option(help="steps between two choices", min=1)] = 64,
    layers: Annotated[int, typer.Option(help="layers of the random Llama-3.1-8B", min=1)] = 32,
    on_device: Annotated[bool, typer.Option(help="also with all keys on the GPU, which must have room for them")] = True,
    json: Annotated[str | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """Decode steps of a random-weight Llama-3.1-8B with its keys in host memory: a resident part against bringing pages anew."""
    from tsa_compile.tools.bench import output, prefill, resident, timing

    gpu, versions = timing.gpu_and_versions()
    model, rows = prefill.build_llama(layers), list[resident.ResidentRow]()
    for size in cases.split(","):
        batch, _, length = size.partition("x")
        case = resident.ResidentCase(int(batch), int(length), keep, fetched, interval)
        rows.append(resident.bench_resident(model, case, on_device))
        print(rows[-1], flush=True)
        if json:
            output.write_json(json, rows, environment=versions, ceilings=gpu, layers=layers)
