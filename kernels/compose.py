"""Operators that are made of others, on every device."""

from __future__ import annotations

import torch

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
