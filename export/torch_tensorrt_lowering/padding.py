"""Query rows whose own key is hidden, in core operators: dense attention to the real keys before them (docs/operators.md).

Only as many rows are computed as a batch row has at most, so padding on the left costs one row.
"""

from __future__ import annotations

import torch

from tsa_compile.export.torch_tensorrt_lowering.kept import kept_size
from tsa_compile.export.torch_tensorrt_lowering.rows import HIDDEN, Rows, compact, running_sum, take

Tensor = torch.Tensor


def attend_padding(rows: Rows, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor) -> Tensor:
    """`out` `[B, H, Lq, Dv]` with its rows of padding; those without a key before them stay as they are."""
    if rows.real is None or rows.real_query is None:
        return out
    member = ~rows.real_query & (rows.query_rank >= 0)  # [B, Lq]
    size = kept_size(member.long().sum(1), rows.q_len)
    column = torch.arange(rows.q_len, device=q.device)
    listed = compact(member[:, None], column[None, None], rows.q_len, 1)
    at = listed.index_select(2, torch.arange(size, device=q.device)).clamp(min=0)  # [B, 1, size]
    seen = rows.real[:, None] & (rows.column < (at + rows.offset)[:, 0, :, None])  # [B, size, Lk]
    grouped = take(q, at, rows.heads).unflatten(1, (rows.kv_heads, -1))
    scores = (grouped @ k[:, :, None].transpose(3, 4)).float() * scale
    weights = torch.where(seen[:, None, None], scores, HIDDEN).softmax(-1)
    dense = (weights.to(v.dtype) @ v[:, :, None]).flatten(1, 2)
    place = (running_sum(member) - 1).clamp(min=0)
    return torch.where(member[:, None, :, None], take(dense, place[:, None], rows.heads).to(out.dtype), out)
