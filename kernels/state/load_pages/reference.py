"""Pages from a store into slots of a pool, in plain PyTorch. The contract is docs/operators.md, `load_pages`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.pages import PAGE

Tensor = torch.Tensor


def load_pages_reference(pool: Tensor, store: Tensor, moves: Tensor) -> None:
    """`tsa::load_pages` on any device; the store may be on another."""
    row, page, slot = moves.long().unbind(1)
    taken = store[row.to(store.device), page.to(store.device)].to(pool.device)
    pool.unflatten(2, (-1, PAGE))[row, :, slot] = taken
