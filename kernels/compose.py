"""Operators that are made of several operations: a selection is scores, then the choice."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.ranks import order_or_unread
from tsa_compile.kernels.score.probes.host import probe_means, probing_queries
from tsa_compile.kernels.score.window.host import window_scores
from tsa_compile.kernels.select.tokens.host import select_everything, select_from_means, zeros

Tensor = torch.Tensor


def token_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    scale: float,
    coverage: float,
    window: int,
    pool: int,
    min_tokens: int,
    strip_window: int,
    strip_sinks: int,
    heavy: int,
    engine: str,
) -> Tensor:
    """`tsa::token_sparse_attention`: `select_tokens`, then `sparse_attention`."""
    selection = torch.ops.tsa.select_tokens(q, k, key_mask, scale, coverage, window, pool, min_tokens, heavy)
    return torch.ops.tsa.sparse_attention(
        q, k, v, *selection, key_mask, scale, strip_window, strip_sinks, min_tokens + window, engine
    )


def select_tokens(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor | None,
    scale: float,
    coverage: float,
    window: int,
    pool: int,
    min_tokens: int,
    heavy: int,
    share: str = "head",
) -> tuple[Tensor, Tensor, Tensor]:
    """`tsa::select_tokens` by Triton: (indices `[B, G, Lk]`, counts `[B]`, heavy_indices `[B, G, heavy]`), all int32.

    Nothing waits for the device, and lengths are run-time arguments: a new length compiles nothing.
    Source: arXiv 2602.03216, section 3.

    Raises:
        ValueError: float64, which Triton's dot does not take.
    """
    if q.dtype == torch.float64:
        raise ValueError("tsa::select_tokens: float64 runs on CPU only")
    order, ranks = order_or_unread(key_mask, q.device)
    padded, k_len, lists = key_mask is not None, k.shape[2], (q if share == "head" else k).shape[1]
    if k_len <= min_tokens + window or coverage == 0 or q.shape[2] == 0:
        return select_everything(q, k, order, ranks, padded, heavy, lists)
    zeroed = zeros(q.shape[0], lists, q.shape[1], q.device)
    mean = window_scores(q, k, order, ranks, padded, scale, window, zeroed.through)
    return select_from_means(mean, q.shape[2], order, ranks, padded, coverage, window, pool, min_tokens, heavy, lists, zeroed)


def select_keys(
    q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, coverage: float, probes: int, min_keys: int
) -> tuple[Tensor, Tensor]:
    """`tsa::select_keys` by Triton: (indices `[B, H, Lk]`, counts `[B]`), int32. The contract is docs/operators.md.

    Nothing waits for the device, and lengths are run-time arguments.

    Raises:
        ValueError: float64, which Triton's dot does not take.
    """
    if q.dtype == torch.float64:
        raise ValueError("tsa::select_keys: float64 runs on CPU only")
    order, ranks = order_or_unread(key_mask, q.device)
    padded, (q_len, k_len) = key_mask is not None, (q.shape[2], k.shape[2])
    if k_len <= min_keys + 1 or coverage == 0 or q_len == 0:
        return select_everything(q, k, order, ranks, padded, 0, q.shape[1])[:2]
    mean = probe_means(probing_queries(q, k_len, order, ranks, padded, probes), k, order, ranks, padded, scale)
    return select_from_means(mean, k_len, order, ranks, padded, coverage, 1, 1, min_keys, 0, q.shape[1])[:2]
