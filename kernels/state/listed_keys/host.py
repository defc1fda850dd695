"""`tsa::list_keys` on a GPU: weights by device.py, in one pass over the scores; the heaviest by torch's `topk`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.state.listed_keys.reference import write_lists

Tensor = torch.Tensor
BLOCK = 1024  # keys of a program


def list_keys(
    since: Tensor, counts: Tensor, indices: Tensor, scores: Tensor, lse: Tensor, begin: Tensor, keys: int, share: float
) -> None:
    """Which of equal weights at the cut are listed is torch's choice. Nothing waits for the device."""
    rank = ranks(scores, lse, begin, counts.shape[1])
    write_lists(since, counts, indices, rank, rank.topk(indices.shape[2], -1).indices, begin, keys, share)


def ranks(scores: Tensor, lse: Tensor, begin: Tensor, kv_heads: int) -> Tensor:
    """As `reference.ranks`."""
    import triton

    from tsa_compile.kernels.state.listed_keys.device import rank_kernel

    (batch, heads, _, length), rows = scores.shape, lse.shape[2]
    rank = torch.empty(batch, kv_heads, length, dtype=torch.float32, device=scores.device)
    if rank.numel():
        rank_kernel[(batch * kv_heads, triton.cdiv(length, BLOCK))](
            scores.contiguous(), lse.contiguous(), begin, rank, length, rows, heads // kv_heads, kv_heads, BLOCK=BLOCK
        )  # fmt: skip
    return rank
