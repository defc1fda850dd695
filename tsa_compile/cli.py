"""The command line: `tsa-compile demo|explain`."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)
console = Console()

Tokens = Annotated[int, typer.Option(help="prompt length, in tokens", min=64)]
Coverage = Annotated[float | None, typer.Option(help="share of attention mass that may be dropped, in [0, 1)")]
Repeats = Annotated[int, typer.Option(help="timed runs; the median counts", min=1)]


@app.command()
def demo(tokens: Tokens = 4000, coverage: Coverage = None, repeats: Repeats = 3) -> None:
    """Load SmolLM2-135M-Instruct, hide a number in a long text, and ask for it dense and token-sparse."""
    from tsa_compile import demo as job
    from tsa_compile.plan import default_policy

    result = job.run_demo(tokens, default_policy(coverage), console, repeats)
    job.print_result(result, console)
    if not result.both_found:
        raise typer.Exit(1)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2")],
    tokens: Tokens = 4000,
    coverage: Coverage = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Say which attention sites of MODEL would be replaced in a prefill of random tokens, and why the others not."""
    import torch

    from tsa_compile import api
    from tsa_compile.bench.models import load_causal_lm
    from tsa_compile.plan import default_policy

    policy = default_policy(coverage)
    network = load_causal_lm(model)
    ids = torch.randint(0, network.config.get_text_config().vocab_size, (1, tokens), device=network.device)
    report = api.explain(network, input_ids=ids, use_cache=False, policy=policy)
    if json:
        print(report.to_json())
        return
    console.print(report.to_table())
    for warning in report.warnings:
        console.print(f"warning: {warning}", markup=False)


def main() -> None:
    """Entry point of `tsa-compile`; expected failures are one line on stderr and exit code 1."""
    try:
        app(standalone_mode=True)
    except (OSError, ImportError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", markup=False, highlight=False)
        raise SystemExit(1) from error
