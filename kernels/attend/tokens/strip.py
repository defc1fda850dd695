"""Launches of the completion strip and of the two maps that it reads."""

from __future__ import annotations

import functools

import torch

from tsa_compile.kernels.common.launcher import Launch
from tsa_compile.kernels.common.results import no_lse
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, precision, strip_config
from tsa_compile.kernels.types import Attended, Operands, Strip

Tensor = torch.Tensor
Shape = tuple[int, ...]


def invert(indices: Tensor, counts: Tensor) -> Tensor:
    """Kept lists [B, G, Lk] -> slots int32 [B, G, Lk]: a position's place in its list, or -1."""
    slots = torch.full(indices.shape, -1, dtype=torch.int32, device=indices.device)
    _invert(indices.shape, (*indices.stride()[:2], *slots.stride()[:2]))(indices, counts, slots)
    return slots


@functools.lru_cache(maxsize=1024)
def _invert(shape: Shape, strides: Shape) -> Launch:
    from tsa_compile.kernels.attend.tokens.pack_device import invert_kernel

    batch, lists, k_len = shape
    return Launch(invert_kernel, (batch * lists, cdiv(k_len, 1024)), (*strides, lists), BLOCK=1024)


def add_strip(
    x: Operands, out: Tensor, part: Attended, slots: Tensor, heavy_indices: Tensor, strip: Strip, scale: float, need_lse: bool
) -> Tensor:
    """Writes every row of `out`: the strip merged with `part`, the attention over kept tokens. Returns the log-sum-exp
    `[B, H, Lq]`, if needed.

    Args:
        part: `out` itself and its log-sum-exp by row; or, packed, `[B, H, Lk, Dv]` and `[B, H, Lk]` by slot.
        slots: from `invert`.
    """
    q, k, v = x.q, x.k, x.v
    padded = x.view.ranks is not None
    order, ranks = x.view.order if padded else (slots, slots)  # not read
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device) if need_lse else None
    strides = (
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *part.out.stride()[:3],
        *part.lse.stride()[:2], *slots.stride()[:2], *heavy_indices.stride()[:2],
    )  # fmt: skip
    shapes = (q.shape, k.shape, v.shape[3], *heavy_indices.shape[1:])
    run = _strip(q.device, q.dtype, *shapes, strides, strip, scale, padded, part.out is not out)
    run(q, k, v, out, part.out, part.lse, slots, heavy_indices, order, ranks, lse)
    return no_lse(q) if lse is None else lse


@functools.lru_cache(maxsize=1024)
def _strip(
    device: torch.device, dtype: torch.dtype, q: Shape, k: Shape, v_dim: int, lists: int, heavy: int, strides: Shape,
    strip: Strip, scale: float, padded: bool, packed: bool,
) -> Launch:  # fmt: skip
    """Of operands of these shapes; strides: as the kernel takes them."""
    from tsa_compile.kernels.attend.tokens.strip_device import strip_kernel

    (batch, heads, q_len, dim), (kv_heads, k_len) = q, k[1:3]
    block_d, block_dv = (max(16, next_power_of_2(d)) for d in (dim, v_dim))
    config = strip_config(max(block_d, block_dv), dtype, capability_of(device))
    return Launch(
        strip_kernel, (cdiv(q_len, config.block_m) * batch * heads,),
        (*strides, heads, kv_heads, lists, q_len, k_len, heavy, *strip, scale * LOG2_E),
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PADDED=padded, PACKED=packed, PRECISION=precision(dtype), **config.options,
    )  # fmt: skip
