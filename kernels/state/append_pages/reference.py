"""The sums of a cache's pages as rows are appended, in plain PyTorch. The contract is docs/operators.md, `append_pages`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tsa_compile.kernels.common.filled_pages import every_row, filled_pages, real_rows, write
from tsa_compile.kernels.common.pages import PAGE, empty_index
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
    real, filled = real_rows(end, start, key_mask, pages), filled_pages(begin, end, pages)
    wide = torch.promote_types(k.dtype, torch.float32)
    keys = rows[:, :, : pages * PAGE].to(wide).unflatten(2, (pages, PAGE))
    write(sums, torch.where(real[:, None, ..., None], keys, 0).sum(3).to(sums.dtype), filled, view)
    write(counts, real.sum(2, dtype=torch.int32)[:, None], filled, view)


def page_sums_reference(
    k: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`tsa::page_sums`: the index of a whole cache, computed anew."""
    return build(append_pages_reference, k, KvView(blocks, block, start, lengths), key_mask)


def build(append: Callable[..., None], k: Tensor, view: KvView, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(sums, counts) of all pages that are full, by an `append_pages` from nothing."""
    sums, counts = empty_index(k)
    begin, end, capacity = every_row(k, view)
    append(sums, counts, k, view.blocks, view.block, view.start, begin, end, key_mask, capacity)
    return sums, counts
