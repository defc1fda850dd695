"""Query rows whose own key is hidden: dense attention to the real keys before them, as the model has it.

A selection is made of real tokens, so the engines of token selection leave these rows zero; this adds them. Cost: rows of padding
times the keys before them, so nothing for padding on the left.
"""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.launcher import launch
from tsa_compile.kernels.common.ranks import real_positions
from tsa_compile.kernels.common.sizes import cdiv, next_power_of_2
from tsa_compile.kernels.types import Attended, Operands

Tensor = torch.Tensor
_BLOCK_ROWS = 256


def attend_padding_reference(x: Operands, result: Attended, scale: float) -> None:
    """Writes the rows of padding of `result` in place, out and log-sum-exp, in plain PyTorch; it waits for the device.

    Args:
        x: operands, any dtype and device; without padding nothing happens.
        result: out `[B, H, Lq, Dv]` and lse `[B, H, Lq]` or `[0]`; rows without a key before them stay as they are.
        scale: factor of the scores.
    """
    if x.view.ranks is None:
        return
    q_len, k_len = x.q.shape[2], x.k.shape[2]
    order, ranks = x.view.order
    for b in range(x.q.shape[0]):
        real = real_positions(x.view, b, k_len, x.q.device)
        hidden = order[b, real.shape[0] :].long()
        hidden = hidden[(hidden >= k_len - q_len) & (ranks[b][hidden] > 0)]
        for rows in hidden.split(_BLOCK_ROWS):
            before = ranks[b][rows].long()
            out, lse = _attend_first(x.q[b][:, rows - (k_len - q_len)], x.k[b][:, real], x.v[b][:, real], before, scale)
            result.out[b][:, rows - (k_len - q_len)] = out.to(result.out.dtype)
            if result.lse.numel():
                result.lse[b][:, rows - (k_len - q_len)] = lse.float()


def _attend_first(q: Tensor, k: Tensor, v: Tensor, counts: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Row i of q `[H, n, D]` reads the first `counts[i]` keys, at least one: (out `[H, n, Dv]`, lse `[H, n]`)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    k, v = (t.to(dtype).repeat_interleave(q.shape[0] // t.shape[0], 0) for t in (k, v))
    hidden = torch.arange(k.shape[1], device=q.device) >= counts[:, None]
    scores = (q.to(dtype) @ k.mT * scale).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def attend_padding(x: Operands, result: Attended, scale: float) -> None:
    """`attend_padding_reference` by Triton: nothing waits for the device, lengths are run-time values.

    Args:
        x: operands in fp16, bf16 or fp32, any strides.
        result, scale: as there; `scale` is positive.
    """
    if x.view.ranks is None or result.out.numel() == 0:
        return
    from tsa_compile.kernels.common.padding_device import padding_kernel
    from tsa_compile.kernels.common.tiles import LOG2_E, capability_of, precision, strip_config

    q, k, v, (out, lse), (order, ranks) = x.q, x.k, x.v, result, x.view.order
    (batch, heads, q_len, dim), (kv_heads, k_len), v_dim = q.shape, k.shape[1:3], v.shape[-1]
    block_d, block_dv = (max(16, next_power_of_2(d)) for d in (dim, v_dim))
    config = strip_config(max(block_d, block_dv), q.dtype, capability_of(q.device))
    launch(
        padding_kernel, (cdiv(q_len, config.block_m) * batch * heads,),
        (q, k, v, out, order, ranks, lse if lse.numel() else None),
        (*q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], heads, kv_heads, q_len, k_len, scale * LOG2_E),
        D=dim, DV=v_dim, BLOCK_D=block_d, BLOCK_DV=block_dv,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, PRECISION=precision(q.dtype),
        **config.options,
    )  # fmt: skip
