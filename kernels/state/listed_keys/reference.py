"""Lists of keys that a verify step leaves for the drafts behind it. The contract is docs/operators.md, `list_keys`."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def crop_list(since: Tensor, begin: Tensor, counts: Tensor, indices: Tensor, k: Tensor, at: Tensor) -> None:
    """`tsa::crop_list` on any device. Nothing waits for it."""
    dropped = at < since
    since.masked_fill_(dropped, 0)
    counts.masked_fill_(dropped[:, None], 0)
    begin.copy_(at)


def list_keys_reference(
    since: Tensor, counts: Tensor, indices: Tensor, scores: Tensor, lse: Tensor, begin: Tensor, keys: int, share: float
) -> None:
    """`tsa::list_keys` on any device. Source: Vegas, arXiv 2602.07223, with a list for each KV head."""
    rank = ranks(scores, lse, begin, counts.shape[1])
    order = rank.sort(dim=-1, descending=True, stable=True).indices[..., : indices.shape[2]]
    write_lists(since, counts, indices, rank, order, begin, keys, share)


def ranks(scores: Tensor, lse: Tensor, begin: Tensor, kv_heads: int) -> Tensor:
    """`[B, Hk, L]`: mean weight of each key before `begin` in the two rows of a KV head's queries; -1: hidden from them."""
    ends = lse if lse.shape[2] == 1 else lse[:, :, :: lse.shape[2] - 1]  # of the first and the last row
    weights = torch.exp(scores - ends[..., None]).nan_to_num(0.0, 0.0, 0.0).unflatten(1, (kv_heads, -1)).mean((2, 3))
    seen = (scores > -torch.inf).unflatten(1, (kv_heads, -1)).any(2).any(2)
    before = torch.arange(scores.shape[3], device=scores.device) < begin[:, None, None]
    return torch.where(seen & before, weights, -1.0)


def write_lists(
    since: Tensor, counts: Tensor, indices: Tensor, rank: Tensor, order: Tensor, begin: Tensor, keys: int, share: float
) -> None:
    """The first of `order` `[B, Hk, N]`, as many as the budget has, ascending."""
    seen = (rank >= 0).sum(-1)
    wanted = torch.minimum(torch.ceil(share * seen.double()).long().clamp_min(keys), seen).clamp(max=order.shape[2])
    place = torch.arange(order.shape[2], device=order.device)
    none = rank.shape[2]
    indices.copy_(torch.where(place < wanted[..., None], order, none).sort(-1).values)
    counts.copy_(wanted)
    since.copy_(begin)
