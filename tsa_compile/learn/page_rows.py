"""The pages that decode steps of many rows read, chosen for all rows at once: `tsa::page_scores` and `tsa::select_pages`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.select.top_pages.budget import budget

Tensor = torch.Tensor


def causal(there: Tensor, begin: int, end: int) -> Tensor:
    """bool `[B, 1, end - begin, L]`; a padding row sees itself, or its softmax would be of nothing.

    there: bool `[B, L]`, tokens that are no padding, as everywhere here.
    """
    row = torch.arange(begin, end, device=there.device)[:, None]
    key = torch.arange(there.shape[1], device=there.device)
    return ((key <= row) & there[:, None, None, :]) | (key == row)


def whole_pages(there: Tensor, first: int) -> Tensor:
    """bool `[B, 1, L - first, P]`: pages before each row's open one that hold a token; rows are those from `first` on."""
    length = there.shape[1]
    held = F.pad(there, (0, -length % PAGE)).unflatten(1, (-1, PAGE)).any(-1)  # [B, P]
    page = torch.arange(held.shape[1], device=there.device)
    end = torch.arange(first + 1, length + 1, device=there.device)[:, None]
    return ((page < end // PAGE) & held[:, None])[:, None]


def open_pages(there: Tensor, first: int) -> Tensor:
    """bool `[L - first, P]`: the page that a row's token is in, unless it fills it."""
    length = there.shape[1]
    page = torch.arange(-(-length // PAGE), device=there.device)
    end = torch.arange(first + 1, length + 1, device=there.device)[:, None]
    return (page == end // PAGE) & (end % PAGE > 0)


def last_pages(there: Tensor, first: int, recent: int) -> Tensor:
    """bool `[L - first, P]`: the last `recent` pages that start at or before a row, and all behind."""
    length = there.shape[1]
    page = torch.arange(-(-length // PAGE), device=there.device)
    return page > torch.arange(first, length, device=there.device)[:, None] // PAGE - recent


def keys_of(pages: Tensor, length: int) -> Tensor:
    """bool `[..., P]` -> `[..., length]`."""
    return pages.repeat_interleave(PAGE, -1)[..., :length]


def pages_by_means(
    q: Tensor, k: Tensor, there: Tensor, first: int, scale: float, keep: Sequence[float], table: Sequence[int], sinks: int,
    recent: int,
) -> Tensor:  # fmt: skip
    """bool `[B, Hk, L - first, P]`: what the steps of these rows read by their pages' mean keys.

    Args:
        q, k: `[B, H, L, D]` and `[B, Hk, L, D]`.
        keep: of each KV head, repeated as needed. table, sinks, recent: as of `tsa::select_pages`.
    """
    kv_heads, short = k.shape[1], -k.shape[2] % PAGE
    n = F.pad(there, (0, short)).unflatten(1, (-1, PAGE)).sum(-1)[:, None, None, None].clamp_min(1).float()
    sums = F.pad(k.float() * there[:, None, :, None], (0, 0, 0, short)).unflatten(2, (-1, PAGE)).sum(3)
    rows = q[:, :, first:].float().unflatten(1, (kv_heads, -1))
    real, opened = whole_pages(there, first), open_pages(there, first)
    logits = scale * (rows @ sums[:, :, None].mT) / n + n.log()
    shares = logits.masked_fill(~real[:, :, None], -torch.inf).softmax(-1).nan_to_num(0.0).mean(2)
    forced = real & ((real.cumsum(-1) <= sinks) | last_pages(there, first, recent))
    share = torch.tensor([share_bits(keep[g % len(keep)]) for g in range(kv_heads)], device=q.device)[:, None, None]
    more = opened.any(-1, keepdim=True).long()
    wanted = budget(real.sum(-1, keepdim=True) + more, share, table) - more
    ranked = shares.masked_fill(~real, -torch.inf).masked_fill(forced, torch.inf)
    rank = ranked.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (real & (rank < torch.maximum(wanted, forced.sum(-1, keepdim=True)))) | opened
