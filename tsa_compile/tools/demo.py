"""The main job on a real model: SmolLM2-135M-Instruct finds a number in a long text, dense and then token-sparse."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.console import Console

from tsa_compile import api
from tsa_compile.check import Measurement, compare
from tsa_compile.policies.base import Policy
from tsa_compile.progress import step
from tsa_compile.tools.bench.prompts import needle_ids
from tsa_compile.tools.load_models import load_packaged

LAST = 128  # predictions that are compared


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo prints: the number asked for, what each form answered, and how they compare."""

    expected: str
    dense_answer: str
    sparse_answer: str
    measured: Measurement

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
    return DemoResult(expected, dense, sparse, measured)


def print_result(result: DemoResult, console: Console) -> None:
    """The table of sites and the summary."""
    console.print(result.measured.to_table())
    for name, answer in (("dense ", result.dense_answer), ("sparse", result.sparse_answer)):
        verdict = "found" if result.expected in answer else "NOT FOUND"
        console.print(f"{name}  needle {result.expected}: {verdict}, said {answer!r}", markup=False, highlight=False)
    console.print(result.measured.summary(), markup=False, highlight=False)


def _answer(model: Any, tokenizer: Any, ids: torch.Tensor) -> str:
    """Up to 8 greedy tokens."""
    generated = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(generated[0, ids.shape[1] :], skip_special_tokens=True)).strip()
