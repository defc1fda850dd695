"""Shares of pages, tile by tile: the first of the two launches that make the lists of a decode step. Triton.

What it leaves for the second is one int32 for each page, that orders them: the float32 bits of the page's share, which is in
[0, 1]; these plus ALWAYS for a page that is always read; -1 for an entry that is no page.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE, place_of_page

ALWAYS = tl.constexpr(1073741824)  # 2**30; the bits of 1.0 are below it, and twice it is beyond them
SCAN = tl.constexpr(2048)  # pages of which those that hold a key are counted at a time
LENGTHS = (
    "kv_heads", "queries", "capacity", "pages", "chunks", "groups", "sinks", "recent", "counts_sb", "blocks_sb", "block_pages",
    "per_row",
)  # fmt: skip


@triton.jit
def log_sums(parts, queries, chunks, used, QUERIES: tl.constexpr, CHUNKS: tl.constexpr):
    """The log-sum-exp over the first `used` of a query row's chunks, [QUERIES]; 0 where there is none."""
    query = tl.arange(0, QUERIES)
    best, total = tl.full([QUERIES], float("-inf"), tl.float32), tl.zeros([QUERIES], tl.float32)
    for first in tl.range(0, used, CHUNKS):
        c = first + tl.arange(0, CHUNKS)
        ok = (query < queries)[:, None] & (c < used)[None, :]
        part = tl.load(parts + query[:, None] * chunks + c[None, :], mask=ok, other=float("-inf"))
        new = tl.maximum(best, tl.max(part, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(best - safe) + tl.sum(tl.exp(part - safe[:, None]), 1)
        best = new
    return tl.where(total > 0, best + tl.log(tl.where(total > 0, total, 1.0)), 0.0)


@triton.jit
def holds_a_key(counts, page, ok, blocks, blocks_sb, block_pages, per_row, counts_sb, b):
    owner, place = place_of_page(page, ok, blocks, blocks_sb, block_pages, per_row, b)
    return tl.load(counts + owner.to(tl.int64) * counts_sb + place, mask=ok, other=0) > 0


@triton.jit(do_not_specialize=LENGTHS)
def page_shares_kernel(
    logits, parts, counts, scores, blocks, start, lengths,
    counts_sb, blocks_sb, block_pages, per_row, kv_heads, queries, capacity, pages, chunks, groups, sinks, recent,
    QUERIES: tl.constexpr, CHUNKS: tl.constexpr, TILE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk, tiles): TILE pages of one list, to scores int32 [B, Hk, 16 * groups], for the row's whole pages.

    Args:
        logits, parts: float32 [B, H, rows, pages], [B, H, rows, chunks]: `queries` rows for each list.
        counts: int32 [N, 1, pages], keys of each page.
        EARLY: the second launch may start; it waits for this one where it reads.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    list_index, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE
    b = list_index // kv_heads
    end = capacity
    if lengths is not None:
        begin = 0
        if start is not None:
            begin = tl.maximum(tl.load(start + b), 0)
        end = tl.minimum(begin + tl.load(lengths + b), capacity)
    whole, last = end // PAGE, (end - 1) // PAGE
    if first >= whole:
        return
    page = first + tl.arange(0, TILE)
    there = page < whole
    query = tl.arange(0, QUERIES)
    at = logits + list_index * queries * pages + query[:, None] * pages + page[None, :]
    logit = tl.load(at, mask=(query < queries)[:, None] & there[None, :], other=float("-inf"))
    real = holds_a_key(counts, page, there, blocks, blocks_sb, block_pages, per_row, counts_sb, b)
    seen, scanned = tl.zeros([], tl.int32), 0
    while (seen < sinks) & (scanned < first):  # of a row without padding once
        p = scanned + tl.arange(0, SCAN)
        seen += tl.sum(holds_a_key(counts, p, p < first, blocks, blocks_sb, block_pages, per_row, counts_sb, b).to(tl.int32))
        scanned += SCAN
    lse = log_sums(parts + list_index * queries * chunks, queries, chunks, tl.cdiv(whole, 64), QUERIES, CHUNKS)
    share = tl.exp(logit - lse[:, None])
    share = tl.where((share >= 0.0) & (share <= 2.0), share, 0.0)  # what is not finite counts as 0
    bits = tl.minimum(tl.sum(share, 0) / queries, 1.0).to(tl.int32, bitcast=True)
    always = (seen + tl.cumsum(real.to(tl.int32), 0) <= sinks) | (page > last - recent)
    score = tl.where(real, tl.where(always, bits + ALWAYS, bits), -1)
    tl.store(scores + list_index * groups * 16 + page, score, mask=there)
