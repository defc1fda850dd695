"""`tsa-compile bench lossless`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console


def bench_lossless(
    model: Annotated[str, typer.Argument(help="smollm2, gemma3-270m, a folder or a Hugging Face id")] = "smollm2",
    drafts: Annotated[str, typer.Option(help="comma separated")] = "verify,layer,pages,window,lookup",
    dtypes: Annotated[str, typer.Option(help="of the model, comma separated: float32, bfloat16, float16")] = "float32,bfloat16",
    prompts: Annotated[int, typer.Option(help="pieces of prose, of different lengths", min=1)] = 100,
    batch: Annotated[int, typer.Option(help="prompts that are generated together", min=1)] = 20,
    lengths: Annotated[str, typer.Option(help="tokens of the shortest and the longest prompt")] = "32,96",
    new: Annotated[int, typer.Option(help="tokens to generate behind each", min=1)] = 12,
    gamma: Annotated[int, typer.Option(help="tokens of a draft", min=1, max=15)] = 4,
    keys: Annotated[int, typer.Option(help="that drafts read at least; few, so that many are refused", min=1)] = 12,
    state: Annotated[str | None, typer.Option(help="file of what is measured; a second call goes on from it")] = None,
    json: Annotated[str | None, typer.Option("--json", help="write the results to this file")] = None,
) -> None:
    """Speculation against exact decoding, and that against the untouched model, token by token, by the contract of
    docs/speculation.md; exit code 1 where it does not hold."""
    import torch

    from tsa_compile.progress import progress
    from tsa_compile.tools.bench import lossless, lossless_contract, output
    from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer
    from tsa_compile.tools.option_values import numbers

    console, rows = Console(soft_wrap=True), list[lossless_contract.LosslessRow]()
    if len(sizes := numbers("--lengths", lengths, int)) != 2:
        raise ValueError(f"--lengths must be the shortest and the longest prompt, got {lengths!r}")
    shortest, longest = sizes
    setting, names = lossless.Setting(prompts, batch, shortest, longest, new, gamma, keys), drafts.split(",")
    measured = lossless.state_of(state, model, setting)
    with progress(Console(stderr=True)) as start:
        for dtype in dtypes.split(","):
            if dtype not in ("float32", "bfloat16", "float16"):
                raise ValueError(f"--dtypes must be float32, bfloat16 or float16, got {dtype!r}")
            loaded = load_causal_lm(model, getattr(torch, dtype))
            advance = start(dtype, (2 + len(names)) * setting.batches)
            for row in lossless.measure(loaded, load_tokenizer(model), setting, names, measured, advance):
                rows.append(row)
                console.print(lossless_contract.told(row), markup=False, highlight=False)
                if json:
                    output.write_json(json, rows, **measured.key)
    if not all(row.held for row in rows):
        raise typer.Exit(1)
