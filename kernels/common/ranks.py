"""Where the real keys of each batch row are, made once from a key mask: launches and their reference."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.sizes import cdiv
from tsa_compile.kernels.types import IDENTITY, KvView

Tensor = torch.Tensor


def rank_order(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """(order, ranks), int32 `[B, Lk]`, of a bool key mask `[B, Lk]` on a GPU.

    order: the real positions, ascending, then the padding, ascending. ranks: how many real positions there are up to and with
    this one, so the rank of a real position is `ranks - 1`, and `ranks[:, -1]` the number of real keys.
    """
    from tsa_compile.kernels.common.ranks_device import order_kernel

    ranks = key_mask.cumsum(1, dtype=torch.int32)
    order = torch.empty_like(ranks)
    if order.numel():
        grid = (ranks.shape[0], cdiv(ranks.shape[1], 1024))
        launch(order_kernel, grid, (ranks, order), (ranks.shape[1],), BLOCK=1024)
    return order, ranks


def rank_order_reference(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """`rank_order` for tensors on any device, in plain PyTorch."""
    ranks = key_mask.cumsum(1, dtype=torch.int32)
    return (~key_mask).byte().sort(dim=1, stable=True).indices.int(), ranks


def order_or_unread(view: KvView, device: torch.device) -> tuple[Tensor, Tensor]:
    """(order, ranks) of a view; without padding two tensors that kernels take and do not read."""
    if view.ranks is None:
        unread = torch.empty(1, dtype=torch.int32, device=device)
        return unread, unread
    return view.order


def real_positions(view: KvView, b: int, k_len: int, device: torch.device) -> Tensor:
    """Positions of the real keys of batch row `b`, ascending, int64; for references, as it waits for the device."""
    if view.ranks is None:
        return torch.arange(k_len, device=device)
    order, ranks = view.order
    return order[b, : int(ranks[b, -1]) if k_len else 0].long()


def view_of_mask(key_mask: Tensor | None) -> KvView:
    """The view of a bool key mask `[B, Lk]`, in plain PyTorch; None: every row of the tensors is a key."""
    return IDENTITY if key_mask is None else KvView.ordered(*rank_order_reference(key_mask))
