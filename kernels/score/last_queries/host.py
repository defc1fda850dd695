"""Launches of the scores by the last queries (device.py). The contract is docs/operators.md, `select_tokens`, steps 2 and 3."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.sizes import cdiv
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, small_shared
from tsa_compile.kernels.score.last_queries import hopper

Tensor = torch.Tensor
_PROGRAMS = 528  # at least: four for each multiprocessor of a Hopper GPU
_MIN_SPAN = 512  # keys a program reads, at least


class ScoreConfig(NamedTuple):
    """Compile-time sizes of these kernels."""

    block_d: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def last_query_scores(
    q: Tensor,
    k: Tensor,
    order: Tensor,
    ranks: Tensor,
    padded: bool,
    scale: float,
    last_queries: int,
    through: Tensor | None = None,
) -> Tensor:
    """Mean attention of each row's last queries to each key before them, not yet pooled.

    Args:
        q, k: `[B, H, Lq, D]`, `[B, Hk, Lk, D]`; fp16, bf16 or fp32, any strides.
        order, ranks: int32 `[B, Lk]` of `rank_order`; not read unless `padded`.
        padded: whether the batch has padding.
        scale: factor of the scores.
        last_queries: how many queries score.
        through: int32 `[B * H]`, zero, for programs to wait for each other; None: allocated here.

    Returns:
        float32 `[B, H, Lk]` by rank; from rank `L - last_queries` on undefined.
    """
    (batch, heads, q_len, dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
    mean = torch.empty(batch, heads, k_len, dtype=torch.float32, device=q.device)
    if hopper.takes(q, k, last_queries):
        through = torch.zeros(batch * heads, dtype=torch.int32, device=q.device) if through is None else through
        hopper.launch(q, k, order, ranks, padded, scale * LOG2_E, last_queries, mean, through)
        return mean
    from tsa_compile.kernels.score.last_queries.device import score_lse_kernel, score_mean_kernel

    block_d, block_m, block_n, warps, stages = score_config(dim, q.dtype, last_queries, capability_of(q.device))
    splits = max(1, min(cdiv(_PROGRAMS, batch * heads), cdiv(k_len, _MIN_SPAN)))
    span = cdiv(cdiv(k_len, splits), block_n) * block_n
    splits = max(1, cdiv(k_len, span))
    part = torch.empty(2, batch, heads, splits, last_queries, dtype=torch.float32, device=q.device)
    numbers = (*q.stride(), *k.stride(), heads, kv_heads, q_len, k_len, last_queries, splits, span, scale * LOG2_E)
    shape = {
        "D": dim, "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "PADDED": padded,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee", "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    grid, sums = (batch * heads, splits), (q, k, *part)
    launch(score_lse_kernel, (*grid, cdiv(last_queries, block_m)), (*sums, order, ranks), numbers, **shape)
    launch(score_mean_kernel, grid, (*sums, mean, order, ranks), numbers, **shape)
    return mean


def score_config(dim: int, dtype: torch.dtype, last_queries: int, capability: tuple[int, int]) -> ScoreConfig:
    """Sizes by head dim, dtype, number of queries and GPU; never by length."""
    block_d = max(16, 1 << (dim - 1).bit_length())
    block_m = min(128, max(16, 1 << (last_queries - 1).bit_length()))
    if dtype == torch.float32:
        if block_d > 128 and small_shared(capability):
            return ScoreConfig(block_d, min(block_m, 32), 16, 4, 2)
        return ScoreConfig(block_d, min(block_m, 64), 32, 4, 2)
    return ScoreConfig(block_d, block_m, 128, 8, 3) if block_d <= 128 else ScoreConfig(block_d, min(block_m, 64), 64, 4, 2)
