"""Which pages a decode step reads, in plain PyTorch. The contract is docs/operators.md, `select_pages`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tsa_compile.kernels.common.pages import PAGE, page_view
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.common.view import row_range, rows_in_order
from tsa_compile.kernels.select.top_pages.budget import budget, list_capacity
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
UNIT = 2.0**40  # masses are counted in whole numbers of its inverse, so that their sum has no order


def select_pages_reference(
    logits: Tensor,
    parts: Tensor,
    counts: Tensor,
    blocks: Tensor | None,
    block: int,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    kv_heads: int,
    keep: Sequence[float],
    table: Sequence[int],
    mass: float,
    sinks: int,
    recent: int,
) -> tuple[Tensor, Tensor]:
    """`tsa::select_pages` on any device; it reads lengths on the host, so it synchronises with the device."""
    view = KvView(blocks, block, start, lengths)
    batch, pages = logits.shape[0], logits.shape[3]
    size = list_capacity(pages, keep, table, mass, sinks + recent)
    indices = torch.full((batch, kv_heads, size), -1, dtype=torch.int32, device=logits.device)
    number = torch.zeros(batch, kv_heads, dtype=torch.int32, device=logits.device)
    scores = page_shares(logits, parts, kv_heads)
    filled = rows_in_order(counts[..., None], page_view(view))[:, 0, :, 0]
    for b in range(batch):
        begin, end = (int(x[b]) for x in row_range(capacity, batch, view, logits.device))
        real = [p for p in range(end // PAGE) if filled[b, p] > 0]
        for g in range(kv_heads):
            rule = (share_bits(keep[g % len(keep)]), table, mass, sinks, recent)
            chosen = choose(scores[b, g].tolist(), real, begin, end, *rule)
            indices[b, g, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
            number[b, g] = len(chosen)
    return indices, number


def page_shares(logits: Tensor, parts: Tensor, kv_heads: int) -> Tensor:
    """Each page's softmax share over pages, mean over the query rows of a KV head: `[B, Hk, P]`."""
    lse = torch.logsumexp(parts.double(), -1, keepdim=True)
    shares = torch.exp(logits.double() - lse).nan_to_num(0.0, 0.0, 0.0)
    return shares.unflatten(1, (kv_heads, -1)).mean((2, 3))


def choose(
    scores: Sequence[float],
    real: list[int],
    begin: int,
    end: int,
    share: int,
    table: Sequence[int],
    mass: float,
    sinks: int,
    recent: int,
) -> list[int]:
    """The chosen pages of one list, ascending.

    Args:
        scores: by page. real: whole pages that hold a key, ascending. begin, end: positions of the keys.
        share, table, mass, sinks, recent: the rule.
    """
    open_page = [end // PAGE] if end % PAGE and end > begin else []
    last = (end - 1) // PAGE
    forced = {p for p in real if p in real[:sinks] or p > last - recent}
    others = sorted((p for p in real if p not in forced), key=lambda p: (-scores[p], p))
    if mass > 0:
        whole = {p: math.trunc(scores[p] * UNIT) for p in real}
        missing = math.ceil(sum(whole.values()) * mass) - sum(whole[p] for p in forced)
        wanted = 0
        while missing > 0:
            missing -= whole[others[wanted]]
            wanted += 1
    else:
        wanted = max(0, budget(len(real) + len(open_page), share, table) - len(forced) - len(open_page))
    return sorted([*forced, *others[:wanted]]) + open_page
