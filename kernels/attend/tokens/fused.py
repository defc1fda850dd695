"""Engine `fused`: one Triton kernel gathers as it loads and stores rows in place; a second adds the strip."""

from __future__ import annotations

import torch

from tsa_compile.kernels.attend.tokens import hopper
from tsa_compile.kernels.attend.tokens.strip import add_strip, invert
from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.results import empty_result, no_lse
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, precision, prefill_config, section_heads
from tsa_compile.kernels.types import Attended, Operands, Strip, Tokens

Tensor = torch.Tensor


def fused_attention(x: Operands, kept: Tokens, scale: float, strip: Strip, need_lse: bool = False) -> Attended:
    """`sparse_attention` (host.py) for CUDA tensors. Scratch: 4 bytes a position and list, and a row, with a strip."""
    q, k, v = x.q, x.k, x.v
    has_strip = strip.reads(kept.heavy_indices)
    out, lse = new_result(q, v, has_strip, need_lse)
    if out.numel() == 0:
        return Attended(out, no_lse(q) if lse is None or not need_lse else lse.fill_(-torch.inf))
    launch_prefill(q, k, v, out, lse, kept.indices, kept.counts, scale)
    if not has_strip or lse is None:
        return Attended(out, no_lse(q) if lse is None else lse)
    final = add_strip(x, out, Attended(out, lse), invert(kept.indices, kept.counts), kept.heavy_indices, strip, scale, need_lse)
    return Attended(out, final)


def new_result(q: Tensor, v: Tensor, has_strip: bool, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """(out, lse) for a prefill to write. It writes kept rows alone if it stores their log-sum-exp, so if no strip comes after it
    the others are written here; `lse` None: nobody needs it, and it zeroes them."""
    out = empty_result(q, v)
    if has_strip:
        return out, torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if need_lse:
        return out.zero_(), torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    return out, None


def launch_prefill(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, indices: Tensor, counts: Tensor, scale: float
) -> None:
    """Attention among the kept tokens into `out`; `lse` None: the other rows are zeroed."""
    if hopper.takes(q, k, v):
        return hopper.launch(q, k, v, out, lse, indices, counts, scale)
    from tsa_compile.kernels.attend.tokens.device import sparse_prefill_kernel

    (batch, heads, q_len, dim), (kv_heads, k_len), v_dim = q.shape, k.shape[1:3], v.shape[-1]
    block_d, block_dv = (max(16, next_power_of_2(d)) for d in (dim, v_dim))
    config = prefill_config(max(block_d, block_dv), q.dtype, capability_of(q.device))
    tiles = min(cdiv(k_len, config.block_m), cdiv(q_len, config.block_m) + 1)  # that hold a query
    section = section_heads(heads, kv_heads, k_len, (dim + v_dim) * q.element_size())
    numbers = (
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *indices.stride()[:2],
        heads, kv_heads, indices.shape[1], q_len, k_len, tiles, section, scale * LOG2_E,
    )  # fmt: skip
    launch(
        sparse_prefill_kernel, (batch * heads * tiles,), (q, k, v, out, out if lse is None else lse, indices, counts), numbers,
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        STRIP=lse is not None, PRECISION=precision(q.dtype), **config.options,
    )  # fmt: skip
