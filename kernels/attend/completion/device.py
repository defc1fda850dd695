"""The pages that a decode step does not read, by their mean keys and values. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.cache_device import LOG2_E
from tsa_compile.kernels.common.pages_device import PAGE, part_of_list, place_of_page
from tsa_compile.kernels.common.splits_device import log_sum

LENGTHS = (
    "group", "rows", "kv_heads", "tiles_m", "capacity", "pages", "most", "splits", "block_pages", "per_row", "blocks_sb",
    "counts_sb",
)  # fmt: skip


@triton.jit
def keys_of_unread(kept, first, last, listed, count, counts, counts_sb, blocks, blocks_sb, block_pages, per_row, b):
    """To kept[page], from page `first` to `last`: how many keys a page has, 0 of those in an ascending list."""
    i = tl.arange(0, 512)
    for at in tl.range(first, last, 512):
        page = at + i
        owner, place = place_of_page(page, page < last, blocks, blocks_sb, block_pages, per_row, b)
        n = tl.load(counts + owner.to(tl.int64) * counts_sb + place, mask=page < last, other=0)
        tl.store(kept + page, n, mask=page < last)
    begin, end = part_of_list(listed, count, first, last - first)
    tl.debug_barrier()
    for at in tl.range(begin, end, 512):
        page = tl.load(listed + at + i, mask=at + i < end, other=0)
        tl.store(kept + page, tl.zeros_like(page), mask=at + i < end)
    tl.debug_barrier()


@triton.jit
def repeated(x, BLOCK_M: tl.constexpr):
    """[Q, N] -> [BLOCK_M, N]: its rows again and again."""
    rounds: tl.constexpr = BLOCK_M // x.shape[0]
    return tl.reshape(tl.broadcast_to(x[None, :, :], [rounds, x.shape[0], x.shape[1]]), [BLOCK_M, x.shape[1]])


@triton.jit(do_not_specialize=LENGTHS)
def complete_pages_kernel(
    out, lse, logits, sums, counts, part, part_lse, kept, indices, list_counts, blocks, start, lengths,
    o_sb, o_sh, o_sl, l_sb, l_sh, sums_sb, sums_sh, sums_sp, counts_sb, blocks_sb,
    block_pages, per_row, kv_heads, group, rows, tiles_m, capacity, pages, most, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): a part of the chunks of pages of one KV head, for Q of its query rows: BLOCK_M, or all.

    Args:
        out, lse: [B, H, rows, DV], float32 [B, H, rows], of the pages that were read: they become the last part.
        logits: float32 [B, H, rows, pages]. sums, counts: of the values, [N, Hk, pages, DV], and int32 [N, 1, pages].
        part, part_lse: float32 [B, H, rows, splits + 1, DV], [B, H, rows, splits + 1] in base 2.
        kept: int32 [B * Hk * tiles_m, pages], scratch.
        indices, list_counts: int32 [B, Hk, most] ascending, [B, Hk]. blocks, start, lengths: KvView, each may be None.
    """
    tile_m, list_index, split = tl.program_id(0) % tiles_m, (tl.program_id(0) // tiles_m).to(tl.int64), tl.program_id(1)
    b, kv_head = list_index // kv_heads, list_index % kv_heads
    end = capacity
    if lengths is not None:
        begin = 0
        if start is not None:
            begin = tl.maximum(tl.load(start + b), 0)
        end = tl.minimum(begin + tl.load(lengths + b), end)
    whole, count = end // PAGE, tl.load(list_counts + list_index)
    m, dv = tile_m * BLOCK_M + tl.arange(0, Q), tl.arange(0, BLOCK_DV)
    query_ok = m < group * rows
    h, r = kv_head * group + tl.minimum(m // rows, group - 1), m % rows
    number = list_index * (group * rows) + m  # of the query row among [B, H, rows]
    part += number[:, None] * (splits + 1) * DV + dv[None, :]
    part_lse += number * (splits + 1)
    ok = query_ok[:, None] & (dv < DV)[None, :]
    if split == 0:
        read = tl.load(out + b * o_sb + (h * o_sh + r * o_sl)[:, None] + dv[None, :], mask=ok, other=0.0)
        tl.store(part + splits * DV, read.to(tl.float32), mask=ok)
        tl.store(part_lse + splits, tl.load(lse + b * l_sb + h * l_sh + r, mask=query_ok, other=0.0) * LOG2_E, mask=query_ok)
    chunks = tl.cdiv(whole, CHUNK)
    low, high = split * chunks // splits * CHUNK, tl.minimum((split + 1) * chunks // splits * CHUNK, whole)
    if low >= high:
        tl.store(part_lse + split, float("-inf"), mask=query_ok)
        return
    kept += tl.program_id(0).to(tl.int64) * pages
    of_list = indices + list_index * most
    keys_of_unread(kept, low, high, of_list, count, counts, counts_sb, blocks, blocks_sb, block_pages, per_row, b)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max, row_sum = tl.full([Q], float("-inf"), tl.float32), tl.zeros([Q], tl.float32)
    for first in tl.range(low, high, CHUNK):
        page = first + tl.arange(0, CHUNK)
        n = tl.load(kept + page, mask=page < high, other=0)
        logit = tl.load(
            logits + number[:, None] * pages + page[None, :], mask=query_ok[:, None] & (page < high)[None, :], other=0.0
        )
        owner, place = place_of_page(page, page < high, blocks, blocks_sb, block_pages, per_row, b)
        at = sums + owner.to(tl.int64) * sums_sb + kv_head * sums_sh + place.to(tl.int64) * sums_sp
        values = tl.load(at[:, None] + dv[None, :], mask=(n > 0)[:, None] & (dv < DV)[None, :], other=0.0)
        logit = tl.where((n > 0)[None, :], logit * LOG2_E, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(logit, 1))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        shrink, p = tl.exp2(row_max - finite), tl.exp2(logit - finite[:, None])
        row_sum = row_sum * shrink + tl.sum(p, 1)
        share = repeated((p / tl.maximum(n, 1).to(tl.float32)[None, :]).to(values.dtype), BLOCK_M)
        acc = tl.dot(share, values, acc * repeated(shrink[:, None], BLOCK_M), input_precision=PRECISION)
        row_max = new_max
    logs, total = log_sum(row_max, row_sum)
    acc = tl.sum(tl.reshape(acc, [BLOCK_M // Q, Q, BLOCK_DV]), 0) / ((BLOCK_M // Q) * total[:, None])  # all are alike
    tl.store(part + split * DV, acc, mask=ok)
    tl.store(part_lse + split, logs, mask=query_ok)
