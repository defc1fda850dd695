"""The work of `tsa-compile eval`: load, run, write the reports."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tsa_compile.tools.evaluate import decode_job, decode_pages, report_pages
from tsa_compile.tools.evaluate.decode_job import DecodeOptions
from tsa_compile.tools.evaluate.job import Options, run
from tsa_compile.tools.evaluate.local_attention import use_local_attention
from tsa_compile.tools.evaluate.ruler_data import TASKS as RULER
from tsa_compile.tools.load_models import load_causal_lm, load_tokenizer
from tsa_compile.tools.option_values import numbers


def evaluate_model(
    model: str, out: str, lengths: str, samples: int | None, tasks: str | None, families: str | None, policies: Sequence[str],
    batch_tokens: int, name: str | None, coverages: str | None, console: Console,
) -> str:  # fmt: skip
    """Evaluate prefill and write `out`/results.json, report.md and report.html; returns where they are. None: the default.

    Raises:
        ValueError: an argument is wrong, or `out` holds results of another setting.
    """
    options = Options(
        model=name or model,
        lengths=tuple(numbers("--lengths", lengths, int)),
        policies=tuple(policies),
        batch_tokens=batch_tokens,
        **_given(
            samples=samples,
            tasks=_tasks(tasks) if tasks else None,
            coverages=tuple(numbers("--coverages", coverages, float)) if coverages else None,
            families=tuple(_split(families)) if families else None,
        ),
    )
    network = load_causal_lm(model, _dtype())
    use_local_attention(network)
    data = run(options, network, load_tokenizer(model), out, console)
    return _write(Path(out), report_pages.markdown(data), report_pages.page(data))


def compare_decode(
    model: str, out: str, lengths: str, samples: int | None, tasks: str | None, families: str | None, policies: Sequence[str],
    batch_tokens: int, name: str | None, keep: str | None, last: int | None, batches: str | None, minutes: float | None,
    console: Console,
) -> str:  # fmt: skip
    """Compare decode policies, and as `evaluate_model`."""
    options = DecodeOptions(
        model=name or model,
        lengths=tuple(numbers("--lengths", lengths, int)),
        policies=tuple(policies),
        batch_tokens=batch_tokens,
        minutes=minutes,
        **_given(
            samples=samples,
            tasks=_tasks(tasks) if tasks else None,
            families=tuple(_split(families)) if families else None,
            keep=tuple(numbers("--keep", keep, float)) if keep else None,
            last=last,
            batches=tuple(numbers("--batches", batches, int)) if batches else None,
        ),
    )
    data = decode_job.run(options, load_causal_lm(model, _dtype()), load_tokenizer(model), out, console)
    return _write(Path(out), decode_pages.markdown(data), decode_pages.page(data))


def _given(**options: Any) -> dict[str, Any]:
    """Those that are not None; the others have their defaults."""
    return {name: value for name, value in options.items() if value is not None}


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


def _write(folder: Path, markdown: str, page: str) -> str:
    (folder / "report.md").write_text(markdown)
    (folder / "report.html").write_text(page)
    return f"{folder / 'results.json'}, report.md and report.html beside it"


def _tasks(names: str) -> tuple[str, ...]:
    """Task names; "ruler" stands for all of RULER's."""
    return tuple(task for name in _split(names) for task in (RULER if name == "ruler" else (name,)))


def _split(values: str) -> list[str]:
    return [v.strip() for v in values.split(",") if v.strip()]
