"""The definition of token-sparse attention, docs/operators.md: one softmax over an explicit mask. All is tested against it."""

from __future__ import annotations

import torch

Tensor = torch.Tensor
_BLOCK_ROWS = 256


def sparse_attention_oracle(
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
    dense_below: int,
) -> Tensor:
    """The definition, row by row, in blocks of query rows. For tests."""
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
    for first in range(0, q.shape[2], _BLOCK_ROWS):
        rows = torch.arange(first, min(first + _BLOCK_ROWS, q.shape[2]), device=q.device)
        strip = (strip_window, strip_sinks)
        out[:, :, rows] = sparse_attention_rows(q, k, v, indices, counts, heavy_indices, key_mask, scale, *strip, rows).to(
            q.dtype
        )
    return out


def sparse_attention_rows(
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
    rows: Tensor,
) -> Tensor:
    """The definition for the queries `rows` (int64 `[n]`) alone: one softmax over an explicit mask `allowed[h, i, j]`.

    Returns:
        `[B, H, n, Dv]` in float64 if q is float64, else in float32.
    """
    (batch, heads, q_len, _), (kv_heads, k_len) = q.shape, k.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(batch, heads, rows.shape[0], v.shape[-1], dtype=dtype)
    for b in range(batch):
        k_b = k[b].to(dtype).repeat_interleave(heads // kv_heads, 0)
        v_b = v[b].to(dtype).repeat_interleave(heads // kv_heads, 0)
        real = torch.ones(k_len, dtype=torch.bool, device=q.device) if key_mask is None else key_mask[b]
        kept = members(indices[b, :, : int(counts[b])], k_len, heads)
        heavy = members(heavy_indices[b], k_len, heads)
        allowed = allowed_keys(rows + (k_len - q_len), real, kept, heavy, strip_window, strip_sinks)
        scores = (q[b][:, rows].to(dtype) @ k_b.mT * scale).masked_fill(~allowed, -torch.inf)
        out[b] = scores.softmax(-1).nan_to_num(0.0) @ v_b
    return out


def members(indices: Tensor, k_len: int, heads: int) -> Tensor:
    """[G, n] token lists, -1 ignored -> [H, k_len] bool."""
    member = torch.zeros(indices.shape[0], k_len + 1, dtype=torch.bool, device=indices.device)
    member.scatter_(1, torch.where(indices >= 0, indices, k_len).long(), True)
    return member[:, :k_len].repeat_interleave(heads // indices.shape[0], 0)


def allowed_keys(at: Tensor, real: Tensor, kept: Tensor, heavy: Tensor, window: int, sinks: int) -> Tensor:
    """[H, rows, k_len]: which keys the queries at positions `at` read (docs/operators.md, `sparse_attention`)."""
    position, rank = torch.arange(real.shape[0], device=at.device), real.cumsum(0) - 1
    local = (rank[None, :] > rank[at][:, None] - window) & (rank[None, :] <= rank[at][:, None])
    strip = (local | (rank < sinks)[None, :])[None] | heavy[:, None, :]
    selected = kept[:, at][:, :, None] & kept[:, None, :]
    causal = position[None, :] <= at[:, None]
    return (strip | selected | ~real[at][:, None]) & causal & real[None, :]
