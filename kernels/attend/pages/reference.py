"""Attention over kept key blocks in plain PyTorch. The contract is docs/operators.md, `key_block_attention`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.results import empty_result, no_lse
from tsa_compile.kernels.common.row_blocks import KEYS, ROWS, own_keys, valid_keys, valid_range
from tsa_compile.kernels.common.view import length_of, rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def key_block_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, blocks: Tensor | None, block: int, start: Tensor | None,
    lengths: Tensor | None, key_mask: Tensor | None, scale: float, need_lse: bool, *, k_len: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`tsa::key_block_attention`, one row block after the other. Half inputs are computed in float32, float64 stays float64."""
    view = KvView(blocks, block, start, lengths)
    k, v = (rows_in_order(x, view)[:, :, : length_of(x, view, k_len)] for x in (k, v))
    (batch, heads, q_len, _), k_len = q.shape, k.shape[2]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = empty_result(q, v)
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    first, end = valid_range(batch, k_len, start, lengths, q.device)
    begin, own = own_keys(q_len, k_len, end)
    key = torch.arange(k_len, device=q.device)
    valid = valid_keys(k_len, first, end, key_mask)
    keys, values = (x.to(exact).repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    for r, from_position in enumerate(begin.tolist()):
        low, high = (max(0, min(x - (k_len - q_len), q_len)) for x in (from_position, from_position + ROWS))
        horizon = min(from_position + ROWS, k_len)  # of the row block: own keys end there, too
        kept = (bits[:, :, r, key // (KEYS * 64)] >> (key // KEYS % 64) & 1).bool() | _is_own(key, own[:, r])[:, None]
        seen = valid[:, None] & kept.repeat_interleave(heads // bits.shape[1], 1)
        hidden = key > torch.arange(low, high, device=q.device)[:, None] + k_len - q_len
        seen, hidden = seen[..., :horizon], hidden[:, :horizon]
        scores = (scale * q[:, :, low:high].to(exact)) @ keys[:, :, :horizon].mT
        scores = scores.masked_fill_(~seen[:, :, None], -torch.inf).masked_fill_(hidden, -torch.inf)
        total = scores.logsumexp(-1)
        weights = scores.sub_(total.clamp_min(torch.finfo(exact).min)[..., None]).exp_()  # a row without keys is zero
        out[:, :, low:high] = (weights @ values[:, :, :horizon]).to(out.dtype)
        lse[:, :, low:high] = total.float()
    return out, lse if need_lse else no_lse(q)


def _is_own(key: Tensor, own: Tensor) -> Tensor:
    """Whether each position is among the own keys that begin at `own` `[B]`: bool `[B, Lk]`."""
    return (key >= own[:, None]) & (key < own[:, None] + ROWS)
