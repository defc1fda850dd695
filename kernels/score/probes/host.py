"""Launches of the probe scores (device.py): the mean attention of a few queries to each key."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.ranks import order_or_unread
from tsa_compile.kernels.common.sizes import cdiv
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, precision, small_shared
from tsa_compile.kernels.score.probes.reference import probe_ranks
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
_PROGRAMS, _MIN_SPAN = 528, 512  # programs, at least (four for each multiprocessor of a Hopper GPU); keys a program reads


def probing_queries(q: Tensor, k_len: int, view: KvView, probes: int) -> Tensor:
    """The probes, contiguous `[B, H, probes, D]`: evenly spread over the queries, or over the real ones of `Lq == Lk`."""
    if view.ranks is None or q.shape[2] != k_len:
        return q[:, :, probe_ranks(q.shape[2], probes, q.device)].contiguous()
    order, ranks = view.order
    at = order.gather(1, probe_ranks(ranks[:, -1:].long(), probes, q.device))  # a row without keys: some padding
    return q.gather(2, at.long()[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])).contiguous()


def probe_means(q: Tensor, k: Tensor, view: KvView, scale: float) -> Tensor:
    """Mean attention of all probes `q` `[B, H, P, D]` (contiguous) to each key, float32 `[B, H, Lk]` by rank."""
    from tsa_compile.kernels.score.probes.device import probe_lse_kernel, probe_mean_kernel

    (batch, heads, probes, dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
    (order, ranks), padded = order_or_unread(view, q.device), view.ranks is not None
    block_d, block_m, block_n, warps, stages = probe_config(dim, q.dtype, probes, capability_of(q.device))
    splits = max(1, min(cdiv(_PROGRAMS, batch * heads), cdiv(k_len, _MIN_SPAN)))
    span = cdiv(cdiv(k_len, splits), block_n) * block_n
    splits = cdiv(k_len, span)
    part = torch.empty(2, batch, heads, splits, probes, dtype=torch.float32, device=q.device)
    mean = torch.empty(batch, heads, k_len, dtype=torch.float32, device=q.device)
    numbers = (*k.stride(), heads, kv_heads, k_len, probes, splits, span, scale * LOG2_E)
    shape = {
        "D": dim, "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "PADDED": padded,
        "PRECISION": precision(q.dtype), "num_warps": warps, "num_stages": stages,
    }  # fmt: skip
    grid, sums = (batch * heads, splits), (q, k, *part)
    launch(probe_lse_kernel, (*grid, cdiv(probes, block_m)), (*sums, order, ranks), numbers, **shape)
    launch(probe_mean_kernel, grid, (*sums, mean, order, ranks), numbers, **shape)
    return mean


def probe_config(dim: int, dtype: torch.dtype, probes: int, capability: tuple[int, int]) -> tuple[int, int, int, int, int]:
    """(BLOCK_D, BLOCK_M, BLOCK_N, warps, stages) by head dim, dtype, probes and GPU; never by length."""
    block_d = max(16, 1 << (dim - 1).bit_length())
    block_m = max(16, 1 << (probes - 1).bit_length())
    if dtype == torch.float32 and block_d > 128 and small_shared(capability):
        return block_d, min(32, block_m), 16, 4, 2
    if dtype == torch.float32 or block_d > 128:
        return block_d, min(64, block_m), 32, 4, 2
    return block_d, min(128, block_m), 128, 8, 2
