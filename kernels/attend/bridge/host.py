"""Block-causal attention with bridges on the GPU: launches device.py. The contract is docs/operators.md, `bridge_attention`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.results import empty_result, no_lse
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, precision, strip_config
from tsa_compile.kernels.common.view import length_of
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def bridge_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None,
    key_mask: Tensor | None, scale: float, width: int, rows: int, sources: int, offset: int, need_lse: bool,
    k_len: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tsa::bridge_attention`: (out `[B, H, Lq, Dv]`, stored as `[B, Lq, H, Dv]`; lse float32 `[B, H, Lq]`, or `[0]`).

    Nothing waits for the device, and lengths are run-time arguments. Tiles are those of the strip, whose loops are as short.

    Raises:
        ValueError: the scale is not positive.
    """
    if scale <= 0:
        raise ValueError(f"tsa::bridge_attention on a GPU takes a positive scale, not {scale}")
    from tsa_compile.kernels.attend.bridge.device import bridge_attention_kernel

    out = empty_result(q, v)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32) if need_lse else no_lse(q)
    if out.numel() == 0:
        return out, lse
    (batch, heads, q_len, dim), kv_heads, v_dim = q.shape, k.shape[1], v.shape[-1]
    block_d, block_dv = (max(16, next_power_of_2(d)) for d in (dim, v_dim))
    config = strip_config(max(block_d, block_dv), q.dtype, capability_of(q.device))
    k_len = length_of(k, KvView(blocks, block, None, None), k_len)
    padding = (q if x is None else x for x in (start, lengths, key_mask))
    numbers = (
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], 0 if key_mask is None else key_mask.stride(0),
        heads, kv_heads, q_len, k_len, 0 if blocks is None else blocks.stride(0), block, max(1, k.shape[2] // block),
        width, rows, sources, offset, scale * LOG2_E,
    )  # fmt: skip
    launch(
        bridge_attention_kernel, (cdiv(q_len, config.block_m) * batch * heads,), (q, k, v, out, lse, *padding, blocks),
        numbers, D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        START=start is not None, LENGTH=lengths is not None, MASK=key_mask is not None, LSE=need_lse,
        PRECISION=precision(q.dtype), **config.options,
    )  # fmt: skip
    return out, lse
