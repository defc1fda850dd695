"""Lists of keys that a verify step leaves for the drafts behind it. The contract is docs/operators.md, `list_keys`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.shares import share_bits, share_of

Tensor = torch.Tensor


def crop_list_reference(since: Tensor, begin: Tensor, counts: Tensor, indices: Tensor, k: Tensor, at: Tensor) -> None:
    """`tsa::crop_list` on any device. Nothing waits for it."""
    dropped = at < since
    since.masked_fill_(dropped, 0)
    counts.masked_fill_(dropped[:, None], 0)
    begin.copy_(at)


def list_keys_reference(
    since: Tensor, counts: Tensor, indices: Tensor, scores: Tensor, lse: Tensor, begin: Tensor, keys: int, share: float
) -> None:
    """`tsa::list_keys` on any device. Source: Vegas, arXiv 2602.07223."""
    rank = ranks(scores, lse, begin, counts.shape[1])
    order = rank.sort(dim=-1, descending=True, stable=True).indices[..., : indices.shape[2]]
    seen = (rank >= 0).sum(-1)
    wanted = torch.minimum(share_of(seen, share_bits(share)).clamp_min(keys), seen).clamp(max=order.shape[2])
    place = torch.arange(order.shape[2], device=order.device)
    indices.copy_(torch.where(place < wanted[..., None], order, rank.shape[2]).sort(-1).values)
    counts.copy_(wanted)
    since.copy_(begin)


def ranks(scores: Tensor, lse: Tensor, begin: Tensor, lists: int) -> Tensor:
    """`[B, G, L]`: mean weight of each key before `begin` in the two rows of a list's query heads; -1: hidden from them."""
    ends = lse if lse.shape[2] == 1 else lse[:, :, :: lse.shape[2] - 1]  # of the first and the last row
    weights = torch.exp(scores - ends[..., None]).nan_to_num(0.0, 0.0, 0.0).unflatten(1, (lists, -1)).mean((2, 3))
    seen = (scores > -torch.inf).unflatten(1, (lists, -1)).any(2).any(2)
    before = torch.arange(scores.shape[3], device=scores.device) < begin[:, None, None]
    return torch.where(seen & before, weights, -1.0)
