"""Pages that a decode step does not read, by their means, in plain PyTorch. Contract: docs/operators.md, `complete_pages`."""

from __future__ import annotations

import torch

from tsa_compile.kernels.common.merge import merge_reference
from tsa_compile.kernels.common.pages import PAGE, listed_pages, page_view
from tsa_compile.kernels.common.view import row_range, rows_in_order
from tsa_compile.kernels.types import Attended, KvView

Tensor = torch.Tensor


def complete_pages_reference(
    out: Tensor,
    lse: Tensor,
    logits: Tensor,
    sums: Tensor,
    counts: Tensor,
    indices: Tensor,
    list_counts: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """`tsa::complete_pages` on any device. Half inputs are computed in float32, float64 stays float64."""
    view = KvView(blocks, block, start, lengths)
    dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    (batch, heads), kv_heads = out.shape[:2], sums.shape[1]
    n = rows_in_order(counts[..., None], page_view(view))[:, 0, :, 0]  # [B, P]
    total = rows_in_order(sums, page_view(view)).to(dtype)
    pages = min(n.shape[1], logits.shape[3])
    rest = torch.arange(pages, device=out.device) < (row_range(capacity, batch, view, out.device)[1] // PAGE)[:, None]
    rest = rest & (n[:, :pages] > 0)
    unread = rest[:, None] & ~listed_pages(indices, list_counts, pages)  # [B, Hk, P]
    unread = unread.repeat_interleave(heads // kv_heads, 1)[:, :, None]
    weights = logits[..., :pages].to(dtype).masked_fill(~unread, -torch.inf)
    means = torch.where(rest[:, None, :, None], total[:, :, :pages] / n[:, None, :pages, None].clamp_min(1), 0)
    part_lse = torch.logsumexp(weights, -1)
    shares = torch.exp(weights - torch.where(part_lse == -torch.inf, 0.0, part_lse)[..., None])
    part = shares @ means.repeat_interleave(heads // kv_heads, 1)
    return merge_reference(Attended(out, lse), Attended(part.to(dtype), part_lse))
