"""The main job on a real model: SmolLM2-135M-Instruct finds a number in a long text, dense and then token-sparse; and decodes."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from rich.console import Console

from tsa_compile import api
from tsa_compile.check import Measurement, compare
from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.dense import Dense
from tsa_compile.policies.exact import Exact
from tsa_compile.progress import step
from tsa_compile.tools.bench.prompts import needle_ids
from tsa_compile.tools.load_models import load_packaged

LAST = 128  # predictions that are compared
NEW = 32  # tokens that are decoded


@dataclasses.dataclass(frozen=True)
class DecodeResult:
    """The model's own decode steps and those of `Exact` after one dense prefill.

    Args:
        equal: tokens that are the same, up to the first that is not.
        steps: how the steps ran, `report(model).steps`.
        ms: of one token, before and after; None on a CPU.
    """

    equal: int
    steps: dict[str, int]
    ms: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo prints: the number asked for, what each form answered, and how they compare."""

    expected: str
    dense_answer: str
    sparse_answer: str
    measured: Measurement
    decoded: DecodeResult

    @property
    def both_found(self) -> bool:
        return self.expected in self.dense_answer and self.expected in self.sparse_answer


def run_demo(tokens: int, policy: Policy | None, console: Console, repeats: int = 3) -> DemoResult:
    """Dense, and after `tsa_compile.transform(model, policy)`, on the same prompt of about `tokens` tokens."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    path = "Triton kernels" if device == "cuda" else "no GPU found: the CPU path (plain PyTorch); times are for scale only"
    console.print(f"device: {device}, {path}", markup=False)
    with step("loading SmolLM2-135M-Instruct", console):
        model, tokenizer = load_packaged("smollm2", device, dtype)
    ids, expected = needle_ids(tokenizer, tokens)
    ids = ids.to(device)
    with step(f"dense: question about {ids.shape[1]} tokens", console):
        dense = _answer(model, tokenizer, ids)
    with step(f"prefill, dense and sparse, {repeats} times each", console):
        inputs = dict(input_ids=ids, use_cache=False, logits_to_keep=LAST)
        measured = compare(model, policy=policy, repeats=repeats, last=LAST, **inputs)
    with step("sparse: the same question", console):
        api.transform(model, policy)
        sparse = _answer(model, tokenizer, ids)
        api.restore(model)
    with step(f"decode: {NEW} tokens, the model's own steps and Exact", console):
        decoded = decode(model, ids)
    return DemoResult(expected, dense, sparse, measured, decoded)


def decode(model: Any, ids: torch.Tensor) -> DecodeResult:
    """`NEW` greedy tokens before and after `transform(model, Plan(prefill=Dense(), decode=Exact()))`; the model is restored."""
    own = _tokens(model, ids, NEW)
    before = _ms_a_token(model, ids)
    api.transform(model, Plan(prefill=Dense(), decode=Exact()))
    exact = _tokens(model, ids, NEW)
    after = _ms_a_token(model, ids)
    steps = api.report(model).steps
    api.restore(model)
    differs = (own != exact).nonzero()
    equal = int(differs[0]) if len(differs) else len(own)
    return DecodeResult(equal, steps, None if before is None or after is None else (before, after))


def print_result(result: DemoResult, console: Console) -> None:
    """The table of sites and the summary."""
    console.print(result.measured.to_table())
    for name, answer in (("dense ", result.dense_answer), ("sparse", result.sparse_answer)):
        verdict = "found" if result.expected in answer else "NOT FOUND"
        console.print(f"{name}  needle {result.expected}: {verdict}, said {answer!r}", markup=False, highlight=False)
    console.print(result.measured.summary(), markup=False, highlight=False)
    decoded = result.decoded
    how = ", ".join(f"{n} {name}" for name, n in decoded.steps.items())
    ms = "" if decoded.ms is None else f"; {decoded.ms[0]:.2f} ms a token before, {decoded.ms[1]:.2f} after"
    console.print(f"decode  {decoded.equal} of {NEW} tokens equal; steps: {how}{ms}", markup=False, highlight=False)


def _answer(model: Any, tokenizer: Any, ids: torch.Tensor) -> str:
    """Up to 8 greedy tokens."""
    return str(tokenizer.decode(_tokens(model, ids, 8, 1), skip_special_tokens=True)).strip()


def _tokens(model: Any, ids: torch.Tensor, most: int, least: int | None = None) -> torch.Tensor:
    """Greedy tokens: `most` of them, or at least `least`."""
    options = {"max_new_tokens": most, "min_new_tokens": most if least is None else least, "do_sample": False}
    generated: torch.Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return generated[0, ids.shape[1] :]


def _ms_a_token(model: Any, ids: torch.Tensor) -> float | None:
    """Wall time of a decode step of `generate()`: that of many tokens less that of one. None without a GPU."""
    if ids.device.type != "cuda":
        return None
    _tokens(model, ids, NEW)
    seconds = []
    for new in (1, 1 + 4 * NEW):
        torch.cuda.synchronize()
        start = time.perf_counter()
        _tokens(model, ids, new)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return (seconds[1] - seconds[0]) / (4 * NEW) * 1e3
