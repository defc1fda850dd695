"""The sums of a cache's pages as rows are appended, in plain PyTorch. The contract is docs/operators.md, `append_pages`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsa_compile.kernels.common.pages import PAGE, empty_index, page_view
from tsa_compile.kernels.common.view import rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def append_pages_reference(
    sums: Tensor,
    counts: Tensor,
    k: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    begin: Tensor,
    end: Tensor,
    key_mask: Tensor | None,
    new: int,
) -> None:
    """`tsa::append_pages` on any device; sums in float32, float64 for a float64 cache."""
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
    wide = torch.promote_types(k.dtype, torch.float32)
    kept = torch.where(real[:, None, :, None], rows[:, :, : pages * PAGE].to(wide), 0)
    new_sums = kept.unflatten(2, (pages, PAGE)).sum(3).to(sums.dtype)
    new_counts = real.unflatten(1, (pages, PAGE)).sum(2, dtype=torch.int32)[:, None]
    page = torch.arange(pages, device=k.device)
    full = (page >= begin[:, None] // PAGE) & (page < end[:, None] // PAGE)
    _write(sums, new_sums, full, view)
    _write(counts, new_counts, full, view)


def _write(index: Tensor, new: Tensor, full: Tensor, view: KvView) -> None:
    """Entries `new` `[B, n, pages, ...]` where `full` `[B, pages]`, to their places in `index` `[N, n, pages, ...]`."""
    of_pages = page_view(view)
    b, p = full.nonzero(as_tuple=True)
    owner, at = b, p
    if of_pages.blocks is not None:
        at_once = index.shape[2] // of_pages.block
        entry = of_pages.blocks.long()[b, p // of_pages.block]
        owner, at = entry // at_once, entry % at_once * of_pages.block + p % of_pages.block
    index[owner, :, at] = new[b, :, p]


def page_sums_reference(
    k: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`tsa::page_sums`: the index of a whole cache, computed anew."""
    return build(append_pages_reference, k, KvView(blocks, block, start, lengths), key_mask)


def build(append: Callable[..., None], k: Tensor, view: KvView, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sums, counts) of all pages that are full, by an `append_pages` from nothing."""
    sums, counts = empty_index(k)
    batch = k.shape[0] if view.blocks is None else view.blocks.shape[0]
    capacity = k.shape[2] if view.blocks is None else view.blocks.shape[1] * view.block
    begin = torch.zeros(batch, dtype=torch.int32, device=k.device)
    end = torch.full_like(begin, capacity)
    if view.lengths is not None:
        end = (view.lengths if view.start is None else view.start + view.lengths).clamp(max=capacity)
    append(sums, counts, k, view.blocks, view.block, view.start, begin, end, key_mask, capacity)
    return sums, counts
