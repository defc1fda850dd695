"""`tsa-compile eval`: what sparsity costs a model; with `--decode`, decode policies beside one another."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console = Console()


def evaluate(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2, gemma3-270m")],
    out: Annotated[str, typer.Option(help="folder for results.json, report.md and report.html; a second call goes on from it")],
    lengths: Annotated[str, typer.Option(help="prompt lengths in tokens, comma separated")] = "4096",
    samples: Annotated[int | None, typer.Option(help="for each task and length; default: 20, of decode 8", min=1)] = None,
    tasks: Annotated[str | None, typer.Option(help="comma separated; 'ruler': its 13 tasks; default: all but these")] = None,
    coverages: Annotated[str | None, typer.Option(help="of the standard variants; default: 0.005,0.02,0.05,0.1,0.2")] = None,
    families: Annotated[str | None, typer.Option(help="beside dense: paper,all,inner,floor; of decode: docs/systems.md")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="JSON file of a policy or plan to compare as well")] = None,
    batch_tokens: Annotated[int, typer.Option(help="tokens that run at a time", min=256)] = 163_840,
    name: Annotated[str | None, typer.Option(help="what the report calls the model; default: MODEL")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="compare decode policies, after a dense prefill")] = False,
    keep: Annotated[str | None, typer.Option(help="with --decode: shares of the pages; default: 0.05,0.1,0.25")] = None,
    last: Annotated[int | None, typer.Option(help="with --decode: tokens of a text that are decoded; default: 64", min=1)] = None,
    batches: Annotated[str | None, typer.Option(help="with --decode: requests whose steps are timed; default: 1,8")] = None,
    minutes: Annotated[float | None, typer.Option(help="with --decode: no cell is begun after so many", min=0)] = None,
) -> None:
    """What sparsity costs MODEL: retrieval, perplexity, divergence from dense and time, for several settings of the attention."""
    from tsa_compile.tools.evaluate import eval_cli

    given = {"--keep": keep, "--last": last, "--batches": batches, "--minutes": minutes}
    wrong = [option for option, value in given.items() if value is not None] if not decode else ["--coverages"] * bool(coverages)
    if wrong:
        raise ValueError(f"{wrong[0]} is an option {'without' if decode else 'with'} --decode")
    common = (model, out, lengths, samples, tasks, families, policy or [], batch_tokens, name)
    if decode:
        found = eval_cli.compare_decode(*common, keep, last, batches, minutes, console)
    else:
        found = eval_cli.evaluate_model(*common, coverages, console)
    console.print(found, markup=False)
