"""What the references of page indexes (`state/append_*`) do alike, in plain PyTorch: which pages new rows have filled, which
rows of these are keys, and where a page's entry lies."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.pages import PAGE, page_view
from tsa_compile.kernels.common.view import capacity_of
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def filled_pages(begin: Tensor, end: Tensor, pages: int) -> Tensor:
    """Bool `[B, pages]`: pages whose last row is one of those from `begin` `[B]` up to `end` `[B]`."""
    page = torch.arange(pages, device=end.device)
    return (page >= begin[:, None] // PAGE) & (page < end[:, None] // PAGE)


def real_rows(end: Tensor, start: Tensor | None, key_mask: Tensor | None, pages: int) -> Tensor:
    """Bool `[B, pages, 16]`: rows before `end` `[B]` that are no padding.

    Args:
        start: `[B]`, first rows that are keys; None: all are.
        key_mask: bool `[B, n]`; rows from n on are keys, as a mask reaches to the row's end, not always to the capacity.
    """
    rows = torch.arange(pages * PAGE, device=end.device)
    real = rows < end[:, None]
    if start is not None:
        real = real & (rows >= start[:, None])
    if key_mask is not None:
        known = min(real.shape[1], key_mask.shape[1])
        real = torch.cat([real[:, :known] & key_mask[:, :known], real[:, known:]], 1)
    return real.unflatten(1, (pages, PAGE))


def entries(filled: Tensor, view: KvView, per_row: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(batch row, page, owner, place) of each page of `filled`, int64 `[n]`: its entry in an index is `index[owner, :, place]`.

    Args:
        filled: bool `[B, pages]`.
        view: of the keys.
        per_row: pages that one row of the index, or of the keys, has room for.
    """
    b, page = filled.nonzero(as_tuple=True)
    of_pages = page_view(view)
    if of_pages.blocks is None:
        return b, page, b, page
    blocks_of_row = per_row // of_pages.block
    entry = of_pages.blocks.long()[b, page // of_pages.block]
    return b, page, entry // blocks_of_row, entry % blocks_of_row * of_pages.block + page % of_pages.block


def write(index: Tensor, new: Tensor, filled: Tensor, view: KvView) -> None:
    """Entries `new` `[B, n, pages, ...]` where `filled` `[B, pages]`, to their places in `index` `[N, n, P, ...]`."""
    b, page, owner, place = entries(filled, view, index.shape[2])
    index[owner, :, place] = new[b, :, page]


def every_row(k: Tensor, view: KvView) -> tuple[Tensor, Tensor, int]:
    """(begin, end, rows at most) of an append of all that keys `k` `[N, Hk, L, D]` hold: int32 `[B]` each, and the capacity."""
    batch, capacity = k.shape[0] if view.blocks is None else view.blocks.shape[0], capacity_of(k, view)
    begin = torch.zeros(batch, dtype=torch.int32, device=k.device)
    end = torch.full_like(begin, capacity)
    if view.lengths is not None:
        end = (view.lengths if view.start is None else view.start + view.lengths).clamp(max=capacity)
    return begin, end, capacity
