"""Attention of 1 to 16 query rows to a cache, in plain PyTorch. The contract is docs/operators.md, `decode_attention`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.pages import PAGE, listed_pages
from tsa_compile.kernels.common.results import score_dtype
from tsa_compile.kernels.common.view import key_range, rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
HIDDEN = -1e38  # a number at or below it, in a mask of numbers, hides the key: models write -inf or their dtype's lowest
MOST = 60000.0  # of a score that is left for others, which may be float16


def decode_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
    causal: bool = True,
    scores: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tsa::decode_attention` on any device. Half inputs are computed in float32, float64 stays float64."""
    visible = visible_keys(q, k, KvView(blocks, block, start, lengths), key_mask, window, causal)
    return attend_visible(q, k, v, KvView(blocks, block, start, lengths), visible[:, None], scale, mask, sinks, softcap, scores)


def page_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    mask: Tensor | None = None,
    sinks: Tensor | None = None,
    softcap: float = 0.0,
    causal: bool = True,
    windows: Sequence[int] | None = None,
    first_keys: int = 0,
) -> tuple[Tensor, Tensor]:
    """`tsa::page_attention` on any device: as `decode_attention_reference`, of the pages in each KV head's list."""
    view = KvView(blocks, block, start, lengths)
    visible = visible_keys(q, k, view, key_mask, 0, causal)
    if windows is not None:
        mask = _within(windows, first_keys, *key_range(k, view), q.shape[2], visible.shape[-1], mask)
    kept = listed_pages(indices, counts, -(-visible.shape[-1] // PAGE)).repeat_interleave(PAGE, -1)[..., : visible.shape[-1]]
    return attend_visible(q, k, v, view, visible[:, None] & kept[:, :, None], scale, mask, sinks, softcap, False)[:2]


def listed_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, counts: Tensor, since: Tensor, start: Tensor | None,
    lengths: Tensor | None, key_mask: Tensor | None, scale: float, mask: Tensor | None = None, sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tsa::listed_attention` on any device. Half inputs are computed in float32, float64 stays float64."""
    capacity = k.shape[2]
    valid = torch.arange(indices.shape[2], device=q.device) < counts[..., None]
    listed = torch.zeros(*counts.shape, capacity + 1, dtype=torch.bool, device=q.device)
    listed = listed.scatter(2, torch.where(valid, indices.long(), capacity), True)[..., :capacity]
    read = listed | (torch.arange(capacity, device=q.device) >= since[:, None, None])
    visible = visible_keys(q, k, KvView(None, 1, start, lengths), key_mask, 0, True)[:, None] & read[:, :, None]
    return attend_visible(q, k, v, KvView(None, 1, None, None), visible, scale, mask, sinks, 0.0, False)[:2]


def _within(
    windows: Sequence[int], first_keys: int, first: Tensor, end: Tensor, rows: int, capacity: int, mask: Tensor | None
) -> Tensor:
    """`mask` and what heads with a window do not see, as one mask `[B, H, rows, capacity]`."""
    width = torch.tensor(windows, device=end.device)[:, None, None]
    j = torch.arange(capacity, device=end.device)
    own = (end[:, None] - rows + torch.arange(rows, device=end.device))[:, None, :, None]
    seen = (width == 0) | (j > own - width) | (j < first[:, None, None, None] + first_keys)
    if mask is None or mask.dtype == torch.bool:
        return seen if mask is None else seen & mask
    return torch.where(seen, mask, -torch.inf)


def visible_keys(q: Tensor, k: Tensor, view: KvView, key_mask: Tensor | None, window: int, causal: bool) -> Tensor:
    """bool `[B, rows, capacity]`: the query rows are the last positions of each row of the batch."""
    first, end = (x[:, None, None] for x in key_range(k, view))
    capacity = k.shape[2] if view.blocks is None else view.blocks.shape[1] * view.block
    j = torch.arange(capacity, device=q.device)
    own = end - q.shape[2] + torch.arange(q.shape[2], device=q.device)[None, :, None]
    visible = (j >= first) & (j < end) & ((j <= own) if causal else (own == own))
    if window:
        visible = visible & (j > own - window)
    return visible if key_mask is None else visible & key_mask[:, None]


def attend_visible(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    view: KvView,
    visible: Tensor,
    scale: float,
    mask: Tensor | None,
    sinks: Tensor | None,
    softcap: float,
    scores: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention to the keys where `visible` (bool, broadcasts to `[B, Hk, rows, capacity]`): (out, lse, scores)."""
    (batch, heads, rows, _), kv_heads = q.shape, k.shape[1]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    seen = visible.any(2)[..., None]  # no other row of K or V is read: it may hold anything
    k, v = (rows_in_order(x, view).to(dtype).masked_fill(~seen, 0) for x in (k, v))
    grouped = q.to(dtype).unflatten(1, (kv_heads, heads // kv_heads))
    logits = (grouped @ k[:, :, None].transpose(-1, -2)) * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = ~visible[:, :, None].expand_as(logits)
    if mask is not None:
        mask = mask.expand(batch, heads, rows, logits.shape[-1]).unflatten(1, (kv_heads, -1))
        hidden = hidden | (~mask if mask.dtype == torch.bool else mask <= HIDDEN)
        logits = logits if mask.dtype == torch.bool else logits + mask.to(dtype)
    logits = logits.masked_fill(hidden, -torch.inf).flatten(1, 2)  # [B, H, rows, capacity]
    with_sinks = logits
    if sinks is not None:
        with_sinks = torch.cat([logits, sinks.to(dtype)[None, :, None, None].expand(batch, -1, rows, 1)], -1)
    lse = torch.logsumexp(with_sinks, -1)
    weights = torch.exp(logits - torch.where(lse == -torch.inf, 0.0, lse)[..., None])
    out = (weights.unflatten(1, (kv_heads, -1)) @ v[:, :, None]).flatten(1, 2)
    dumped = logits[:, :, [0, -1]] if scores else logits[:, :, :0]
    dumped = torch.where(dumped == -torch.inf, dumped, dumped.clamp(-MOST, MOST)).to(score_dtype(q.dtype))
    return _stored(out.to(q.dtype)), lse.float(), dumped


def _stored(out: Tensor) -> Tensor:
    """The same `[B, H, rows, Dv]`, stored as `[B, rows, H, Dv]`."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
