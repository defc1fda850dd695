"""Where the key of a position lies (`KvView`, types.py), in plain PyTorch: what references and checks read it by."""

from __future__ import annotations

import torch

from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def capacity_of(k: Tensor, view: KvView) -> int:
    """Positions that a row of the batch may have: of `k` `[B, Hk, L, D]` itself, or of the table of blocks."""
    return k.shape[2] if view.blocks is None else view.blocks.shape[1] * view.block


def length_of(k: Tensor, view: KvView, k_len: int | None) -> int:
    """Positions of a row, the queries being the last of them: what the caller says, or the capacity."""
    return capacity_of(k, view) if k_len is None else k_len


def rows_in_order(x: Tensor, view: KvView) -> Tensor:
    """`x` `[N, Hk, L, D]` by position: `[B, Hk, capacity, D]`.

    The blocks of `x` are numbered through its first dimension: block `i` is rows `[i % n * block, (i % n + 1) * block)` of
    `x[i // n]`, where `n = L // block`. So a pool `[blocks, Hk, block, D]`, a cache `[B, Hk, L, D]` and packed sequences
    `[1, Hk, L, D]` are read by one rule. Entries of the table that no position below the row's end uses may be anything.
    """
    if view.blocks is None:
        return x
    at_once = x.shape[2] // view.block
    table = view.blocks.long().clamp(0, max(0, x.shape[0] * at_once - 1))
    inside = torch.arange(view.block, device=x.device)
    rows = ((table % at_once)[..., None] * view.block + inside).flatten(1)  # [B, capacity]
    owner = (table // at_once).repeat_interleave(view.block, 1)
    return x[owner, :, rows].transpose(1, 2)


def key_range(k: Tensor, view: KvView) -> tuple[Tensor, Tensor]:
    """(first position that is a key, first one behind the last), int64 `[B]`, within the capacity."""
    batch = k.shape[0] if view.blocks is None else view.blocks.shape[0]
    return row_range(capacity_of(k, view), batch, view, k.device)


def row_range(capacity: int, batch: int, view: KvView, device: torch.device) -> tuple[Tensor, Tensor]:
    """As `key_range`, of rows that may have up to `capacity` positions."""
    first = torch.zeros(batch, dtype=torch.long, device=device) if view.start is None else view.start.long().clamp(0)
    end = torch.full_like(first, capacity) if view.lengths is None else first + view.lengths.long()
    return first, end.clamp(max=capacity)


def padding_range(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """`tsa::padding_range`: `KvView.start` and `lengths` of bool `[B, Lk]`, int32 `[B]` each: from a row's first key to its last.

    A mask with holes hides keys between them, so kernels are given the mask as well.
    """
    position = torch.arange(key_mask.shape[1], device=key_mask.device, dtype=torch.int32)
    end = torch.where(key_mask, position + 1, 0).amax(1)
    first = torch.where(key_mask, position, end[:, None]).amin(1)
    return first, end - first
