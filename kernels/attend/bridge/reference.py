"""Block-causal attention with bridges in plain PyTorch. The contract is docs/operators.md, `bridge_attention`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.results import empty_result, no_lse
from tsa_compile.kernels.common.row_blocks import ROWS, valid_keys, valid_range
from tsa_compile.kernels.common.view import length_of, rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def bridge_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor | None, block: int, start: Tensor | None, lengths: Tensor | None,
    key_mask: Tensor | None, scale: float, width: int, rows: int, sources: int, offset: int, need_lse: bool,
    k_len: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tsa::bridge_attention`, some rows after the other, of which only the keys that they read are looked at.

    Half inputs are computed in float32, float64 stays float64.
    """
    view = KvView(blocks, block, start, lengths)
    k, v = (rows_in_order(x, view)[:, :, : length_of(x, view, k_len)] for x in (k, v))
    (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = empty_result(q, v)
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    first, end = valid_range(batch, k_len, start, lengths, q.device)
    valid = valid_keys(k_len, first, end, key_mask)
    for low in range(0, q_len, ROWS):
        at = torch.arange(low, min(low + ROWS, q_len), device=q.device) + k_len - q_len
        lowest = first[:, None] + lowest_keys(at - first[:, None], width, rows, sources, offset)
        begin, limit = (int(lowest.min()) if batch else 0), int(at[-1]) + 1
        key = torch.arange(begin, limit, device=q.device)
        seen = (key <= at[:, None]) & (key >= lowest[..., None]) & valid[:, None, begin:limit]
        keys, values = (x[:, :, begin:limit].to(exact).repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
        scores = scale * q[:, :, low : low + ROWS].to(exact) @ keys.mT
        scores = scores.masked_fill(~seen[:, None], -torch.inf)
        total = scores.logsumexp(-1)
        weights = torch.where(total[..., None] == -torch.inf, 0, scores.softmax(-1))  # a row without keys is zero
        out[:, :, low : low + ROWS] = (weights @ values).to(out.dtype)
        lse[:, :, low : low + ROWS] = total.float()
    return out, lse if need_lse else no_lse(q)


def lowest_keys(position: Tensor, width: int, rows: int, sources: int, offset: int) -> Tensor:
    """The first position that rows at `position` read; positions count from the batch row's first key."""
    position = position.clamp(min=0)
    place = (position - offset) % width
    return (position - place - torch.where(place < rows, sources, 0)).clamp(min=0)
