"""Benchmarks that every rank of a torchrun job runs: `torchrun --nproc-per-node 2 -m tsa_compile bench context-parallel`."""

from __future__ import annotations

from typing import Annotated

import typer

from tsa_compile.tools.option_values import numbers


def bench_context_parallel(
    lengths: Annotated[str, typer.Option(help="prompt lengths, comma separated")] = "262144",
    layers: Annotated[int, typer.Option(help="layers of the random Llama-3.1-8B", min=1)] = 8,
    keep: Annotated[
        str, typer.Option(help="shares of the causal pairs that are read, comma separated; 1: all. Random attention is flat")
    ] = "0.1,1",
    cached: Annotated[bool, typer.Option(help="keep keys and values, all of them on every rank")] = False,
    repeats: Annotated[int, typer.Option(help="timed runs; the median counts", min=1)] = 3,
    json: Annotated[str | None, typer.Option("--json", help="rank 0 writes the results to this file")] = None,
) -> None:
    """Prefill of a random-weight Llama-3.1-8B by `BlockSparse`: on rank 0's GPU alone, and spread over those of all ranks."""
    import torch
    import torch.distributed as dist

    from tsa_compile.tools.bench import context_parallel, output, prefill, timing, tune_distributed

    device = tune_distributed.start()
    if device.type != "cuda":
        raise ValueError("bench context-parallel times GPUs: there must be one for each rank")
    torch.manual_seed(0)
    model, rows = prefill.build_llama(layers), list[context_parallel.ContextRow]()
    gpu = timing.ceilings()
    for length in numbers("--lengths", lengths, int):
        for share in numbers("--keep", keep, float):
            rows.append(context_parallel.bench_context(model, length, share, repeats, cached))
            if dist.get_rank() == 0:
                print(rows[-1], flush=True)
                if json:
                    output.write_json(json, rows, environment=timing.environment(), ceilings=gpu, layers=layers)
    dist.destroy_process_group()
