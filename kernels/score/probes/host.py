"""Launches of the probe scores (device.py): the mean attention of a few queries to each key."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.ranks import order_or_unread
from tsa_compile.kernels.common.tiles import LOG2_E, precision
from tsa_compile.kernels.score.probes.reference import probe_ranks
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
_PROGRAMS, _MIN_SPAN = 528, 512  # programs, at least (four for each multiprocessor of a Hopper GPU); keys a program reads


def probing_queries(q: Tensor, k_len: int, view: KvView, probes: int) -> Tensor:
    """The probes, contiguous `[B, H, probes, D]`: evenly spread over the queries, or over the real ones of `Lq == Lk`."""
    if view.ranks is None or q.shape[2] != k_len:
        return q[:, :, probe_ranks(q.shape[2], probes, q.device)].contiguous()
    at = view.blocks.gather(1, probe_ranks(view.ranks[:, -1:].long(), probes, q.device))  # a row without keys: some padding
    return q.gather(2, at.long()[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])).contiguous()


def probe_means(q: Tensor, k: Tensor, view: KvView, scale: float) -> Tensor:
    """Mean attention of all probes `q` `[B, H, P, D]` (contiguous) to each key, float32 `[B, H, Lk]` by rank."""
    import triton

    from tsa_compile.kernels.score.probes.device import probe_lse_kernel, probe_mean_kernel

    (batch, heads, probes, dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
    (order, ranks), padded = order_or_unread(view, q.device), view.ranks is not None
    block_d = max(16, triton.next_power_of_2(dim))
    small = q.dtype == torch.float32 or block_d > 128
    block_m, block_n = min(64 if small else 128, max(16, triton.next_power_of_2(probes))), 32 if small else 128
    splits = max(1, min(triton.cdiv(_PROGRAMS, batch * heads), triton.cdiv(k_len, _MIN_SPAN)))
    span = triton.cdiv(triton.cdiv(k_len, splits), block_n) * block_n
    splits = triton.cdiv(k_len, span)
    part = torch.empty(2, batch, heads, splits, probes, dtype=torch.float32, device=q.device)
    mean = torch.empty(batch, heads, k_len, dtype=torch.float32, device=q.device)
    rest = (order, ranks, *k.stride(), heads, kv_heads, k_len, probes, splits, span, scale * LOG2_E)
    shape = {
        "D": dim, "BLOCK_D": block_d, "BLOCK_M": block_m, "BLOCK_N": block_n, "PADDED": padded,
        "PRECISION": precision(q.dtype), "num_warps": 4 if small else 8, "num_stages": 2,
    }  # fmt: skip
    probe_lse_kernel[(batch * heads, splits, triton.cdiv(probes, block_m))](q, k, part[0], part[1], *rest, **shape)
    probe_mean_kernel[(batch * heads, splits)](q, k, part[0], part[1], mean, *rest, **shape)
    return mean
