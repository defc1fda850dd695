"""Logits of pages by projected queries and keys. The contract is docs/operators.md, `projected_scores`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tsa_compile.kernels.common.pages import CHUNK, PAGE, pages_of
from tsa_compile.kernels.common.rotation import before_rotation
from tsa_compile.kernels.common.view import row_range
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor


def projected_scores_reference(
    q: Tensor,
    index: Tensor,
    positions: Tensor,
    query: Tensor,
    frequencies: Tensor,
    start: Tensor | None,
    lengths: Tensor | None,
    key_mask: Tensor | None,
    heads: Sequence[int],
    interleaved: bool,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """`tsa::projected_scores` on any device: (logits `[B, lists, 1, P]`, parts `[B, lists, 1, ceil(P / 64)]`)."""
    capacity, batch = index.shape[2], q.shape[0]
    first, end = row_range(capacity, batch, KvView(None, 1, start, lengths), q.device)
    own = positions[:, 0].gather(1, (end[:, None] - 1).clamp_min(0))
    before = before_rotation(q[:, list(heads)], own[:, None], frequencies, interleaved, factor)
    projected = torch.einsum("bhld,hrd->bhlr", before, query.to(before.dtype))
    j = torch.arange(capacity, device=q.device)
    there = (j >= first[:, None]) & (j < end[:, None] // PAGE * PAGE)
    if key_mask is not None:
        there = there & key_mask
    there = there[:, None, None]
    logits = projected @ torch.where(there.mT, index, 0).to(before.dtype).mT
    logits = logits.masked_fill(~there | ~logits.isfinite(), -torch.inf)
    of_pages = F.pad(logits, (0, -capacity % PAGE), value=-torch.inf).unflatten(-1, (pages_of(capacity), PAGE)).logsumexp(-1)
    padded = F.pad(of_pages, (0, -of_pages.shape[-1] % CHUNK), value=-torch.inf)
    return of_pages.float(), padded.unflatten(-1, (-1, CHUNK)).logsumexp(-1).float()
