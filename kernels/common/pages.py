"""Pages: 16 consecutive rows of a cache, from a multiple of 16 on; and where a page's entry of a page index lies."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
PAGE = 16
CHUNK = 64  # pages that one program scores


def page_view(view: KvView) -> KvView:
    """The view by which an index `[N, ..., L // 16, ...]` of a cache `[N, Hk, L, D]` is read: an entry is a page.

    Raises:
        ValueError: blocks that hold no whole number of pages.
    """
    if view.blocks is None:
        return KvView(None, 1, None, None)
    if view.block % PAGE:
        raise ValueError(f"a page index needs blocks of a multiple of {PAGE} rows, got {view.block}")
    return KvView(view.blocks, view.block // PAGE, None, None)


def pages_of(rows: Any) -> Any:
    """Pages of so many rows, the last one perhaps not full; a number or a symbol."""
    return (rows + PAGE - 1) // PAGE


def empty_index(k: Tensor) -> tuple[Tensor, Tensor]:
    """Sums `[N, Hk, ceil(L / 16), D]` and counts int32 `[N, 1, ceil(L / 16)]`, uninitialised; bfloat16 sums for such keys."""
    dtype = k.dtype if k.dtype in (torch.bfloat16, torch.float64) else torch.float32
    shape = (k.shape[0], k.shape[1], pages_of(k.shape[2]))
    return k.new_empty(*shape, k.shape[3], dtype=dtype), k.new_empty(shape[0], 1, shape[2], dtype=torch.int32)


def append_numbers(
    k: Tensor, index_strides: Iterable[int], blocks: Tensor | None, block: int, key_mask: Tensor | None
) -> tuple[int, ...]:
    """The numbers that the kernels of `state/append_*` take: strides of k `[N, Hk, L, D]`, of the index, of the table of blocks
    and of the mask; pages of a block; blocks in a row of k; KV heads."""
    mask_strides = (0, 0) if key_mask is None else key_mask.stride()
    of_blocks = (max(1, block // PAGE), max(1, k.shape[2] // block))
    return *k.stride(), *index_strides, 0 if blocks is None else blocks.stride(0), *mask_strides, *of_blocks, k.shape[1]


def listed_pages(indices: Tensor, counts: Tensor, pages: int) -> Tensor:
    """Lists int32 `[B, Hk, N]` with `counts` `[B, Hk]` entries -> bool `[B, Hk, pages]`: is the page in the list?"""
    valid = (torch.arange(indices.shape[2], device=indices.device) < counts[..., None]) & (indices < pages)
    kept = torch.zeros(*indices.shape[:2], pages + 1, dtype=torch.bool, device=indices.device)
    return kept.scatter(2, torch.where(valid, indices.long(), pages), True)[..., :pages]
