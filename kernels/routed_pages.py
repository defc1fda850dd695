"""Which of its own pages each rank reads, so that all ranks together read what one process with every page would.

Holders score their own pages. A softmax over all pages needs their largest logit and the sum of their exponentials; the budget
needs the lowest page that is kept. That is found from the top by histograms of 2,048 bins, summed over ranks: the first says in
which bin the cut lies, the next divide that bin. What is summed over ranks is integers, so how pages are spread changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tsa_compile.kernels.common.group import check_agreement, gather, rank_and_size, total
from tsa_compile.kernels.common.pages import PAGE
from tsa_compile.kernels.common.shares import share_bits
from tsa_compile.kernels.common.view import row_range
from tsa_compile.kernels.select.top_pages.budget import budget
from tsa_compile.kernels.select.top_pages.host import constant
from tsa_compile.kernels.types import KvView

Tensor = torch.Tensor
UNIT = 2.0**40  # shares are summed in whole numbers of its inverse
BITS = 11  # of a digit: 2,048 bins
PAGE_BITS = 24  # a key is 31 bits of a share, then the page: five digits
FORCED = 0x40000000  # the bits of 2.0, above every share
NO_PAGE = float(1 << PAGE_BITS)


class RowFacts(NamedTuple):
    """What all ranks know of each batch row.

    Args:
        top: float64 `[B, H, rows]`, the largest logit of a whole page.
        sinks_end: int64 `[B]`, the page of the last sink; -1: there are none.
        last: int64 `[B]`, the row's last page.
        is_open: int64 `[B]`, 1 where the last page is not full.
        whole: int64 `[B]`, full pages that hold a key.
    """

    top: Tensor
    sinks_end: Tensor
    last: Tensor
    is_open: Tensor
    whole: Tensor


def routed_pages(
    q: Tensor,
    sums: Tensor,
    counts: Tensor,
    start: Tensor | None,
    lengths: Tensor | None,
    capacity: int,
    scale: float,
    keep: Sequence[float],
    table: Sequence[int],
    mass: float,
    sinks: int,
    recent: int,
    group: str,
) -> tuple[Tensor, Tensor]:
    """`tsa::routed_pages` on any device."""
    facts = {"batch rows": q.shape[0], "heads": q.shape[1], "query rows": q.shape[2], "KV heads": sums.shape[1]}
    facts |= {"sinks": sinks, "recent": recent, "budgets": len(keep) + len(table)}
    check_agreement("tsa::routed_pages", facts, q.device, group)
    rank, ranks = rank_and_size(group)
    view = KvView(None, 1, start, lengths)
    logits = torch.ops.tsa.page_scores(q, sums, counts, *view[:4], capacity, scale)[0].double()
    own = torch.arange(logits.shape[3], device=q.device)
    page = own * ranks + rank
    begin, end = row_range(capacity, q.shape[0], view, q.device)
    held = torch.nn.functional.pad(counts[:, 0], (0, max(0, len(own) - counts.shape[2])))[:, : len(own)] > 0
    real = (own < end[:, None] // PAGE) & held
    is_open = (end % PAGE > 0) & (end > begin)
    last = torch.where(end > begin, (end - 1) // PAGE * ranks + rank, -1)
    logits = logits.masked_fill(~real[:, None, None], -torch.inf)
    row = _exchange(logits, page, real, is_open, last, sinks, group)
    share = _shares(logits, row.top, sums.shape[1], group)
    forced = real & ((page <= row.sinks_end[:, None]) | (page > row.last[:, None] - recent))
    bits = torch.where(forced[:, None], FORCED, share.float().view(torch.int32).long())
    key = torch.where(real[:, None], (bits << PAGE_BITS) + ((1 << PAGE_BITS) - 1 - page), -1)
    if mass > 0:
        weight, wanted = (share * UNIT).long(), lambda mass_of_all: torch.ceil(mass_of_all.double() * mass).long()
    else:
        shares = constant(tuple(share_bits(x) for x in keep), torch.int64, q.device)
        extra = constant(tuple(table), torch.int64, q.device)
        number = budget((row.whole + row.is_open)[:, None], shares, extra) - row.is_open[:, None]
        weight, wanted = torch.ones_like(key), lambda _: number.expand(key.shape[:2])
    chosen = real[:, None] & (reaches(key, weight, wanted, group) | forced[:, None])
    chosen |= (is_open[:, None] & (own == end[:, None] // PAGE))[:, None]
    indices = torch.argsort((~chosen).int(), dim=-1, stable=True)
    return indices.int(), chosen.sum(-1, dtype=torch.int32)


def reaches(key: Tensor, weight: Tensor, wanted: Callable[[Tensor], Tensor], group: str) -> Tensor:
    """bool `[B, Hk, P]`: is the entry among the fewest with the largest keys that reach the wanted weight?

    Args:
        key: int64 `[B, Hk, P]` of 55 bits, no two alike on all ranks; -1: no entry.
        weight: int64 `[B, Hk, P]`.
        wanted: from the weight of all ranks' entries `[B, Hk]` to what is to be reached; all, where it is more.
        group: of the ranks.
    """
    prefix, missing = torch.zeros_like(key[..., 0]), torch.zeros_like(key[..., 0])
    empty = torch.zeros(*key.shape[:2], 1 << BITS, dtype=torch.int64, device=key.device)
    for shift in range(4 * BITS, -1, -BITS):
        inside = (key >= 0) & (key >> (shift + BITS) == prefix[..., None])
        digit = torch.where(inside, (key >> shift) & ((1 << BITS) - 1), 0)
        bins = total(empty.scatter_add(2, digit, torch.where(inside, weight, 0)), group)
        above = bins.flip(-1).cumsum(-1).flip(-1)  # the weight of a bin and those above it
        if shift == 4 * BITS:
            missing = torch.minimum(wanted(above[..., 0]), above[..., 0])
            nothing = missing <= 0
        at = ((above >= missing[..., None]).sum(-1, keepdim=True) - 1).clamp_min(0)
        here = bins.gather(-1, at)[..., 0]
        missing = missing - (above.gather(-1, at)[..., 0] - here)
        prefix = (prefix << BITS) + at[..., 0]
        if key.device.type == "cpu" and bool(((missing == here) | nothing).all()):  # all of the bin
            break
    return (key >= (prefix << shift)[..., None]) & ~nothing[..., None]


def _exchange(logits: Tensor, page: Tensor, real: Tensor, is_open: Tensor, last: Tensor, sinks: int, group: str) -> RowFacts:
    """One message of each rank: numbers that float64 holds exactly."""
    batch = logits.shape[0]
    first = torch.where(real, page.double(), NO_PAGE).sort(-1)[0][:, :sinks]
    first = torch.nn.functional.pad(first, (0, sinks - first.shape[1]), value=NO_PAGE)
    top = torch.nn.functional.pad(logits, (0, 1), value=-torch.inf).amax(-1).flatten(1)
    numbers = torch.stack([is_open.double(), last.double(), real.sum(-1).double()], 1)
    found = gather(torch.cat([top, first, numbers], 1), group)
    of_all = found[..., top.shape[1] : top.shape[1] + sinks].transpose(0, 1).reshape(batch, -1).sort(-1)[0][:, :sinks]
    known = torch.where(of_all < NO_PAGE, of_all, -1.0).long()
    sinks_end = torch.nn.functional.pad(known, (0, 1), value=-1).amax(-1)
    top = found[..., : top.shape[1]].amax(0).view(logits.shape[:3])
    opened, whole = (found[..., n].sum(0).long() for n in (-3, -1))
    return RowFacts(top, sinks_end, found[..., -2].amax(0).long(), opened, whole)


def _shares(logits: Tensor, top: Tensor, kv_heads: int, group: str) -> Tensor:
    """float64 `[B, Hk, P]`: the softmax over all ranks' pages, mean over the query rows and heads of a KV head."""
    part = torch.exp(logits - torch.where(top == -torch.inf, 0.0, top)[..., None])
    units = total(torch.trunc(part * UNIT).long().sum(-1), group).double() / UNIT
    return (part / units[..., None]).nan_to_num(0.0, 0.0, 0.0).unflatten(1, (kv_heads, -1)).mean((2, 3))
