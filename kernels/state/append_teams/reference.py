"""The teams of the pages that new rows have filled, in plain PyTorch. The contract is docs/operators.md, `append_teams`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsa_compile.kernels.common.filled_pages import every_row, filled_pages, real_rows, write
from tsa_compile.kernels.common.pages import PAGE, pages_of
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
    real = real_rows(end, start, key_mask, pages)[:, None].expand(-1, k.shape[1], -1, -1)
    keys = rows[:, :, : pages * PAGE].to(torch.promote_types(k.dtype, torch.float32)).unflatten(2, (pages, PAGE))
    found = teams_of(torch.where(real[..., None], keys, 0), real, count)
    write(teams, found, filled_pages(begin, end, pages), view)


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
    begin, end, capacity = every_row(k, view)
    append(teams, k, view.blocks, view.block, view.start, begin, end, key_mask, capacity, count)
    return teams
