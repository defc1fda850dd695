"""`tsa-compile gate`: the cheapest schedule of pages that keeps rollouts close to the dense model, on your own texts."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console


def gate(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2")],
    prompts: Annotated[list[str], typer.Option(help="a .jsonl file (a text a line) or a text file: prompts with answers")],
    out: Annotated[str, typer.Option(help="the plan, a JSON file")],
    threshold: Annotated[float, typer.Option(help="of the 5th percentile of sum min(p, q), in the worst bin")] = 0.86,
    last: Annotated[int, typer.Option(help="tokens at the end of a text that are decoded one by one", min=1)] = 512,
    schedules: Annotated[str | None, typer.Option(help="names, comma separated; default: all published ones")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="longer texts lose their beginning", min=1)] = None,
    state: Annotated[str | None, typer.Option(help="file of what is measured; a second call goes on from it")] = None,
    html: Annotated[str | None, typer.Option(help="write a page with a plot to this file")] = None,
) -> None:
    """Choose a schedule of pages for decode steps of MODEL on your own texts, and write the plan."""
    from tsa_compile.learn.gate import choose_schedule
    from tsa_compile.learn.prompt_file import read_prompts
    from tsa_compile.tools.gate_page import write_page
    from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer

    given = list(read_prompts(prompts, lambda: load_tokenizer(model), max_tokens))
    names = None if schedules is None else schedules.split(",")
    plan = choose_schedule(load_causal_lm(model), given, threshold, schedules=names, last=last, state=state)
    plan.save(out)
    chosen = plan.notes["tried"][plan.notes["chosen"]]
    Console(soft_wrap=True).print(f"{out}: {plan.notes['chosen']}, {chosen['pages read']:.1%} of the pages read", markup=False)
    if html:
        write_page(html, plan.notes, f"Schedules of pages: {model}")
