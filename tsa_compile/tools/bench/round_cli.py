"""`tsa-compile bench round`."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.console import Console


def bench_round(
    model: Annotated[
        str, typer.Argument(help="llama-8b: random weights; or smollm2, gemma3-270m, a folder or a Hugging Face id")
    ] = "llama-8b",
    cases: Annotated[str, typer.Option(help="batch x length, comma separated")] = "1x131072,4x131072,8x65536",
    drafts: Annotated[str, typer.Option(help="of verify, layer, pages and window, comma separated")] = "verify",
    given: Annotated[float, typer.Option(help="tokens a round, as measured on real models, which the coin gives")] = 6.0,
    gamma: Annotated[int, typer.Option(help="tokens of a draft", min=1, max=15)] = 6,
    share: Annotated[float, typer.Option(help="of the keys, that drafts read; at least 256 keys")] = 0.07,
    sampled: Annotated[bool, typer.Option(help="temperature 0.6, top-p 0.95, top-k 20; or greedy")] = False,
    layers: Annotated[int, typer.Option(help="of llama-8b", min=1)] = 32,
    compiler: Annotated[str, typer.Option(help="eager or inductor")] = "eager",
    rounds: Annotated[int, typer.Option(help="rounds that are timed", min=1)] = 24,
    minutes: Annotated[float, typer.Option(help="nothing more is begun after that")] = 9.0,
    json: Annotated[str | None, typer.Option("--json", help="write the results to this file, after each of them")] = None,
) -> None:
    """Rounds of speculation beside exact decoding, in one run: c, v, t, their bound t / (gamma c + v), tokens a second."""
    from tsa_compile.tools.bench import acceptance, forced_rounds, output

    console, start = Console(soft_wrap=True), time.monotonic()
    loaded, rows = _load(model, layers), list[forced_rounds.RoundRow]()
    head = dict(environment=_environment(), model=model, layers=layers, dtype=str(loaded.dtype), compiler=compiler)
    for batch, _, length in (size.partition("x") for size in cases.split(",")):
        case = forced_rounds.RoundCase(int(batch), int(length), gamma, given, rounds)
        exact = None
        for name in drafts.split(","):
            if time.monotonic() - start > 60 * minutes:
                console.print(f"not begun after {minutes} minutes: {name} at {batch} x {length}", markup=False)
                continue
            exact = exact or forced_rounds.measure_exact(loaded, case, compiler)
            draft = acceptance.DRAFTS[name](share, case.length)
            how: dict[str, Any] = dict(compiler=compiler, processors=_warpers() if sampled else (), sampled=sampled)
            rows.append(forced_rounds.measure_rounds(loaded, case, name, draft, exact, **how))
            console.print(forced_rounds.told(rows[-1]), markup=False, highlight=False)
            if json:
                output.write_json(json, rows, **head, share=share, sampled=sampled, seconds=round(time.monotonic() - start))


def _load(model: str, layers: int) -> Any:
    from tsa_compile.tools.bench.prefill import build_llama
    from tsa_compile.tools.load_models import load_causal_lm

    return build_llama(layers) if model == "llama-8b" else load_causal_lm(model)


def _warpers() -> Any:
    """As Vegas was measured."""
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    return LogitsProcessorList([TemperatureLogitsWarper(0.6), TopKLogitsWarper(20), TopPLogitsWarper(0.95)])


def _environment() -> dict[str, Any]:
    """Device, versions, and what this GPU copies."""
    import torch
    import transformers

    from tsa_compile.tools.bench import timing

    known = {"transformers": transformers.__version__}
    if not torch.cuda.is_available():
        return {"device": "cpu", "torch": torch.__version__, **known}
    return {**timing.environment(), **known, "ceilings": timing.ceilings()}
