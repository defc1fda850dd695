"""Where the time of token-sparse attention goes: each stage alone, on the inputs it has in the whole."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsa_compile.kernels.attend.tokens import hopper
from tsa_compile.kernels.attend.tokens.chunks import chunks, kv_heads_per_chunk, pack, scatter
from tsa_compile.kernels.attend.tokens.engines import find_inner
from tsa_compile.kernels.attend.tokens.packed import pack_all, packed_bytes
from tsa_compile.kernels.attend.tokens.strip import invert
from tsa_compile.kernels.score.last_queries.host import last_query_scores
from tsa_compile.kernels.select.tokens.host import select_from_means
from tsa_compile.kernels.types import IDENTITY, TokenRule
from tsa_compile.policies.token_sparse import TokenSparse
from tsa_compile.tools.bench.timing import graph_ms, median_ms

Tensor = torch.Tensor


def selection_stages(q: Tensor, k: Tensor, scale: float, policy: TokenSparse, repeats: int) -> dict[str, float]:
    """Milliseconds of the window scores and of what follows them (pooling, count, lists), each in a CUDA graph."""
    dummy = torch.empty(1, dtype=torch.int32, device=q.device)
    heavy = policy.completion.heavy if policy.completion else 0
    score = lambda: last_query_scores(q, k, dummy, dummy, False, scale, policy.window)  # noqa: E731
    mean, rule = score(), TokenRule(policy.coverage, policy.window, policy.pool, policy.min_tokens, heavy)
    choose = lambda: select_from_means(mean, q.shape[2], IDENTITY, rule, q.shape[1])  # noqa: E731
    return {"scores": graph_ms(score, repeats), "count and lists": graph_ms(choose, repeats)}


def packed_stages(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float, repeats: int
) -> dict[str, float]:
    """Milliseconds of engine `packed`, of one chunk of heads times the number of chunks: packing; and attention, by this
    project's kernel with queries and results in their places, or dense attention and the scatter of its rows."""
    kv_heads, lists, own = k.shape[1], indices.shape[1], hopper.takes(q, k, v)
    step = kv_heads_per_chunk(k, packed_bytes(q, k, v, lists, own))
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
    q_c, k_c, v_c, out_c, indices_c = next(chunks(kv_heads, step, q, k, v, out, indices))
    lists_c = indices_c.shape[1]
    if own:
        keys, values = (pack(x, lists_c, indices_c, counts) for x in (k_c, v_c))
        work: dict[str, Callable[[], object]] = {
            "pack": lambda: [pack(x, lists_c, indices_c, counts) for x in (k_c, v_c)],
            "attend": lambda: hopper.launch(q_c, keys, values, out_c, None, indices_c, counts, scale, packed=True),
        }
    else:
        inner, packed, slots = find_inner(q, v), pack_all(q_c, k_c, v_c, indices_c, counts), invert(indices_c, counts)
        part = inner.attend(*packed, counts, scale, False)[0]
        work = {
            "pack": lambda: pack_all(q_c, k_c, v_c, indices_c, counts),
            "attend": lambda: inner.attend(*packed, counts, scale, False),
            "invert": lambda: invert(indices_c, counts),
            "scatter": lambda: scatter(part, out_c, slots),
        }
    return {name: median_ms(run, repeats) * kv_heads / step for name, run in work.items()}
