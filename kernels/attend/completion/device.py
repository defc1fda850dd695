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
def unread(page, there, listed, count, first, CHUNK: tl.constexpr):
    """`there`, without the pages of an ascending list; `page` [CHUNK] from `first` on."""
    begin, end = part_of_list(listed, count, first, CHUNK)
    at = begin + tl.arange(0, CHUNK)
    read = tl.load(listed + at, mask=at < end, other=-1)
    return there & (tl.sum((page[:, None] == read[None, :]).to(tl.int32), 1) == 0)


@triton.jit(do_not_specialize=LENGTHS)
def complete_pages_kernel(
    out, lse, logits, sums, counts, part, part_lse, indices, list_counts, blocks, start, lengths,
    o_sb, o_sh, o_sl, l_sb, l_sh, sums_sb, sums_sh, sums_sp, counts_sb, blocks_sb,
    block_pages, per_row, kv_heads, group, rows, tiles_m, capacity, pages, most, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): every splits-th chunk of pages of one KV head, for BLOCK_M of its query rows.

    Args:
        out, lse: [B, H, rows, DV], float32 [B, H, rows], of the pages that were read: they become the last part.
        logits: float32 [B, H, rows, pages]. sums, counts: of the values, [N, Hk, pages, DV], and int32 [N, 1, pages].
        part, part_lse: float32 [B, H, rows, splits + 1, DV], [B, H, rows, splits + 1] in base 2.
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
    m, dv = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    query_ok = m < group * rows
    h, r = kv_head * group + tl.minimum(m // rows, group - 1), m % rows
    number = list_index * (group * rows) + m  # of the query row among [B, H, rows]
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max, row_sum = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for first in tl.range(split * CHUNK, whole, splits * CHUNK):
        page = first + tl.arange(0, CHUNK)
        owner, place = place_of_page(page, page < whole, blocks, blocks_sb, block_pages, per_row, b)
        n = tl.load(counts + owner.to(tl.int64) * counts_sb + place, mask=page < whole, other=0)
        there = unread(page, (page < whole) & (n > 0), indices + list_index * most, count, first, CHUNK)
        ok = query_ok[:, None] & there[None, :]
        logit = tl.load(logits + number[:, None] * pages + page[None, :], mask=ok, other=float("-inf")) * LOG2_E
        new_max = tl.maximum(row_max, tl.max(logit, 1))
        finite = tl.where(new_max == float("-inf"), 0.0, new_max)
        shrink, p = tl.exp2(row_max - finite), tl.exp2(logit - finite[:, None])
        row_sum = row_sum * shrink + tl.sum(p, 1)
        at = sums + owner.to(tl.int64) * sums_sb + kv_head * sums_sh + place.to(tl.int64) * sums_sp
        values = tl.load(at[:, None] + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        share = p / tl.maximum(n, 1).to(tl.float32)[None, :]
        acc = tl.dot(share.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        row_max = new_max
    logs, total = log_sum(row_max, row_sum)
    to = number * (splits + 1) + split
    ok = query_ok[:, None] & (dv < DV)[None, :]
    tl.store(part + to[:, None] * DV + dv[None, :], acc / total[:, None], mask=ok)
    tl.store(part_lse + to, logs, mask=query_ok)
    if split == 0:
        to = number * (splits + 1) + splits
        read = tl.load(out + b * o_sb + (h * o_sh + r * o_sl)[:, None] + dv[None, :], mask=ok, other=0.0)
        tl.store(part + to[:, None] * DV + dv[None, :], read.to(tl.float32), mask=ok)
        tl.store(part_lse + to, tl.load(lse + b * l_sb + h * l_sh + r, mask=query_ok, other=0.0) * LOG2_E, mask=query_ok)
