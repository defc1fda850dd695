"""Attention of all queries to the kept keys, in plain PyTorch. The contract is docs/operators.md, `key_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tsa_compile.kernels.common.results import empty_result, no_lse
from tsa_compile.kernels.types import Attended, Keys, Operands

Tensor = torch.Tensor


def key_attention_reference(x: Operands, kept: Keys, scale: float, need_lse: bool = False) -> Attended:
    """`tsa::key_attention` for tensors on any device; it reads the counts, so it synchronises with the device.

    Half inputs are computed in float32, float64 stays float64.
    """
    q, dtype = x.q, torch.float64 if x.q.dtype == torch.float64 else torch.float32
    out = empty_result(q, x.v).zero_()
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device) if need_lse else no_lse(q)
    for b, n in enumerate(kept.counts.tolist()):
        if n == 0 or q.shape[2] == 0:
            continue
        own = kept.indices[b, :, :n].long().repeat_interleave(q.shape[1] // kept.indices.shape[1], 0)
        q_b, (k_b, v_b) = q[b].to(dtype), (_gather(t[b].to(dtype), own) for t in (x.k, x.v))
        out[b] = F.scaled_dot_product_attention(q_b, k_b, v_b, scale=scale).to(out.dtype)
        if need_lse:
            lse[b] = (q_b @ k_b.mT * scale).logsumexp(-1)
    return Attended(out, lse)


def _gather(x: Tensor, kept: Tensor) -> Tensor:
    """Rows `kept` `[H, n]` of `x` `[Hk, L, D]`, head by head: `[H, n, D]`."""
    own = torch.arange(kept.shape[0], device=x.device) * x.shape[0] // kept.shape[0]
    return x[own[:, None], kept]
