"""How many pages a row reads, from how many it has. Exact in integers, so host, reference and kernel agree to the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tsa_compile.kernels.common.shares import share_bits, share_of

PAGES_OF_ENTRY = 125  # pages of context, 2,000 tokens, to an entry of a schedule (Sparrow, arXiv 2606.08446)


def budget(pages: Any, share: Any, table: Sequence[int] | torch.Tensor) -> Any:
    """ceil(share * pages) and the entry of the schedule for so many pages; of a number, or of an int64 tensor.

    Args:
        share: from `share_bits`; a number, or an int64 tensor.
        table: pages to read beside the share, by `pages // 125`; the last entry holds from there on. Numbers, or a tensor.
    """
    extra: Any = table[-1]
    if isinstance(pages, torch.Tensor):
        extra = torch.as_tensor(table, device=pages.device)[(pages // PAGES_OF_ENTRY).clamp(max=len(table) - 1)]
    elif isinstance(pages, int):
        extra = table[min(pages // PAGES_OF_ENTRY, len(table) - 1)]
    return share_of(pages, share) + extra


def list_capacity(pages: Any, keep: Sequence[float], table: Sequence[int], mass: float, forced: int) -> Any:
    """Entries that a list may need where rows have up to `pages` pages; a number or a symbol."""
    if mass > 0:
        return pages
    most = torch.sym_max(share_of(pages, share_bits(max(keep))) + max(table), forced)
    return torch.sym_min(most, pages)
