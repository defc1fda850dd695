"""Engine `fused`: one Triton kernel gathers as it loads and stores rows in place; a second adds the strip."""

from __future__ import annotations

import torch

from tsa_compile.kernels.attend.tokens import hopper
from tsa_compile.kernels.attend.tokens.strip import add_strip, invert, rank_order
from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, precision, prefill_config, section_heads

Tensor = torch.Tensor


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    heavy_indices: Tensor,
    key_mask: Tensor | None,
    scale: float,
    strip_window: int,
    strip_sinks: int,
) -> Tensor:
    """`sparse_attention` (host.py) for CUDA tensors. Scratch: 4 bytes a position and list, and a row, with a strip."""
    batch, heads, q_len, _ = q.shape
    out = q.new_empty(batch, q_len, heads, v.shape[-1]).transpose(1, 2)
    strip = strip_window > 0 or strip_sinks > 0 or heavy_indices.shape[-1] > 0
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device) if strip else None
    launch_prefill(q, k, v, out, lse, indices, counts, scale)
    if strip:
        order = None if key_mask is None else rank_order(key_mask)
        slots = invert(indices, counts)
        add_strip(q, k, v, out, out, lse, slots, heavy_indices, order, scale, strip_window, strip_sinks)
    return out


def launch_prefill(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor | None, indices: Tensor, counts: Tensor, scale: float
) -> None:
    """Attention among the kept tokens into `out`; `lse` None: the other rows are zeroed."""
    if hopper.takes(q, k, v):
        return hopper.launch(q, k, v, out, lse, indices, counts, scale)
    import triton

    from tsa_compile.kernels.attend.tokens.device import sparse_prefill_kernel

    (batch, heads, q_len, dim), (kv_heads, k_len), v_dim = q.shape, k.shape[1:3], v.shape[-1]
    block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (dim, v_dim))
    config = prefill_config(max(block_d, block_dv), q.dtype, capability_of(q.device))
    tiles = min(triton.cdiv(k_len, config.block_m), triton.cdiv(q_len, config.block_m) + 1)  # that hold a query
    section = section_heads(heads, kv_heads, k_len, (dim + v_dim) * q.element_size())
    sparse_prefill_kernel[(batch * heads * tiles,)](
        q, k, v, out, out if lse is None else lse, indices, counts,
        *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *indices.stride()[:2],
        heads, kv_heads, indices.shape[1], q_len, k_len, tiles, section, scale * LOG2_E,
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        STRIP=lse is not None, PRECISION=precision(q.dtype), **config.options,
    )  # fmt: skip
