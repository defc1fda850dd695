"""`tsa-compile bench steps`: whole decode steps of a random Llama-3.1-8B over a filled cache, beside what their bytes take.

A case's cache is filled with random rows, without a prefill. Its floor is the bytes that a step must read, weights and cache,
over the copy rate measured in the same run. Steps are timed only if they are replayed, with every attention replaced.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import torch

import tsa_compile as tsa
from tsa_compile.cache.names import cache_name
from tsa_compile.cuda_graphs import CudaReplay
from tsa_compile.kernels.common.pages import pages_of
from tsa_compile.session import attached
from tsa_compile.steps import REPLAYED

PASSES = 24  # steps that are timed
ROWS_AT_ONCE = 8192  # of the cache, that are filled together


@dataclasses.dataclass(frozen=True)
class StepCase:
    """`batch` requests with `length` tokens each; `keep`: the share of the pages that a step reads, or None for every key."""

    batch: int
    length: int
    keep: float | None = None

    @property
    def name(self) -> str:
        size = f"{self.length // 1024}K" if self.length >= 1024 else str(self.length)
        return f"B{self.batch} L{size} " + ("exact" if self.keep is None else f"keep {self.keep:g}")

    @property
    def plan(self) -> tsa.Plan:
        decode = tsa.Exact() if self.keep is None else tsa.PageSparse(keep=self.keep)
        return tsa.Plan(prefill=tsa.Dense(), decode=decode)

    def bytes_read(self, model: Any) -> int:
        """Weights but the embedding's table, and the keys and values that are read; with pages, also their sums."""
        config = model.config
        weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
        row = 2 * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
        rows = float(self.length)
        if self.keep is not None:
            rows = min(rows, self.keep * rows + pages_of(self.length) / 2)  # a page's sum is half a row: keys alone
        return int(weights + config.num_hidden_layers * self.batch * row * rows)


@dataclasses.dataclass(frozen=True)
class StepRow:
    """Milliseconds: `replay` of the graph alone, `step` of calls one after another, `token` of `generate()`; `floor`."""

    case: StepCase
    compiler: str
    replay: float
    step: float
    token: float
    floor: float
    first_call: float


def bench_steps(model: Any, case: StepCase, copy_tbps: float, compiler: str = "eager") -> StepRow:
    """Fill, check, then time one case; the model is as it was afterwards.

    Raises:
        RuntimeError: a step was not replayed; nothing is timed then.
    """
    torch._dynamo.reset()
    tsa.transform(model, case.plan, compiler=compiler)
    try:
        cache = filled(model, case)
        ids = torch.randint(0, model.config.vocab_size, (case.batch, 1), device=model.device)
        step = stepper(model, cache, ids)
        began = time.monotonic()
        step()
        torch.cuda.synchronize()
        first = time.monotonic() - began
        for _ in range(3):
            step()
        before = tsa.report(model).steps.get(REPLAYED, 0)
        each = timed(step)
        if tsa.report(model).steps.get(REPLAYED, 0) != before + PASSES + 1:
            raise RuntimeError(f"{case.name}: steps were not replayed: {tsa.report(model)}")
        replay = timed(recorded(model, cache).graph.replay)
        token = generate_ms(model, case, cache)
        return StepRow(case, compiler, replay, each, token, case.bytes_read(model) / copy_tbps / 1e9, first)
    finally:
        tsa.restore(model)


def recorded(model: Any, cache: Any) -> CudaReplay:
    """The CUDA graph of the steps over this cache."""
    session = attached(model)
    assert session is not None
    (recording,) = session.steps.recordings.of(cache.layers[0].storage)
    assert isinstance(recording.replay, CudaReplay)
    return recording.replay


def filled(model: Any, case: StepCase) -> Any:
    """A cache with room for all steps, its rows random."""
    cache = tsa.Cache(model, case.batch, case.length + 256)
    config = model.config
    for layer in cache.layers:
        for begin in range(0, case.length, ROWS_AT_ONCE):
            rows = min(ROWS_AT_ONCE, case.length - begin)
            shape = (case.batch, config.num_key_value_heads, rows, config.head_dim)
            with torch.no_grad():
                layer.update(*(torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2)))
    return cache


def stepper(model: Any, cache: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """One more token: a call that makes the cache a row longer."""

    name = cache_name(model)
    assert name is not None

    def step() -> Any:
        at = cache.get_seq_length()
        with torch.no_grad():
            return model(ids, position_ids=torch.full_like(ids, at), **{name: cache})

    return step


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds a call, of PASSES calls in a row; one before them is not counted."""
    work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(PASSES):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / PASSES


def generate_ms(model: Any, case: StepCase, cache: Any, tokens: int = 24) -> float:
    """Wall milliseconds a token of `generate()` that goes on from the cache, by the difference of two lengths after a warm-up."""
    took = []
    for new in (4, 4, 4 + tokens):
        ids = torch.randint(0, model.config.vocab_size, (case.batch, cache.get_seq_length() + 1), device=model.device)
        torch.cuda.synchronize()
        began = time.monotonic()
        model.generate(ids, past_key_values=cache, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        torch.cuda.synchronize()
        took.append(time.monotonic() - began)
    return (took[2] - took[1]) / tokens * 1e3


def told(row: StepRow) -> str:
    """One line for a reader."""
    times = ", ".join(f"{name} {getattr(row, name):.2f} ms" for name in ("replay", "step", "token"))
    return f"{row.case.name}, {row.compiler}: {times}; floor {row.floor:.2f}: replay {row.replay / row.floor:.2f} x floor"
