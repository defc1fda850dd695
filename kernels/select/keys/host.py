"""Key selection on the GPU: probe scores (device.py), then the coverage count and compaction of token_select."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.tiles import LOG2_E, precision
from tsa_compile.kernels.select.keys.reference import probe_ranks
from tsa_compile.kernels.select.tokens.host import _order, select_everything, select_from_means

Tensor = torch.Tensor
_PROGRAMS, _MIN_SPAN = 528, 512  # programs, at least (four for each multiprocessor of a Hopper GPU); keys a program reads


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
    order, ranks = _order(q, k, key_mask)
    padded, (q_len, k_len) = key_mask is not None, (q.shape[2], k.shape[2])
    if k_len <= min_keys + 1 or coverage == 0 or q_len == 0:
        return select_everything(q, k, order, ranks, padded, 0, q.shape[1])[:2]
    mean = probe_means(probing_queries(q, k_len, order, ranks, padded, probes), k, order, ranks, padded, scale)
    return select_from_means(mean, k_len, order, ranks, padded, coverage, 1, 1, min_keys, 0, q.shape[1])[:2]


def probing_queries(q: Tensor, k_len: int, order: Tensor, ranks: Tensor, padded: bool, probes: int) -> Tensor:
    """The probes, contiguous `[B, H, probes, D]`: evenly spread over the queries, or over the real ones of `Lq == Lk`."""
    if not (padded and q.shape[2] == k_len):
        return q[:, :, probe_ranks(q.shape[2], probes, q.device)].contiguous()
    at = order.gather(1, probe_ranks(ranks[:, -1:].long(), probes, q.device))  # a row without keys: some padding
    return q.gather(2, at.long()[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])).contiguous()


def probe_means(q: Tensor, k: Tensor, order: Tensor, ranks: Tensor, padded: bool, scale: float) -> Tensor:
    """Mean attention of all probes `q` `[B, H, P, D]` (contiguous) to each key, float32 `[B, H, Lk]` by rank."""
    import triton

    from tsa_compile.kernels.select.keys.device import probe_lse_kernel, probe_mean_kernel

    (batch, heads, probes, dim), (kv_heads, k_len) = q.shape, k.shape[1:3]
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
