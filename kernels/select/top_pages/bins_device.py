"""Which pages a decode step reads, on the GPU and without sorting: bins, radix search, stable compaction. Triton.

One program makes one list. It turns logits into shares, bins them, gathers the bin that has the cut, finds the cut there, and
writes the pages above it in ascending order. A share is at most 1: pages that are always read rank as 2, entries that are no
page as -1. As integers the bits of these floats keep their order.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.bins_device import BINS, from_top, kth_of_bin, score_bin
from tsa_compile.kernels.common.pages_device import PAGE, place_of_page
from tsa_compile.kernels.select.top_pages.shares_device import log_sums

ONE = tl.constexpr(1073741824)  # a share of 1, in the units of the budget
PAGES_OF_ENTRY = tl.constexpr(125)
UNIT = tl.constexpr(1099511627776.0)  # masses are whole numbers of its inverse: their sum has no order
ALWAYS = tl.constexpr(2.0)
NO_PAGE = tl.constexpr(-1.0)
LENGTHS = (
    "kv_heads", "queries", "capacity", "pages", "chunks", "most", "share", "entries", "mass_bits", "sinks", "recent",
    "counts_sb", "blocks_sb", "block_pages", "per_row",
)  # fmt: skip


@triton.jit
def shares(logits, page, whole, queries, pages, lse, QUERIES: tl.constexpr):
    """The mean share of the query rows in each of the pages `page`; what is not finite counts as 0."""
    query = tl.arange(0, QUERIES)
    ok = (query < queries)[:, None] & (page < whole)[None, :]
    logit = tl.load(logits + query[:, None] * pages + page[None, :], mask=ok, other=float("-inf"))
    share = tl.exp(logit - lse[:, None])
    share = tl.where((share >= 0.0) & (share <= 2.0), share, 0.0)
    return tl.minimum(tl.sum(share, 0) / queries, 1.0)


@triton.jit
def fixed(share):
    return (share * UNIT).to(tl.int64)


@triton.jit
def mass_above(scores, whole, bits, BLOCK: tl.constexpr):
    """(mass of the pages whose bits exceed `bits`, without those always read; how many these are)."""
    mass, number = tl.zeros([], tl.int64), tl.zeros([], tl.int32)
    for first in tl.range(0, whole, BLOCK):
        p = first + tl.arange(0, BLOCK)
        share = tl.load(scores + p, mask=p < whole, other=NO_PAGE)
        above = (share.to(tl.int32, bitcast=True) > bits) & (share < ALWAYS) & (share >= 0.0)
        mass += tl.sum(tl.where(above, fixed(share), 0))
        number += tl.sum(above.to(tl.int32))
    return mass, number


@triton.jit
def pages_for_mass(scores, whole, missing, BLOCK: tl.constexpr):
    """How many of the heaviest pages, beside those always read, hold the mass `missing`: bisection on the bits of the cut."""
    low, high = tl.full([], -1, tl.int32), tl.full([], 1065353216, tl.int32)  # low suffices, a share of 1 does not
    while high - low > 1:
        middle = low + (high - low) // 2
        mass, _ = mass_above(scores, whole, middle, BLOCK)
        low, high = tl.where(mass >= missing, middle, low), tl.where(mass >= missing, high, middle)
    mass, number = mass_above(scores, whole, high, BLOCK)
    each = fixed(high.to(tl.float32, bitcast=True))
    return tl.where(missing > 0, number + tl.cdiv(missing - mass, tl.maximum(each, 1)).to(tl.int32), 0)


@triton.jit
def wanted_by_budget(total, share, table, entries):
    """ceil(share * total) and the schedule's entry for so many pages."""
    entry = tl.load(table + tl.minimum(total // PAGES_OF_ENTRY, entries - 1))
    return ((total.to(tl.int64) * share + ONE - 1) // ONE).to(tl.int32) + entry


@triton.jit
def gather_pages(scores, whole, at, to, BLOCK: tl.constexpr):
    """The shares of bin `at`, to `to`, in their order."""
    found = tl.zeros([], tl.int32)
    for first in tl.range(0, whole, BLOCK):
        p = first + tl.arange(0, BLOCK)
        share = tl.load(scores + p, mask=p < whole, other=NO_PAGE)
        inside = ((score_bin(share.to(tl.int32, bitcast=True)) == at) & (share >= 0.0)).to(tl.int32)
        tl.store(to + found + tl.cumsum(inside, 0) - 1, share, mask=inside > 0)
        found += tl.sum(inside)


@triton.jit
def write_pages(scores, whole, cut, need, out, most, BLOCK: tl.constexpr):
    """Pages above the cut and the first `need` at it, ascending; returns how many."""
    above_seen, equal_seen = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for first in tl.range(0, whole, BLOCK):
        p = first + tl.arange(0, BLOCK)
        bits = tl.load(scores + p, mask=p < whole, other=NO_PAGE).to(tl.int32, bitcast=True)
        above, equal = ((bits > cut) & (bits >= 0)).to(tl.int32), ((bits == cut) & (bits >= 0)).to(tl.int32)
        both = tl.cumsum((above << 16) + equal, 0)  # a block has fewer than 2**15
        number_above, number_equal = above_seen + (both >> 16), equal_seen + (both & 0xFFFF)
        take = (above > 0) | ((equal > 0) & (number_equal <= need))
        place = number_above + tl.minimum(number_equal, need) - 1
        tl.store(out + place, p, mask=take & (place < most))
        seen = tl.sum((above << 16) + equal)
        above_seen += seen >> 16
        equal_seen += seen & 0xFFFF
    return above_seen + tl.minimum(equal_seen, need)


@triton.jit(do_not_specialize=LENGTHS)
def top_pages_kernel(
    logits, parts, counts, scores, gathered, indices, list_counts, blocks, start, lengths, keep, table,
    counts_sb, blocks_sb, block_pages, per_row, kv_heads, queries, capacity, pages, chunks, most, share, entries,
    mass_bits, sinks, recent,
    QUERIES: tl.constexpr, BLOCK: tl.constexpr, MASS: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk): one list of pages, to indices [B, Hk, most] and list_counts [B, Hk].

    Args:
        logits, parts: float32 [B, H, rows, pages], [B, H, rows, chunks]: `queries` rows for each list.
        counts: int32 [N, 1, pages], keys of each page. scores, gathered: float32 [B, Hk, pages], scratch.
        keep: int64 [Hk], the budget's share by KV head; None: `share` for all.
        table: int32 [entries], the budget's schedule. MASS: the mass wanted instead, the bits of
            a float64.
    """
    list_index = tl.program_id(0).to(tl.int64)
    b = list_index // kv_heads
    begin, end = 0, capacity
    if start is not None:
        begin = tl.maximum(tl.load(start + b), 0)
    if lengths is not None:
        end = tl.minimum(begin + tl.load(lengths + b), capacity)
    whole, last = end // PAGE, (end - 1) // PAGE
    is_open = ((end % PAGE > 0) & (end > begin)).to(tl.int32)
    logits += list_index * queries * pages
    scores += list_index * pages
    gathered += list_index * pages
    indices += list_index * most
    lse = log_sums(parts + list_index * queries * chunks, queries, chunks, tl.cdiv(whole, 64), QUERIES, 64)

    bins, real_seen, always_seen = tl.zeros([BINS], tl.int32), tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    total_mass, always_mass = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for first in tl.range(0, whole, BLOCK):
        p = first + tl.arange(0, BLOCK)
        owner, place = place_of_page(p, p < whole, blocks, blocks_sb, block_pages, per_row, b)
        real = tl.load(counts + owner.to(tl.int64) * counts_sb + place, mask=p < whole, other=0) > 0
        score = shares(logits, p, whole, queries, pages, lse, QUERIES)
        number = real_seen + tl.cumsum(real.to(tl.int32), 0)
        always = real & ((number <= sinks) | (p > last - recent))
        if MASS:
            total_mass += tl.sum(tl.where(real, fixed(score), 0))
            always_mass += tl.sum(tl.where(always, fixed(score), 0))
        score = tl.where(always, ALWAYS, tl.where(real, score, NO_PAGE))
        tl.store(scores + p, score, mask=p < whole)
        bins += tl.histogram(score_bin(score.to(tl.int32, bitcast=True)), BINS, mask=real)
        real_seen += tl.sum(real.to(tl.int32))
        always_seen += tl.sum(always.to(tl.int32))
    tl.debug_barrier()  # what other threads have stored is read
    if MASS:
        mass = mass_bits.to(tl.int64).to(tl.float64, bitcast=True)
        missing = tl.ceil(total_mass.to(tl.float64) * mass).to(tl.int64) - always_mass
        wanted = always_seen + pages_for_mass(scores, whole, missing, BLOCK)
    else:
        if keep is not None:
            share = tl.load(keep + list_index % kv_heads)
        wanted = tl.maximum(wanted_by_budget(real_seen + is_open, share, table, entries) - is_open, always_seen)
    wanted = tl.minimum(wanted, real_seen)
    cut, need = tl.full([], -1, tl.int32), tl.zeros([], tl.int32)  # all
    if wanted < real_seen:
        if wanted == 0:
            cut = tl.full([], 0x7FFFFFFF, tl.int32)
        else:
            at, rest, found = from_top(bins, real_seen, wanted)
            gather_pages(scores, whole, at, gathered, BLOCK)
            tl.debug_barrier()
            cut, need = kth_of_bin(gathered, found, at, rest)
    written = write_pages(scores, whole, cut, need, indices, most, BLOCK)
    tl.store(indices + written, whole, mask=(is_open > 0) & (written < most))
    tl.store(list_counts + list_index, tl.minimum(written + is_open, most))
