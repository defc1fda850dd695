"""Keys before rotation, projected as rows are appended. The contract is docs/operators.md, `append_projected`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.filled_pages import filled_pages, real_rows, write
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.rotation import before_rotation
from tsa_compile.kernels.types import IDENTITY

Tensor = torch.Tensor


def append_projected_reference(
    index: Tensor,
    positions: Tensor,
    counts: Tensor,
    query: Tensor,
    key: Tensor,
    frequencies: Tensor,
    k: Tensor,
    placed: Tensor,
    begin: Tensor,
    end: Tensor,
    key_mask: Tensor | None,
    new: int,
    heads: Sequence[int],
    interleaved: bool,
    factor: float,
) -> None:
    """`tsa::append_projected` on any device, in float32, float64 for a float64 cache; it reads lengths on the host."""
    if k.numel() == 0:
        return
    low, high = int(begin.min()), int(end.max())
    j = torch.arange(low, high, device=k.device)
    fresh = (j >= begin[:, None]) & (j < end[:, None])
    own = positions[:, 0, low:high]
    if placed.shape[1]:
        at = (j - begin[:, None]).clamp(0, placed.shape[1] - 1)
        own[fresh] = placed.expand(k.shape[0], -1).gather(1, at)[fresh].to(torch.int32)
    rows = torch.where(fresh[:, None, :, None], k[:, :, low:high], 0)[:, list(heads)]
    before = before_rotation(rows, own[:, None], frequencies, interleaved, factor)
    kept = index[:, :, low:high]
    kept.copy_(torch.where(fresh[:, None, :, None], (before @ key.to(before.dtype).mT).to(index.dtype), kept))
    pages = high // PAGE  # that are full
    number = real_rows(end, None, key_mask, pages).sum(2, dtype=torch.int32)[:, None]
    write(counts, number, filled_pages(begin, end, pages), IDENTITY)
