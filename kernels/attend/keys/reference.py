"""Attention of all queries to the kept keys, in plain PyTorch. The contract is docs/operators.md, `key_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Tensor = torch.Tensor


def key_attention_reference(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, scale: float) -> Tensor:
    """`tsa::key_attention` for tensors on any device; it reads the counts, so it synchronises with the device.

    Half inputs are computed in float32, float64 stays float64.
    """
    batch, heads, q_len, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(batch, q_len, heads, v.shape[3]).transpose(1, 2)
    for b, n in enumerate(counts.tolist()):
        if n == 0 or q_len == 0:
            continue
        kept = indices[b, :, :n].long().repeat_interleave(heads // indices.shape[1], 0)
        k_b, v_b = (_gather(x[b].to(dtype), kept) for x in (k, v))
        out[b] = F.scaled_dot_product_attention(q[b].to(dtype), k_b, v_b, scale=scale).to(out.dtype)
    return out


def _gather(x: Tensor, kept: Tensor) -> Tensor:
    """Rows `kept` `[H, n]` of `x` `[Hk, L, D]`, head by head: `[H, n, D]`."""
    own = torch.arange(kept.shape[0], device=x.device) * x.shape[0] // kept.shape[0]
    return x[own[:, None], kept]
