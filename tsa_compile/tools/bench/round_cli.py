"""`tsa-compile bench round`."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from tsa_compile.tools.bench.forced_rounds import RoundCase


def bench_round(
    model: Annotated[
        str, typer.Argument(help="llama-8b: random weights; or smollm2, gemma3-270m, a folder or a Hugging Face id")
    ] = "llama-8b",
    cases: Annotated[str, typer.Option(help="batch x length, comma separated")] = "1x131072,4x131072,8x65536",
    drafts: Annotated[str, typer.Option(help="of verify, layer, pages and window, comma separated")] = "verify",
    given: Annotated[float, typer.Option(help="tokens a round, as measured on real models, which the coin gives")] = 6.0,
    acceptance: Annotated[
        str | None,
        typer.Option(help="in its place: --json of `bench acceptance` on MODEL; draft='measured' goes by what is timed then"),
    ] = None,
    gamma: Annotated[str, typer.Option(help="tokens of a draft, comma separated")] = "6",
    share: Annotated[float, typer.Option(help="of the keys, that drafts read; at least 256 keys")] = 0.07,
    sampled: Annotated[bool, typer.Option(help="temperature 0.6, top-p 0.95, top-k 20; or greedy")] = False,
    layers: Annotated[int, typer.Option(help="of llama-8b", min=1)] = 32,
    compiler: Annotated[str, typer.Option(help="eager or inductor")] = "eager",
    rounds: Annotated[int, typer.Option(help="rounds that are timed", min=1)] = 24,
    minutes: Annotated[float, typer.Option(help="nothing more is begun after that")] = 9.0,
    json: Annotated[str | None, typer.Option("--json", help="write the results to this file, after each of them")] = None,
) -> None:
    """Rounds of speculation beside exact decoding, in one run: c, v, t, their bound t / (gamma c + v), tokens a second."""
    from tsa_compile.generate import draft_table
    from tsa_compile.tools.bench import acceptance as accepted
    from tsa_compile.tools.bench import forced_rounds, output

    console, start, exact = Console(soft_wrap=True), time.monotonic(), dict[str, Any]()
    planned = _planned(cases, drafts, gamma, rounds, given, acceptance, share)
    loaded, timed = _load(model, layers), list[forced_rounds.RoundRow]()
    head = dict(environment=_environment(), model=model, layers=layers, dtype=str(loaded.dtype), compiler=compiler)
    for case, name in planned:
        size = f"{case.batch} x {case.length}"
        if time.monotonic() - start > 60 * minutes:
            console.print(f"not begun after {minutes} minutes: {name}, gamma {case.gamma} at {size}", markup=False)
            continue
        exact[size] = exact.get(size) or forced_rounds.measure_exact(loaded, case, compiler)
        draft = accepted.DRAFTS[name](share, case.length, accepted.LEAST)
        how: dict[str, Any] = dict(compiler=compiler, processors=_warpers() if sampled else (), sampled=sampled)
        timed.append(forced_rounds.measure_rounds(loaded, case, name, draft, exact[size], **how))
        console.print(forced_rounds.told(timed[-1]), markup=False, highlight=False)
        if acceptance is not None:
            draft_table.write([forced_rounds.timing_of(timed[-1], loaded, draft, compiler)], draft_table.table_file())
            console.print(f"  kept in {draft_table.table_file()}", markup=False)
        if json:
            output.write_json(json, timed, **head, share=share, sampled=sampled, seconds=round(time.monotonic() - start))


def _planned(
    cases: str, drafts: str, gamma: str, rounds: int, given: float, acceptance: str | None, share: float
) -> list[tuple[RoundCase, str]]:
    """What is to be timed: each case and draft; an error in the options shows before anything is."""
    from tsa_compile.tools.bench.acceptance import DRAFTS, read, tokens_a_round
    from tsa_compile.tools.bench.forced_rounds import RoundCase
    from tsa_compile.tools.option_values import numbers

    names, known = drafts.split(","), [name for name in DRAFTS if name != "lookup"]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--drafts must be of {known}, got {unknown[0]!r}: rounds are timed behind random tokens")
    found, rows = list[tuple[RoundCase, str]](), None if acceptance is None else read(acceptance)
    for batch, length in (map(int, size.split("x")) for size in cases.split(",")):
        for tokens, name in itertools.product(numbers("--gamma", gamma, int), names):
            t = given if rows is None else tokens_a_round(rows, name, length, tokens, share)
            found.append((RoundCase(batch, length, tokens, t, rounds), name))
    return found


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
