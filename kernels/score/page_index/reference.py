"""What each page may hold of the attention, by its mean key, in plain PyTorch. Contract: docs/operators.md, `page_scores`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.pages import CHUNK, PAGE, page_view, pages_of
from tsa_compile.kernels.common.view import row_range, rows_in_order
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def page_scores_reference(
    q: Tensor,
    sums: Tensor,
    counts: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`tsa::page_scores` on any device: (logits `[B, H, rows, P]`, parts `[B, H, rows, ceil(P / 64)]`)."""
    view = KvView(blocks, block, start, lengths)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, heads, kv_heads, pages = *q.shape[:2], sums.shape[1], pages_of(capacity)
    n = _resized(rows_in_order(counts[..., None], page_view(view)), pages)[:, :, None, None, :, 0].to(dtype)  # [B, 1, 1, 1, P]
    total = _resized(rows_in_order(sums, page_view(view)), pages).to(dtype)
    end = row_range(capacity, batch, view, q.device)[1]
    whole = torch.arange(pages, device=q.device) < end[:, None] // PAGE
    there = whole[:, None, None, None] & (n > 0)
    grouped = q.to(dtype).unflatten(1, (kv_heads, heads // kv_heads))
    logits = scale * (grouped @ total[:, :, None].transpose(-1, -2)) / n + torch.log(n)
    logits = logits.masked_fill(~there | ~logits.isfinite(), -torch.inf).flatten(1, 2)
    padded = torch.nn.functional.pad(logits, (0, -pages % CHUNK), value=-torch.inf)
    return logits.float(), torch.logsumexp(padded.unflatten(-1, (-1, CHUNK)), -1).float()


def _resized(index: Tensor, pages: int) -> Tensor:
    """`[B, n, p, D]` with `pages` entries; a last one that is not full has none in every index."""
    return torch.nn.functional.pad(index[:, :, :pages], (0, 0, 0, max(0, pages - index.shape[2])))
