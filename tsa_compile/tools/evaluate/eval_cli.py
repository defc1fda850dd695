"""The work of `tsa-compile eval`: load, run, write the reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from tsa_compile.tools.evaluate import report_pages
from tsa_compile.tools.evaluate.cells import TASKS
from tsa_compile.tools.evaluate.job import Options, run
from tsa_compile.tools.evaluate.local_attention import use_local_attention
from tsa_compile.tools.evaluate.ruler_data import TASKS as RULER
from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer
from tsa_compile.tools.option_values import numbers


def evaluate_model(
    model: str, out: str, lengths: str, samples: int, tasks: str | None, coverages: str, families: str, policies: Sequence[str],
    batch_tokens: int, name: str | None, console: Console,
) -> str:  # fmt: skip
    """Evaluate and write `out`/results.json, report.md and report.html; returns where they are.

    Raises:
        ValueError: an argument is wrong, or `out` holds results of another setting.
    """
    options = Options(
        model=name or model,
        lengths=tuple(numbers("--lengths", lengths, int)),
        samples=samples,
        tasks=_tasks(tasks) if tasks else TASKS,
        coverages=tuple(numbers("--coverages", coverages, float)),
        families=tuple(_split(families)),
        policies=tuple(policies),
        batch_tokens=batch_tokens,
    )
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    network = load_causal_lm(model, dtype)
    use_local_attention(network)
    data = run(options, network, load_tokenizer(model), out, console)
    folder = Path(out)
    (folder / "report.md").write_text(report_pages.markdown(data))
    (folder / "report.html").write_text(report_pages.page(data))
    return f"{folder / 'results.json'}, report.md and report.html beside it"


def _tasks(names: str) -> tuple[str, ...]:
    """Task names; "ruler" stands for all of RULER's."""
    return tuple(task for name in _split(names) for task in (RULER if name == "ruler" else (name,)))


def _split(values: str) -> list[str]:
    return [v.strip() for v in values.split(",") if v.strip()]
