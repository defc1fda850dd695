"""`torchrun ... -m tsa_compile bench context-parallel`: one prompt on one GPU, and spread over those of all ranks."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tsa_compile import api
from tsa_compile.cache.names import cache_name
from tsa_compile.kernels.common.group import default_group, gather
from tsa_compile.plan import Plan
from tsa_compile.policies.block_sparse import BlockSparse
from tsa_compile.policies.context_parallel import ContextParallel
from tsa_compile.recorder import record_kept
from tsa_compile.tools.bench.prefill import alpha_that_reads, session_of


@dataclasses.dataclass(frozen=True)
class ContextRow:
    """One prompt, batch 1; times in seconds to the last token's logits, medians, on all ranks those of the slowest.

    Args:
        length: tokens.
        layers: of the model.
        ranks: of the group.
        alpha: of `BlockSparse`; 0: every key.
        cached: whether keys and values are kept, on every rank all of them.
        one, spread: seconds on rank 0 alone, and on all ranks.
        kept_one, kept_spread: share of the causal key blocks that was read, over layers and heads.
        memory_one, memory_spread: peak bytes of rank 0's device, weights included; 0 on a CPU.
        difference: largest difference of the logits, over the largest logit.
    """

    length: int
    layers: int
    ranks: int
    alpha: float
    cached: bool
    one: float
    spread: float
    kept_one: float
    kept_spread: float
    memory_one: int
    memory_spread: int
    difference: float

    def __str__(self) -> str:
        case = f"{self.length} tokens, {self.layers} layers, alpha {self.alpha:.4g}{', cached' if self.cached else ''}"
        times = f"one {self.one:.3f} s, {self.ranks} ranks {self.spread:.3f} s, {self.spread / self.one:.3f} of it"
        kept = f"read {self.kept_one:.1%} and {self.kept_spread:.1%} of the key blocks"
        memory = f"peak {self.memory_one / 1e9:.1f} and {self.memory_spread / 1e9:.1f} GB"
        return f"{case}: {times}; {kept}; {memory}; logits differ by {self.difference:.1e}"


def bench_context(model: Any, length: int, keep: float, repeats: int = 3, cached: bool = False) -> ContextRow:
    """The same on every rank, each of which calls it with the same model.

    Args:
        model: a causal language model, the same on all ranks, which is not transformed.
        length: tokens of the prompt.
        keep: share of the causal pairs that is read, by the `alpha` that rank 0 finds; 1: all.
        repeats: timed calls.
        cached: keep keys and values.
    """
    alpha = torch.zeros(1, dtype=torch.float64, device=model.device)
    if keep < 1 and dist.get_rank() == 0:
        alpha += alpha_that_reads(model, length, keep)
    shared = float(gather(alpha, default_group())[0])
    policy = BlockSparse(shared)
    api.transform(model, Plan(prefill=policy))
    prompt = _prompt(model, length, cached)
    alone = _measured(prompt, model, repeats) if dist.get_rank() == 0 else _Measured(0.0, 0.0, 0, torch.zeros(1))
    dist.barrier()
    session_of(model).plan = Plan(prefill=ContextParallel(policy))
    spread = _measured(prompt, model, repeats, default_group())
    api.restore(model)
    difference = (spread.logits - alone.logits.to(spread.logits.device)).abs().max() / spread.logits.abs().max()
    own = [alone.seconds, alone.kept, alone.memory, float(difference), spread.seconds]
    numbers = gather(torch.tensor(own, dtype=torch.float64, device=model.device), default_group()).tolist()
    slowest = max(of_rank[4] for of_rank in numbers)
    one, kept, memory, differ = numbers[0][:4]
    head = (length, model.config.num_hidden_layers, dist.get_world_size(), shared, cached)
    return ContextRow(*head, one, slowest, kept, spread.kept, int(memory), spread.memory, differ)


@dataclasses.dataclass(frozen=True)
class _Measured:
    seconds: float
    kept: float
    memory: int
    logits: torch.Tensor


def _measured(prompt: Callable[[], torch.Tensor], model: Any, repeats: int, group: str | None = None) -> _Measured:
    """Of the calls of one plan; `group`: of the ranks that compute them together."""
    with record_kept(model, group) as kept:
        logits = prompt()  # traces, and compiles kernels
    on_gpu, times = model.device.type == "cuda", []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(repeats):
        if group is not None:
            dist.barrier()
        begin = time.perf_counter()
        prompt()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    memory = torch.cuda.max_memory_allocated() if on_gpu else 0
    return _Measured(statistics.median(times), statistics.fmean(kept.shares()), memory, logits.float())


def _prompt(model: Any, length: int, cached: bool) -> Callable[[], torch.Tensor]:
    """The logits of the last token of random ones, the same on every rank."""
    g = torch.Generator().manual_seed(length)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=g).to(model.device)

    @torch.no_grad()
    def run() -> torch.Tensor:
        from transformers import DynamicCache

        cache = {str(cache_name(model)): DynamicCache(config=model.config)} if cached else {}
        logits: torch.Tensor = model(input_ids=ids, use_cache=cached, logits_to_keep=1, **cache).logits
        return logits

    return run
