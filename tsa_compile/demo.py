"""The main job on a real model: SmolLM2-135M-Instruct finds a number in a long text, dense and then token-sparse."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tsa_compile import api
from tsa_compile.bench.models import load_packaged
from tsa_compile.bench.prompts import needle_ids
from tsa_compile.check import Comparison, compare_logits
from tsa_compile.policies.base import Policy
from tsa_compile.report import Report
from tsa_compile.trace import record_kept

LAST = 128  # predictions that are compared


@dataclasses.dataclass(frozen=True)
class Run:
    """What one form of the model did with the prompt."""

    answer: str
    logits: torch.Tensor  # [1, LAST, vocabulary]
    prefill_seconds: float


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo printed."""

    expected: str
    dense: Run
    sparse: Run
    comparison: Comparison
    report: Report

    @property
    def both_found(self) -> bool:
        return self.expected in self.dense.answer and self.expected in self.sparse.answer


def run_demo(tokens: int, policy: Policy | None, console: Console, repeats: int = 3) -> DemoResult:
    """Dense, then `tsa_compile.transform(model, policy)`, on the same prompt of about `tokens` tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    path = "Triton kernels" if device == "cuda" else "no GPU found: the CPU path (plain PyTorch); times are for scale only"
    console.print(f"device: {device}, {path}", markup=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        step = _stepper(progress)
        model, tokenizer = step("loading SmolLM2-135M-Instruct", lambda: load_packaged("smollm2", device, dtype))
        ids, expected = needle_ids(tokenizer, tokens)
        ids = ids.to(device)
        dense = step(f"dense, {ids.shape[1]} tokens", lambda: _run(model, tokenizer, ids, repeats))
        api.transform(model, policy)
        with record_kept() as kept:
            step("tracing and rewriting", lambda: _logits(model, ids))
        report = api.report(model).with_kept(kept.shares())
        sparse = step(f"sparse, {ids.shape[1]} tokens", lambda: _run(model, tokenizer, ids, repeats))
    api.restore(model)
    return DemoResult(expected, dense, sparse, compare_logits(dense.logits, sparse.logits), report)


def print_result(result: DemoResult, console: Console) -> None:
    """The table of sites and the summary."""
    console.print(result.report.to_table())
    dense, sparse = result.dense, result.sparse
    for name, run in (("dense ", dense), ("sparse", sparse)):
        verdict = "found" if result.expected in run.answer else "NOT FOUND"
        console.print(
            f"{name}  prefill {run.prefill_seconds:7.3f} s   needle {result.expected}: {verdict}, said {run.answer!r}",
            markup=False,
            highlight=False,
        )
    c = result.comparison
    console.print(
        f"last {c.predictions} predictions: KL(dense || sparse) {c.kl:.4f} nats, same top token {c.top1:.0%}; "
        f"prefill {dense.prefill_seconds / sparse.prefill_seconds:.2f}x",
        markup=False,
        highlight=False,
    )


def _stepper(progress: Progress) -> Callable[[str, Callable[[], Any]], Any]:
    def step(text: str, work: Callable[[], Any]) -> Any:
        task = progress.add_task(text, total=1)
        result = work()
        progress.update(task, completed=1)
        return result

    return step


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False, logits_to_keep=LAST).logits


def _run(model: Any, tokenizer: Any, ids: torch.Tensor, repeats: int) -> Run:
    logits = _logits(model, ids)  # also the warm-up
    seconds = []
    for _ in range(repeats):
        _wait(ids.device)
        start = time.perf_counter()
        _logits(model, ids)
        _wait(ids.device)
        seconds.append(time.perf_counter() - start)
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    answer = tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True).strip()
    return Run(answer, logits.float().cpu(), statistics.median(seconds))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
