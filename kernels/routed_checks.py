"""Checks of the operators over keys that are spread over a process group. They read shapes and dtypes only."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.checks import MAX_HEAD_DIM, check_attention
from tsa_compile.kernels.decode_checks import check_cache
from tsa_compile.kernels.key_block_checks import check_rule
from tsa_compile.kernels.page_checks import check_budget, page_scores
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def routed_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor | None, counts: Tensor | None, start: Tensor | None,
    lengths: Tensor | None, key_mask: Tensor | None, scale: float, travel: bool, group: str,
) -> None:  # fmt: skip
    name = "tsa::routed_attention"
    if (indices is None) != (counts is None):
        raise ValueError(f"{name}: indices and counts come together")
    if travel:  # the keys are those of all ranks' queries
        if q.dim() != 4 or k.dim() != 4 or q.shape[0] == 0 or k.shape[0] % q.shape[0]:
            raise ValueError(f"{name}: k holds all ranks' batch rows, a multiple of the {q.shape[0]} of q; got {tuple(k.shape)}")
        q = q[:1].expand(k.shape[0], -1, -1, -1)
    if k.shape[2]:
        check_cache(name, q, k, v, KvView(None, 1, start, lengths), key_mask)


def gather_rows(rows: Tensor, length: int, group: str) -> None:
    if rows.dim() != 4:
        raise ValueError(f"tsa::gather_rows: rows must be [B, Hk, n, D], got {tuple(rows.shape)}")


def routed_pages(
    q: Tensor, sums: Tensor, counts: Tensor, start: Tensor | None, lengths: Tensor | None, capacity: int, scale: float,
    keep: Sequence[float], table: Sequence[int], mass: float, sinks: int, recent: int, group: str,
) -> None:  # fmt: skip
    page_scores(q, sums, counts, None, 1, start, lengths, capacity, scale)
    check_budget("tsa::routed_pages", sums.shape[1], keep, table, mass, sinks, recent)


def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float, alpha: Sequence[float], pool: int, window: int,
    sinks: int, last_dense: int, share: str, lookahead: bool, group: str,
) -> None:  # fmt: skip
    name = "tsa::context_parallel_attention"
    check_attention(name, q, k, v, key_mask)
    if v.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"{name}: the head dim of v must be at most {MAX_HEAD_DIM}, got {v.shape[3]}")
    check_rule(name, q.shape[1], alpha, pool, window, sinks, last_dense, share, lookahead)
