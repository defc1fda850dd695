"""Token-sparse attention in plain PyTorch: the product's CPU path. The contract is docs/operators.md.

It removes the padding of each batch row, gathers the kept tokens, runs one causal attention on them and scatters the result;
the completion strip is computed in blocks of rows and merged with it through the log-sum-exp. Half inputs are computed in
float32, float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tsa_compile.kernels.attend.tokens.definition import members
from tsa_compile.kernels.checks import check_reference_engine
from tsa_compile.kernels.common.padding import attend_padding_reference
from tsa_compile.kernels.common.ranks import real_positions
from tsa_compile.kernels.common.results import empty_result, no_lse
from tsa_compile.kernels.types import Attended, Operands, Strip, Tokens

Tensor = torch.Tensor
_BLOCK_ROWS = 256
_HIDDEN = -1e30  # added to a score that takes no part; finite, since a row may have no other


class RowStrip(NamedTuple):
    """The keys that every row of one batch row reads beside the kept ones; tokens are counted without padding."""

    window: int
    sinks: int
    heavy_indices: Tensor  # [G, heavy], -1: no token

    @property
    def empty(self) -> bool:
        return not Strip(self.window, self.sinks).reads(self.heavy_indices)


def sparse_attention_reference(
    x: Operands, kept: Tokens, scale: float, strip: Strip, dense_below: int, engine: str = "reference", need_lse: bool = False
) -> Attended:
    """`tsa::sparse_attention` for tensors on any device; it reads the counts, so it synchronises with the device.

    Meaning: docs/operators.md. Source: arXiv 2602.03216, section 3.
    """
    check_reference_engine("tsa::sparse_attention", engine)

    def attend(b: int, q: Tensor, k: Tensor, v: Tensor, own: Tensor | None, strip: RowStrip) -> tuple[Tensor, Tensor | None]:
        return _attend_row(q, k, v, own, strip, scale, need_lse)

    return by_row(x, kept, strip, scale, x.k.shape[2] <= dense_below, need_lse, attend)


def by_row(
    x: Operands, kept: Tokens, strip: Strip, scale: float, everything: bool, need_lse: bool,
    attend: Callable[..., tuple[Tensor, Tensor | None]],
) -> Attended:  # fmt: skip
    """Calls `attend(b, q [H, m, D], k [Hk, L, D], v [Hk, L, Dv], kept [G, n] or None if everything, strip)` for each batch row
    without its padding, in float32 or float64, and puts its results [H, m, Dv] and [H, m] together. Rows of padding are dense."""
    (batch, _, q_len, _), k_len, device = x.q.shape, x.k.shape[2], x.q.device
    dtype = torch.float64 if x.q.dtype == torch.float64 else torch.float32
    out = empty_result(x.q, x.v).zero_()
    lse = torch.full(x.q.shape[:3], -torch.inf, dtype=torch.float32, device=device) if need_lse else no_lse(x.q)
    counts = kept.counts.tolist()
    for b in range(batch):
        own = None if everything else kept.indices[b, :, : counts[b]].long()
        heavy = kept.heavy_indices[b].long()
        q, k, v = x.q[b].to(dtype), x.k[b].to(dtype), x.v[b].to(dtype)
        rows: Any = slice(None)
        if x.view.ranks is not None:
            real, rank = real_positions(x.view, b, k_len, device), x.view.ranks[b].long() - 1
            rows = real[real >= k_len - q_len] - (k_len - q_len)
            own = None if own is None else rank[own]
            heavy = torch.where(heavy >= 0, rank[heavy.clamp(min=0)], -1)
            q, k, v = q[:, rows], k[:, real], v[:, real]
        if q.shape[1] == 0:
            continue
        part, part_lse = attend(b, q, k, v, own, RowStrip(*strip, heavy))
        out[b][:, rows] = part.to(out.dtype)
        if part_lse is not None and need_lse:
            lse[b][:, rows] = part_lse.float()
    attend_padding_reference(x, Attended(out, lse), scale)
    return Attended(out, lse)


def _attend_row(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor | None, strip: RowStrip, scale: float, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """One batch row without padding. q [H, Lq, D], k [Hk, Lk, D], kept [G, n] or None for all. -> [H, Lq, Dv], [H, Lq]."""
    groups = q.shape[0] // k.shape[0]
    if kept is None or kept.shape[1] == k.shape[1]:
        q_groups = q.unflatten(0, (-1, groups))
        out, lse = _causal(q_groups, k[:, None], v[:, None], scale, need_lse)
        return out.flatten(0, 1), None if lse is None else lse.flatten(0, 1)
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    lse = q.new_full(q.shape[:2], -torch.inf)
    _attend_kept(q, k, v, kept, scale, out, lse, need_lse or not strip.empty)
    if not strip.empty:
        merge_strip(q, k, v, kept, strip, scale, out, lse)
    return out, lse


def _attend_kept(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, scale: float, out: Tensor, lse: Tensor, need_lse: bool) -> None:
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
    if m == n and not need_lse:
        k, v = (x.expand(*q.shape[:2], *x.shape[2:]) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale), None
    if m == n:
        return _attend(q, k, v, scale, None)
    parts = []
    for first in range(0, m, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, m)
        end = n - m + last
        hidden = q.new_full((last - first, end), _HIDDEN).triu(end - (last - first) + 1)
        parts.append(_attend(q[..., first:last, :], k[..., :end, :], v[..., :end, :], scale, hidden))
    return torch.cat([out for out, _ in parts], -2), torch.cat([lse for _, lse in parts], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + bias) v and its log-sum-exp. Shapes as in `_causal`; without a bias: causal, m == n."""
    k, v = (x.expand(*q.shape[:2], *x.shape[2:]) for x in (k, v))
    if q.device.type == "cpu":
        # What F.scaled_dot_product_attention runs on CPU, called directly because only so does it return the
        # log-sum-exp. It wants one head dim; zero columns change nothing.
        v_dim, dim = v.shape[-1], max(q.shape[-1], v.shape[-1])
        q, k, v = (F.pad(x, (0, dim - x.shape[-1])) if x.shape[-1] < dim else x for x in (q, k, v))
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        bias = None if bias is None else bias.expand(*q.shape[:2], *bias.shape[-2:])
        out, lse = flash(q, k, v, 0.0, bias is None, attn_mask=bias, scale=scale)
        return out[..., :v_dim], lse
    if bias is None:
        bias = q.new_full((q.shape[-2], q.shape[-2]), _HIDDEN).triu(1)
    scores = q @ k.mT * scale + bias
    lse = scores.logsumexp(-1, keepdim=True)
    return (scores - lse).exp() @ v, lse.squeeze(-1)


def merge_strip(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, strip: RowStrip, scale: float, out: Tensor, lse: Tensor) -> None:
    """Adds the strip to out [H, Lq, Dv], whose softmax over the kept keys has the log-sum-exp lse [H, Lq].

    One more feature, `selected(i)` in q and `_HIDDEN * kept(j)` in k, takes the kept keys out of the selected rows.
    """
    lists, (q_len, k_len), device = kept.shape[0], (q.shape[1], k.shape[1]), q.device
    member = members(kept, k_len, lists).to(q.dtype)[:, None, :, None]
    kv_head = torch.arange(lists, device=device)[:, None] * k.shape[0] // lists
    far, far_hidden = _far_keys(strip, k_len)
    q_lists = q.unflatten(0, (lists, -1))
    q_lists = torch.cat([q_lists, member[:, :, k_len - q_len :].expand(*q_lists.shape[:3], 1)], -1)
    for first in range(0, q_len, _BLOCK_ROWS):
        rows = slice(first, min(first + _BLOCK_ROWS, q_len))
        at = torch.arange(rows.start, rows.stop, device=device)[:, None] + (k_len - q_len)
        near = torch.arange(max(int(at[0]) - strip.window + 1, 0), int(at[-1]) + 1, device=device)
        columns = torch.cat([far, near.expand(lists, -1)], 1)
        near_hidden = (near > at) | (near <= at - strip.window)
        hidden = far_hidden[:, None] | (far[:, None] > at - strip.window)
        hidden = torch.cat([hidden, near_hidden.expand(lists, -1, -1)], -1)
        bias = torch.where(hidden, _HIDDEN, 0.0).to(q.dtype)[:, None]
        kept_column = member[:, 0, :, 0].gather(1, columns)[..., None] * (_HIDDEN / scale)
        k_strip = torch.cat([k[kv_head, columns], kept_column], -1)[:, None]
        part, part_lse = _attend(q_lists[:, :, rows], k_strip, v[kv_head, columns][:, None], scale, bias)
        _merge(out[:, rows], lse[:, rows], part.flatten(0, 1), part_lse.flatten(0, 1))


def _merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Adds a second part of one softmax to `out` and `lse` in place; lse -inf, part_lse <= _HIDDEN / 2: a part without keys."""
    part_lse = part_lse.masked_fill(part_lse <= _HIDDEN / 2, -torch.inf)
    out.lerp_(part, torch.sigmoid(part_lse - lse).nan_to_num(0.0)[..., None])  # nan: neither part has a key
    lse.copy_(torch.logaddexp(lse, part_lse))


def _far_keys(strip: RowStrip, k_len: int) -> tuple[Tensor, Tensor]:
    """The sinks and the heavy tokens, [G, c], and which of those columns hold no token or one that came before."""
    sinks = torch.arange(min(strip.sinks, k_len), device=strip.heavy_indices.device)
    sinks = sinks.expand(strip.heavy_indices.shape[0], -1)
    hidden = torch.cat([torch.zeros_like(sinks, dtype=torch.bool), strip.heavy_indices < strip.sinks], 1)
    return torch.cat([sinks, strip.heavy_indices.clamp(min=0)], 1), hidden
