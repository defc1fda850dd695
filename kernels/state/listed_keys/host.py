"""`tsa::list_keys` on a GPU: as the reference, without a sort of all keys. Not a kernel of ours yet."""

from __future__ import annotations

import torch

from tsa_compile.kernels.state.listed_keys.reference import ranks, write_lists

Tensor = torch.Tensor


def list_keys(
    since: Tensor, counts: Tensor, indices: Tensor, scores: Tensor, lse: Tensor, begin: Tensor, keys: int, share: float
) -> None:
    """Which of equal weights at the cut are listed is torch's choice. Nothing waits for the device."""
    rank = ranks(scores, lse, begin, counts.shape[1])
    write_lists(since, counts, indices, rank, rank.topk(indices.shape[2], -1).indices, begin, keys, share)
