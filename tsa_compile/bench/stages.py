"""Where the time of token-sparse attention goes: each stage alone, on the inputs it has in the whole."""

from __future__ import annotations

import torch

from tsa_compile.bench.timing import graph_ms, median_ms
from tsa_compile.kernels.sparse_prefill.engines import find_inner
from tsa_compile.kernels.sparse_prefill.packed import kv_heads_per_chunk, pack, scatter
from tsa_compile.kernels.sparse_prefill.strip import invert
from tsa_compile.kernels.token_scores.host import window_scores
from tsa_compile.kernels.token_select.host import select_from_means
from tsa_compile.policies.token_sparse import TokenSparse

Tensor = torch.Tensor


def selection_stages(q: Tensor, k: Tensor, scale: float, policy: TokenSparse, repeats: int) -> dict[str, float]:
    """Milliseconds of the window scores and of what follows them (pooling, count, lists), each in a CUDA graph."""
    dummy = torch.empty(1, dtype=torch.int32, device=q.device)
    heavy = policy.completion.heavy if policy.completion else 0
    score = lambda: window_scores(q, k, dummy, dummy, False, scale, policy.window)  # noqa: E731
    mean, numbers = score(), (policy.coverage, policy.window, policy.pool, policy.min_tokens, heavy)
    choose = lambda: select_from_means(mean, q.shape[2], dummy, dummy, False, *numbers, q.shape[1])  # noqa: E731
    return {"scores": graph_ms(score, repeats), "count and lists": graph_ms(choose, repeats)}


def packed_stages(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float, repeats: int
) -> dict[str, float]:
    """Milliseconds of engine `packed`: the slots of all heads; packing, attention and scatter of one chunk of heads, times the
    number of chunks."""
    inner, kv_heads, lists = find_inner(q, v), k.shape[1], indices.shape[1]
    step = kv_heads_per_chunk(q, k, v, lists)
    q_c, k_c, v_c, indices_c = (x[:, : step * x.shape[1] // kv_heads] for x in (q, k, v, indices))
    slots = invert(indices, counts)
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)[:, : q_c.shape[1]]
    packed = pack(q_c, k_c, v_c, indices_c, counts)
    part = inner.attend(*packed, counts, scale, False)[0]
    chunk = {
        "pack": lambda: pack(q_c, k_c, v_c, indices_c, counts),
        "inner": lambda: inner.attend(*packed, counts, scale, False),
        "scatter": lambda: scatter(part, out, slots[:, : indices_c.shape[1]]),
    }
    times = {name: median_ms(work, repeats) * kv_heads / step for name, work in chunk.items()}
    return {"slots": graph_ms(lambda: invert(indices, counts), repeats), **times}
