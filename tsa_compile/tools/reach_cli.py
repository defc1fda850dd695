"""`tsa-compile reach`: can every token depend on every earlier one, under a plan?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def reach(
    model: Annotated[str, typer.Argument(help="a Hugging Face folder or id, or a packaged model: smollm2")],
    plan: Annotated[Path | None, typer.Option(help="a JSON file of a plan or a policy; default: the default plan")] = None,
    length: Annotated[int, typer.Option(help="tokens of the sequence", min=1)] = 4096,
    phase: Annotated[str, typer.Option(help="the phase whose policies count")] = "prefill",
    html: Annotated[str | None, typer.Option(help="write a page with a plot to this file")] = None,
) -> None:
    """Say which distances no chain of guaranteed reads spans, whatever the data, and how many layers would."""
    from tsa_compile.plan import Plan
    from tsa_compile.reach import reach as find
    from tsa_compile.tools.load_models import load_causal_lm
    from tsa_compile.tools.reach_page import write_page

    wanted = None if plan is None else Plan.load(plan)
    found = find(load_causal_lm(model), wanted, length, phase=phase)
    Console(soft_wrap=True).print(str(found), markup=False, highlight=False)
    if html:
        write_page(html, found, f"What can depend on what: {model}")
