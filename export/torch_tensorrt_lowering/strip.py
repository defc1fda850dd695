"""The completion strip in core operators: every row reads its local window, the sinks and its head's heaviest tokens.

Rows are taken in blocks of `strip_window`, so each block reads two blocks of keys: memory is linear in the length. The strip is
merged with the attention among the kept tokens through their log-sum-exps; keys in both parts count once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tsa_compile.export.torch_tensorrt_lowering.kept import Attended, Kept
from tsa_compile.export.torch_tensorrt_lowering.rows import HIDDEN, Rows, Size, look_up, take
from tsa_compile.kernels.types import Strip

Tensor = torch.Tensor


class _Blocks(NamedTuple):
    """Query rows in `number` blocks of `block` rows; row t is the query of rank first_query + t.

    rank: int64 `[b, blocks, block]`; q: `[B, H, blocks, block, D]`; selected: bool `[B, H, blocks, block, 1]`; row: its row in
    Attended, `[B, H, blocks, block]`.
    """

    block: int
    number: Size
    rank: Tensor
    q: Tensor
    selected: Tensor
    row: Tensor


class _Part(NamedTuple):
    """Scores float32 `[B, H, blocks, block, n]`, HIDDEN where a key is not read, and the values that their weights multiply."""

    scores: Tensor
    values: Tensor


def complete(
    rows: Rows, kept: Kept, attended: Attended, qkv: tuple[Tensor, Tensor, Tensor], heavy: Tensor, strip: Strip, scale: float
) -> Tensor:
    """float32 `[B, H, Lq, Dv]`: the strip for every row, one softmax with the kept tokens for rows that are kept.

    heavy: int64 `[B, H, heavy]`, ranks of the heaviest tokens, -1: none.
    """
    q, k, v = qkv
    blocks = _in_blocks(rows, kept, attended, q, max(strip.window, 1))
    near = _near(rows, kept, blocks, k, v, strip, scale)
    far = _far(rows, kept, blocks, k, v, heavy, strip, scale)
    scores = torch.cat([near.scores, far.scores], 4)  # in one piece: TensorRT-RTX 1.6 cannot build maxima of both, compared
    top = scores.amax(4, keepdim=True)
    weights = torch.where(scores <= HIDDEN / 2, 0.0, (scores - top).exp())
    total = weights.sum(4, keepdim=True)
    local, distant = weights.to(v.dtype).split([2 * blocks.block, far.values.shape[3]], 4)
    local_out = (local.unflatten(1, (rows.kv_heads, -1)) @ near.values).float().flatten(1, 2)
    strip_out = local_out + (distant @ far.values).float()
    return _in_order(rows, _merge(rows, blocks, attended, top, total, strip_out).flatten(2, 3))


def _in_blocks(rows: Rows, kept: Kept, attended: Attended, q: Tensor, block: int) -> _Blocks:
    number = (rows.q_len + block - 1) // block + 1  # two at least: a size that may be 1 would be asked for its value
    step = torch.arange(number, device=q.device)[:, None] * block + torch.arange(block, device=q.device)
    rank = rows.first_query[..., None] + step
    selected, row = attended.row_of(rows, kept, rank)
    return _Blocks(block, number, rank, rows.query_rows(q, rank[:, None]), selected, row)


def _near(rows: Rows, kept: Kept, blocks: _Blocks, k: Tensor, v: Tensor, strip: Strip, scale: float) -> _Part:
    """The local window; values `[B, Hk, 1, blocks, 2 * block, Dv]`."""
    block = blocks.block
    step = torch.arange(2 * block, device=k.device) - block
    rank = rows.first_query[..., None] + torch.arange(blocks.number, device=k.device)[:, None] * block + step
    at = rows.position(rank[:, None])  # [b, 1, blocks, 2 * block]
    keys, values = (take(x, at, rows.kv_heads)[:, :, None] for x in (k, v))
    q = blocks.q.unflatten(1, (rows.kv_heads, -1))
    scores = ((q @ keys.transpose(4, 5)).float() * scale).flatten(1, 2)
    i = torch.arange(block, device=k.device)[:, None]
    local = (step <= i) & (step > i - strip.window)  # [block, 2 * block]
    exists = (rank >= 0)[:, None, :, None]
    member = (look_up(kept.slots, rows.clip(rank)[:, None]) >= 0)[:, :, :, None]
    read = local & exists & ~(blocks.selected & member)
    return _Part(torch.where(read, scores, HIDDEN), values)


def _far(rows: Rows, kept: Kept, blocks: _Blocks, k: Tensor, v: Tensor, heavy: Tensor, strip: Strip, scale: float) -> _Part:
    """The sinks and the heaviest tokens, of which a sink is read as a sink; values `[B, H, 1, sinks + heavy, Dv]`."""
    sinks = torch.arange(max(strip.sinks, 1), device=k.device) + torch.zeros_like(kept.slots[:, :, :1])
    used = torch.cat([(sinks < strip.sinks), heavy >= strip.sinks], 2)[:, :, None, None]
    rank = torch.cat([sinks, heavy], 2).clamp(min=0)
    member = (look_up(kept.slots, rows.clip(rank)) >= 0)[:, :, None, None]
    at = rows.position(rank)
    keys, values = (take(x, at, rows.heads)[:, :, None] for x in (k, v))
    scores = (blocks.q @ keys.transpose(3, 4)).float() * scale
    behind = (blocks.rank - strip.window)[:, None, ..., None]
    read = (rank[:, :, None, None] <= behind) & used & ~(blocks.selected & member)
    return _Part(torch.where(read, scores, HIDDEN), values)


def _merge(rows: Rows, blocks: _Blocks, attended: Attended, top: Tensor, total: Tensor, strip_out: Tensor) -> Tensor:
    """One softmax over both parts; float32 `[B, H, blocks, block, Dv]`. A row without any key is zero."""
    assert attended.lse is not None
    out, lse = (take(x, blocks.row, rows.heads).float() for x in (attended.out, attended.lse))
    lse = torch.where(blocks.selected, lse, HIDDEN)
    highest = top.maximum(lse)
    kept_share = torch.where(blocks.selected, (lse - highest).exp(), 0.0)
    strip_share = (top - highest).exp()
    total = total * strip_share + kept_share
    return (strip_out * strip_share + out * kept_share) / torch.where(total > 0, total, 1.0)


def _in_order(rows: Rows, out: Tensor) -> Tensor:
    """Rows by rank -> by query position; padding gets zero."""
    if rows.real_query is None:
        return out.index_select(2, torch.arange(rows.q_len, device=out.device))
    last = torch.arange(rows.q_len, device=out.device)[-1:]
    at = (rows.query_rank - rows.first_query).clamp(min=0).minimum(last)
    return torch.where(rows.real_query[:, None, :, None], take(out, at[:, None], rows.heads), 0.0)
