"""The lists of query heads become lists of their KV heads. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE

LENGTHS = ("lists", "kv_heads", "capacity", "pages", "indices_sb", "indices_sl")


@triton.jit(do_not_specialize=LENGTHS)
def join_pages_kernel(
    indices, list_counts, flags, out, out_counts, start, lengths, owners, sinks, recent,
    indices_sb, indices_sl, lists, kv_heads, capacity, pages,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * kv_heads): one KV head's list: flags for the pages of its query heads' lists, then those that are set, ascending.

    Args:
        indices: int32 [B, lists, N], entries contiguous; list_counts: int32 [B, lists], contiguous.
        flags: int8 [B, kv_heads, pages], zero; out: int32, alike; out_counts: int32 [B, kv_heads].
        start, lengths: int32 [B], each may be None; owners: int32 [lists]; sinks, recent: int32 [kv_heads].
    """
    b, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), tl.program_id(0) % kv_heads
    begin, end = 0, capacity
    if start is not None:
        begin = tl.maximum(tl.load(start + b), 0)
    if lengths is not None:
        end = tl.minimum(begin + tl.load(lengths + b), end)
    own = tl.program_id(0).to(tl.int64) * pages
    for number in tl.range(0, lists):
        if tl.load(owners + number) == kv_head:
            count = tl.load(list_counts + b * lists + number)
            for first in tl.range(0, count, BLOCK):
                n = first + tl.arange(0, BLOCK)
                page = tl.load(indices + b * indices_sb + number * indices_sl + n, mask=n < count, other=0)
                tl.store(flags + own + page, tl.full([BLOCK], 1, tl.int8), mask=n < count)
    tl.debug_barrier()  # what other threads have stored is read
    first_page, last_page = begin // PAGE, (end - 1) // PAGE
    below, above = first_page + tl.load(sinks + kv_head), last_page - tl.load(recent + kv_head)
    written = tl.zeros([], tl.int32)
    if end > begin:
        for first in tl.range(0, last_page + 1, BLOCK):
            page = first + tl.arange(0, BLOCK)
            there = (page >= first_page) & (page <= last_page)
            kept = there & ((page < below) | (page > above) | (tl.load(flags + own + page, mask=there, other=0) > 0))
            place = written + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(out + own + place, page, mask=kept)
            written += tl.sum(kept.to(tl.int32))
    tl.store(out_counts + tl.program_id(0), written)
