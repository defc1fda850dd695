"""Launches of the completion strip and of the two maps that it reads."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.results import no_lse
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, precision, strip_config
from tsa_compile.kernels.types import Attended, Operands, Strip

Tensor = torch.Tensor


def invert(indices: Tensor, counts: Tensor) -> Tensor:
    """Kept lists [B, G, Lk] -> slots int32 [B, G, Lk]: a position's place in its list, or -1."""
    from tsa_compile.kernels.attend.tokens.pack_device import invert_kernel

    batch, lists, k_len = indices.shape
    slots = torch.full(indices.shape, -1, dtype=torch.int32, device=indices.device)
    strides = (*indices.stride()[:2], *slots.stride()[:2])
    launch(invert_kernel, (batch * lists, cdiv(k_len, 1024)), (indices, counts, slots), (*strides, lists), BLOCK=1024)
    return slots


def add_strip(
    x: Operands, out: Tensor, part: Attended, slots: Tensor, heavy_indices: Tensor, strip: Strip, scale: float, need_lse: bool
) -> Tensor:
    """Writes every row of `out`: the strip merged with `part`, the attention over kept tokens. Returns the log-sum-exp
    `[B, H, Lq]`, if needed.

    Args:
        part: `out` itself and its log-sum-exp by row; or, packed, `[B, H, Lk, Dv]` and `[B, H, Lk]` by slot.
        slots: from `invert`.
    """
    from tsa_compile.kernels.attend.tokens.strip_device import strip_kernel

    q, k, v = x.q, x.k, x.v
    (batch, heads, q_len, dim), (kv_heads, k_len), v_dim = q.shape, k.shape[1:3], v.shape[-1]
    block_d, block_dv = (max(16, next_power_of_2(d)) for d in (dim, v_dim))
    config = strip_config(max(block_d, block_dv), q.dtype, capability_of(q.device))
    padded = x.view.ranks is not None
    order, ranks = x.view.order if padded else (slots, slots)  # not read
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device) if need_lse else None
    numbers = (
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *part.out.stride()[:3],
        *part.lse.stride()[:2], *slots.stride()[:2], *heavy_indices.stride()[:2],
        heads, kv_heads, slots.shape[1], q_len, k_len, heavy_indices.shape[-1], *strip, scale * LOG2_E,
    )  # fmt: skip
    launch(
        strip_kernel, (cdiv(q_len, config.block_m) * batch * heads,),
        (q, k, v, out, part.out, part.lse, slots, heavy_indices, order, ranks, lse), numbers,
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PADDED=padded, PACKED=part.out is not out, PRECISION=precision(q.dtype), **config.options,
    )  # fmt: skip
    return no_lse(q) if lse is None else lse
