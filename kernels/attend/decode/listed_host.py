"""Attention to listed keys and all since, on the GPU: the launches of listed_device.py. The contract is docs/operators.md."""

from __future__ import annotations

import torch

from tsa_compile.kernels.attend.decode.config import decode_config
from tsa_compile.kernels.attend.decode.host import MERGED_AT_ONCE
from tsa_compile.kernels.common.launch import multiprocessors, split_count
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import capability_of, precision

Tensor = torch.Tensor


def listed_attention(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, since: Tensor, start: Tensor | None,
    lengths: Tensor | None, key_mask: Tensor | None, scale: float, mask: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tsa::listed_attention` by Triton: a launch that attends, and one that merges its parts. Nothing waits for the device."""
    from tsa_compile.kernels.attend.decode.listed_device import listed_kernel
    from tsa_compile.kernels.common.splits_device import merge_kernel

    (batch, heads, _, dim), (kv_heads, k_len), v_dim = q.shape, k.shape[1:3], v.shape[3]
    out = q.new_empty(batch, 1, heads, v_dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, 1, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    group, (block_d, block_dv) = heads // kv_heads, (max(16, next_power_of_2(x)) for x in (dim, v_dim))
    capability = capability_of(q.device)
    config = decode_config(group, block_d, block_dv, q.dtype, capability, biased=mask is not None, pages=True)
    tiles_m = cdiv(group, config.block_m)
    programs = batch * kv_heads * tiles_m
    processors = multiprocessors(q.device) if q.is_cuda else 4  # the interpreter
    splits = split_count(programs, max(1, cdiv(k_len, config.block_n)), config.resident * processors)
    one = splits == 1
    new = lambda *shape: q.new_empty(*shape, dtype=torch.float32)  # noqa: E731
    part, part_lse = (lse, lse) if one else (new(batch * heads * splits, v_dim), new(batch * heads * splits))
    bias = None if mask is None else mask.expand(batch, heads, 1, mask.shape[3])
    of_bias = (0, 0, 0) if bias is None else (bias.stride(0), bias.stride(1), bias.stride(3))
    indices, counts = indices.expand(-1, kv_heads, -1), counts.expand(-1, kv_heads)
    tensors = (q, k, v, out, lse, part, part_lse, indices, counts, since, start, lengths, key_mask, bias, sinks)
    numbers = (
        *(q.stride(n) for n in (0, 1, 3)), *k.stride(), *v.stride(), *out.stride()[:2],
        *((0, 0) if key_mask is None else key_mask.stride()), *of_bias, *indices.stride()[:2], *counts.stride(),
        kv_heads, group, k_len, splits, tiles_m, scale,
    )  # fmt: skip
    launch(
        listed_kernel, (programs, splits), tensors, numbers,
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        ONE=one, PRECISION=precision(q.dtype), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if not one:
        launch(
            merge_kernel, (batch * heads,), (part, part_lse, out, lse, sinks), (*out.stride()[:3], heads, 1, splits),
            DV=v_dim, BLOCK_DV=block_dv, BLOCK_S=MERGED_AT_ONCE, num_warps=4 if block_dv <= 128 else 8,
        )  # fmt: skip
    return out, lse
