"""Token-sparse attention in plain PyTorch: the definition (`sparse_attention_oracle`) and the product's CPU path.

The contract is docs/operators.md. The CPU path removes the padding of each batch row, gathers the kept tokens, runs one
causal attention on them and scatters the result; the completion strip is computed in blocks of rows and merged with it
through the log-sum-exp. Half inputs are computed in float32, float64 stays float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
_BLOCK_ROWS = 256


class Strip(NamedTuple):
    """The keys that every row reads beside the kept ones; tokens are counted without padding."""

    window: int
    sinks: int
    heavy: Tensor  # [G, heavy], -1: no token

    @property
    def empty(self) -> bool:
        return self.window == 0 and self.sinks == 0 and self.heavy.shape[-1] == 0


def sparse_attention_reference(
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
    engine: str = "reference",
) -> Tensor:
    """`tsa::sparse_attention` for tensors on any device; it reads the counts, so it synchronises with the device.

    Shapes, dtypes and meaning: docs/operators.md. Source: arXiv 2602.03216, section 3.
    """
    (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(batch, q_len, heads, v.shape[-1]).transpose(1, 2)
    counts_host = counts.tolist()
    for b in range(batch):
        real = None if key_mask is None else key_mask[b].nonzero().squeeze(1)
        kept = None if k_len <= dense_below else indices[b, :, : counts_host[b]].long()
        heavy = heavy_indices[b].long()
        q_b, k_b, v_b = q[b].to(dtype), k[b].to(dtype), v[b].to(dtype)
        if real is None:
            out[b] = _attend_row(q_b, k_b, v_b, kept, Strip(strip_window, strip_sinks, heavy), scale)
            continue
        rank = key_mask[b].cumsum(0) - 1
        rows = real[real >= k_len - q_len] - (k_len - q_len)
        kept = None if kept is None else rank[kept]
        strip = Strip(strip_window, strip_sinks, torch.where(heavy >= 0, rank[heavy.clamp(min=0)], -1))
        out[b][:, rows] = _attend_row(q_b[:, rows], k_b[:, real], v_b[:, real], kept, strip, scale).to(out.dtype)
    return out


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
    engine: str = "reference",
) -> Tensor:
    """The definition: one softmax over an explicit mask `allowed[h, i, j]`, in blocks of query rows. For tests."""
    (batch, heads, q_len, _), (kv_heads, k_len) = q.shape, k.shape[1:3]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = q.new_zeros(batch, q_len, heads, v.shape[-1]).transpose(1, 2)
    for b in range(batch):
        k_b = k[b].to(dtype).repeat_interleave(heads // kv_heads, 0)
        v_b = v[b].to(dtype).repeat_interleave(heads // kv_heads, 0)
        real = torch.ones(k_len, dtype=torch.bool, device=q.device) if key_mask is None else key_mask[b]
        kept = _members(indices[b, :, : int(counts[b])], k_len, heads)
        heavy = _members(heavy_indices[b], k_len, heads)
        for first in range(0, q_len, _BLOCK_ROWS):
            rows = torch.arange(first, min(first + _BLOCK_ROWS, q_len), device=q.device)
            at = rows + (k_len - q_len)
            allowed = _allowed(at, real, kept, heavy, strip_window, strip_sinks)
            scores = (q[b][:, rows].to(dtype) @ k_b.mT * scale).masked_fill(~allowed, -torch.inf)
            out[b][:, rows] = (scores.softmax(-1).nan_to_num(0.0) @ v_b).to(out.dtype)
    return out


def _members(indices: Tensor, k_len: int, heads: int) -> Tensor:
    """[G, n] token lists, -1 ignored -> [H, k_len] bool."""
    member = torch.zeros(indices.shape[0], k_len + 1, dtype=torch.bool, device=indices.device)
    member.scatter_(1, torch.where(indices >= 0, indices, k_len).long(), True)
    return member[:, :k_len].repeat_interleave(heads // indices.shape[0], 0)


def _allowed(at: Tensor, real: Tensor, kept: Tensor, heavy: Tensor, window: int, sinks: int) -> Tensor:
    """[H, rows, k_len]: which keys the queries at positions `at` read (docs/operators.md, `sparse_attention`)."""
    position, rank = torch.arange(real.shape[0], device=at.device), real.cumsum(0) - 1
    local = (rank[None, :] > rank[at][:, None] - window) & (rank[None, :] <= rank[at][:, None])
    strip = (local | (rank < sinks)[None, :])[None] | heavy[:, None, :]
    selected = kept[:, at][:, :, None] & kept[:, None, :]
    causal = position[None, :] <= at[:, None]
    return (strip | selected) & causal & real[None, :] & real[at][:, None]


def _attend_row(q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, strip: Strip, scale: float) -> Tensor:
    """One batch row without padding. q [H, Lq, D], k [Hk, Lk, D], kept [G, n] or None for all. -> [H, Lq, Dv]."""
    groups = q.shape[0] // k.shape[0]
    everything = kept is None or kept.shape[1] == k.shape[1]
    if everything:
        q_groups = q.unflatten(0, (-1, groups))
        return _causal(q_groups, k[:, None], v[:, None], scale, need_lse=False)[0].flatten(0, 1)
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full(q.shape[:2], -torch.inf)
    _attend_kept(q, k, v, kept, scale, out, lse, need_lse=not strip.empty)
    if not strip.empty:
        _merge_strip(q, k, v, kept, strip, scale, out, lse)
    return out


def _attend_kept(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, out: Tensor, lse: Tensor, need_lse: bool
) -> None:
    """Causal attention among the kept tokens, written to their rows of out [H, Lq, Dv] and lse [H, Lq]."""
    (heads, q_len, _), (kv_heads, k_len, _) = q.shape, k.shape
    per_list = heads // kept.shape[0]  # heads that share a list
    kv_head = torch.arange(kept.shape[0], device=q.device) * kv_heads // kept.shape[0]
    rows = kept - (k_len - q_len)
    n_rows = int((rows >= 0).sum(1).max()) if kept.numel() else 0
    if n_rows == 0:
        return
    rows = rows[:, kept.shape[1] - n_rows :].repeat_interleave(per_list, 0)
    head = torch.arange(heads, device=q.device)[:, None]
    q_kept = q[head, rows.clamp(min=0)].unflatten(0, (-1, per_list))
    k_kept, v_kept = k[kv_head[:, None], kept][:, None], v[kv_head[:, None], kept][:, None]
    part, part_lse = _causal(q_kept, k_kept, v_kept, scale, need_lse)
    present = rows >= 0  # the lists of other heads may hold more tokens among the queries
    at = head.expand_as(rows)[present], rows[present]
    out[at] = part.flatten(0, 1)[present]
    if part_lse is not None:
        lse[at] = part_lse.flatten(0, 1)[present]


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float, need_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Causal attention, aligned at the end. q [G, g, m, D], k [G, 1, n, D], v [G, 1, n, Dv], m <= n."""
    m, n = q.shape[-2], k.shape[-2]
    k, v = (x.expand(*q.shape[:2], *x.shape[2:]) for x in (k, v))
    if m == n and not need_lse:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), None
    if m == n and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        # F.scaled_dot_product_attention runs this on CPU too, but does not return the log-sum-exp.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    parts = []
    for first in range(0, m, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, m)
        end = n - m + last
        scores = q[..., first:last, :] * scale @ k[..., :end, :].mT
        hidden = torch.ones(last - first, last - first, dtype=torch.bool, device=q.device).triu(1)
        scores[..., end - (last - first) :].masked_fill_(hidden, -torch.inf)
        parts.append(_softmax_times(scores, v[..., :end, :]))
    return torch.cat([out for out, _ in parts], -2), torch.cat([lse for _, lse in parts], -1)


def _softmax_times(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(scores) @ v and the log-sum-exp; a row without a key gives 0 and -inf. Overwrites `scores`."""
    weights, lse = _softmax(scores)
    return weights @ v, lse


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and log-sum-exp of the last dimension; a row without a key gives 0 and -inf. Overwrites `scores`."""
    lse = scores.logsumexp(-1, keepdim=True)
    return scores.sub_(lse.masked_fill(lse == -torch.inf, 0.0)).exp_(), lse.squeeze(-1)


def _merge_strip(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, strip: Strip, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Adds the strip to out [H, Lq, Dv], whose softmax over the kept keys has the log-sum-exp lse [H, Lq]."""
    (heads, q_len, _), (kv_heads, k_len, _) = q.shape, k.shape
    kept_here = _members(kept, k_len, heads)
    far, far_ok = _far_keys(strip, k_len)
    kv_head = torch.arange(far.shape[0], device=q.device)[:, None] * kv_heads // far.shape[0]
    k_far, v_far = k[kv_head, far], v[kv_head, far]
    far, far_ok = (x.repeat_interleave(heads // far.shape[0], 0) for x in (far, far_ok))
    for first in range(0, q_len, _BLOCK_ROWS):
        rows = slice(first, min(first + _BLOCK_ROWS, q_len))
        at = torch.arange(rows.start, rows.stop, device=q.device)[:, None] + (k_len - q_len)
        near = torch.arange(max(int(at[0]) - strip.window + 1, 0), int(at[-1]) + 1, device=q.device)
        selected = kept_here[:, at[:, 0], None]
        near_ok = (near <= at) & (near > at - strip.window) & ~(selected & kept_here[:, None, near])
        far_read = far_ok[:, None] & (far[:, None] <= at - strip.window) & ~(selected & kept_here.gather(1, far)[:, None])
        q_rows = q[:, rows] * scale
        scores = torch.cat([_grouped(q_rows, k_far.mT), _grouped(q_rows, k[:, near].mT)], -1)
        weights, part_lse = _softmax(scores.masked_fill_(~torch.cat([far_read, near_ok], -1), -torch.inf))
        part = _grouped(weights[..., : far.shape[1]], v_far) + _grouped(weights[..., far.shape[1] :], v[:, near])
        share = torch.sigmoid(part_lse - lse[:, rows]).nan_to_num(0.0)[..., None]  # nan: neither part has a key
        out[:, rows] = torch.lerp(out[:, rows], part, share)


def _far_keys(strip: Strip, k_len: int) -> tuple[Tensor, Tensor]:
    """The sinks and the heavy tokens that are none of them, [G, c], and which of those columns hold a token."""
    sinks = torch.arange(min(strip.sinks, k_len), device=strip.heavy.device).expand(strip.heavy.shape[0], -1)
    ok = torch.cat([torch.ones_like(sinks, dtype=torch.bool), strip.heavy >= strip.sinks], 1)
    return torch.cat([sinks, strip.heavy.clamp(min=0)], 1), ok


def _grouped(x: Tensor, y: Tensor) -> Tensor:
    """x [H, m, a] @ y [G, a, b], where H / G consecutive heads share y. -> [H, m, b]."""
    return (x.unflatten(0, (y.shape[0], -1)) @ y[:, None]).flatten(0, 1)
