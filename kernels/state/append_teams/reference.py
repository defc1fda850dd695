"""The teams of the pages that new rows have filled, in plain PyTorch. The contract is docs/operators.md, `append_teams`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsa_compile.kernels.common.pages import PAGE, page_view, pages_of
from tsa_compile.kernels.common.teams import teams_of
from tsa_compile.kernels.common.view import rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def append_teams_reference(
    teams: Tensor,
    k: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    begin: Tensor,
    end: Tensor,
    key_mask: Tensor | None,
    new: int,
    count: int,
) -> None:
    """`tsa::append_teams` on any device; distances in float32, float64 for a float64 cache."""
    view = KvView(blocks, block, None, None)
    rows = rows_in_order(k, view)
    pages = rows.shape[2] // PAGE  # that can be full
    j = torch.arange(pages * PAGE, device=k.device)
    real = j < end[:, None]
    if start is not None:
        real = real & (j >= start[:, None])
    if key_mask is not None:
        known = min(real.shape[1], key_mask.shape[1])  # a mask reaches to the row's end, not always to the capacity
        real = torch.cat([real[:, :known] & key_mask[:, :known], real[:, known:]], 1)
    real = real.unflatten(1, (pages, PAGE))[:, None].expand(-1, k.shape[1], -1, -1)
    keys = rows[:, :, : pages * PAGE].to(torch.promote_types(k.dtype, torch.float32)).unflatten(2, (pages, PAGE))
    found = teams_of(torch.where(real[..., None], keys, 0), real, count)
    page = torch.arange(pages, device=k.device)
    b, p = ((page >= begin[:, None] // PAGE) & (page < end[:, None] // PAGE)).nonzero(as_tuple=True)
    owner, at, of_pages = b, p, page_view(view)
    if of_pages.blocks is not None:
        at_once = teams.shape[2] // of_pages.block
        entry = of_pages.blocks.long()[b, p // of_pages.block]
        owner, at = entry // at_once, entry % at_once * of_pages.block + p % of_pages.block
    teams[owner, :, at] = found[b, :, p]


def page_teams_reference(
    k: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    count: int,
) -> Tensor:
    """`tsa::page_teams`: the teams of a whole cache, made anew."""
    return build(append_teams_reference, k, KvView(blocks, block, start, lengths), key_mask, count)


def build(append: Callable[..., None], k: Tensor, view: KvView, key_mask: Tensor | None, count: int) -> Tensor:
    """Teams of all pages that are full, by an `append_teams` from nothing."""
    teams = k.new_empty(*k.shape[:2], pages_of(k.shape[2]), dtype=torch.int64)
    batch = k.shape[0] if view.blocks is None else view.blocks.shape[0]
    capacity = k.shape[2] if view.blocks is None else view.blocks.shape[1] * view.block
    begin = torch.zeros(batch, dtype=torch.int32, device=k.device)
    end = torch.full_like(begin, capacity)
    if view.lengths is not None:
        end = (view.lengths if view.start is None else view.start + view.lengths).clamp(max=capacity)
    append(teams, k, view.blocks, view.block, view.start, begin, end, key_mask, capacity, count)
    return teams
