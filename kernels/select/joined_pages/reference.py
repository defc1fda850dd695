"""The lists of query heads become lists of their KV heads, in plain PyTorch. The contract is docs/operators.md, `join_pages`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.pages import PAGE, pages_of
from tsa_compile.kernels.common.view import row_range
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def join_pages_reference(
    indices: Tensor,
    list_counts: Tensor,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    owners: Sequence[int],
    sinks: Sequence[int],
    recent: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`tsa::join_pages` on any device."""
    (batch, lists, _), kv_heads, pages = indices.shape, len(recent), pages_of(capacity)
    first, end = (x[:, None] for x in row_range(capacity, batch, KvView(None, 1, start, lengths), indices.device))
    page = torch.arange(pages, device=indices.device)
    kept = torch.zeros(batch, kv_heads, pages + 1, dtype=torch.bool, device=indices.device)
    for number in range(lists):
        valid = torch.arange(indices.shape[2], device=indices.device) < list_counts[:, number, None]
        kept[:, owners[number]].scatter_(1, torch.where(valid, indices[:, number].long(), pages), True)
    head, tail = (torch.tensor(list(n), device=indices.device)[:, None] for n in (sinks, recent))
    near = (page < (first // PAGE)[:, None] + head) | (page > ((end - 1) // PAGE)[:, None] - tail)
    kept = kept[..., :pages] | near
    kept = kept & ((page >= first // PAGE) & (page * PAGE < end) & (end > first))[:, None]
    order = torch.where(kept, page, pages).sort(-1).values.to(torch.int32)
    return order, kept.sum(-1, dtype=torch.int32)
