"""Launches of the completion strip and of the two maps that it reads."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, precision, strip_config

Tensor = torch.Tensor


def invert(indices: Tensor, counts: Tensor) -> Tensor:
    """Kept lists [B, G, Lk] -> slots int32 [B, G, Lk]: a position's place in its list, or -1."""
    import triton

    from tsa_compile.kernels.attend.tokens.pack_device import invert_kernel

    batch, lists, k_len = indices.shape
    slots = torch.full(indices.shape, -1, dtype=torch.int32, device=indices.device)
    invert_kernel[(triton.cdiv(k_len, 1024), batch * lists)](
        indices, counts, slots, *indices.stride()[:2], *slots.stride()[:2], lists, BLOCK=1024
    )
    return slots


def rank_order(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, Lk] -> (order, ranks), int32: the real positions, then the padding; and the running count of the real."""
    import triton

    from tsa_compile.kernels.attend.tokens.pack_device import order_kernel

    ranks = key_mask.cumsum(1, dtype=torch.int32)
    order = torch.empty_like(ranks)
    order_kernel[(triton.cdiv(ranks.shape[1], 1024), ranks.shape[0])](ranks, order, ranks.shape[1], BLOCK=1024)
    return order, ranks


def add_strip(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    part: Tensor,
    part_lse: Tensor,
    slots: Tensor,
    heavy_indices: Tensor,
    order: tuple[Tensor, Tensor] | None,
    scale: float,
    window: int,
    sinks: int,
) -> None:
    """Writes every row of `out`: the strip merged with the attention over kept tokens, `part` and `part_lse`.

    Args:
        part, part_lse: `out` itself and [B, H, Lq] by row; or, packed, [B, H, Lk, Dv] and [B, H, Lk] by slot.
        slots: from `invert`.
        order: from `rank_order`; None: no padding.
    """
    import triton

    from tsa_compile.kernels.attend.tokens.strip_device import strip_kernel

    (batch, heads, q_len, dim), (kv_heads, k_len), v_dim = q.shape, k.shape[1:3], v.shape[-1]
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (dim, v_dim))
    config = strip_config(max(block_d, block_dv), q.dtype, capability_of(q.device))
    positions, ranks = order or (slots, slots)
    strip_kernel[(triton.cdiv(q_len, config.block_m), batch * heads)](
        q, k, v, out, part, part_lse, slots, heavy_indices, positions, ranks,
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *part.stride()[:3],
        *part_lse.stride()[:2], *slots.stride()[:2], *heavy_indices.stride()[:2],
        heads, kv_heads, slots.shape[1], q_len, k_len, heavy_indices.shape[-1], window, sinks, scale * LOG2_E,
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PADDED=order is not None, PACKED=part is not out, PRECISION=precision(q.dtype), **config.options,
    )  # fmt: skip
