"""Logits of pages by their mean keys. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE, place_of_page

LENGTHS = (
    "group", "rows", "kv_heads", "tiles_m", "capacity", "pages", "chunks", "block_pages", "per_row",
    "blocks_sb", "counts_sb",
)  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def page_scores_kernel(
    q, sums, counts, logits, parts, blocks, start, lengths,
    q_sb, q_sh, q_sl, q_sd, sums_sb, sums_sh, sums_sp, counts_sb, blocks_sb, block_pages, per_row,
    kv_heads, group, rows, tiles_m, capacity, pages, chunks, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, chunks): CHUNK pages of one KV head, for BLOCK_M of its group * rows query rows.

    Args:
        sums, counts: [N, Hk, pages, D], int32 [N, 1, pages].
        logits, parts: float32 [B, H, rows, pages], [B, H, rows, chunks]: written up to the row's last whole page.
        blocks, start, lengths: KvView, each may be None.
    """
    tile_m, head_index, chunk = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    end = capacity
    if lengths is not None:
        begin = 0
        if start is not None:
            begin = tl.maximum(tl.load(start + b), 0)
        end = tl.minimum(begin + tl.load(lengths + b), end)
    whole = end // PAGE
    if chunk * CHUNK >= whole:
        return
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ok = m < group * rows
    h, r, d = kv_head * group + tl.minimum(m // rows, group - 1), m % rows, tl.arange(0, BLOCK_D)
    q_at = q + b * q_sb + (h * q_sh + r * q_sl)[:, None] + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=query_ok[:, None] & (d < D)[None, :], other=0.0).to(sums.dtype.element_ty)
    page = chunk * CHUNK + tl.arange(0, CHUNK)
    there = page < whole
    owner, place = place_of_page(page, there, blocks, blocks_sb, block_pages, per_row, b)
    number = tl.load(counts + owner.to(tl.int64) * counts_sb + place, mask=there, other=0)
    there = there & (number > 0)
    at = sums + owner.to(tl.int64) * sums_sb + kv_head * sums_sh + place.to(tl.int64) * sums_sp
    tile = tl.load(at[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)
    n = tl.where(there, number, 1).to(tl.float32)
    logit = tl.dot(q_tile, tl.trans(tile), input_precision=PRECISION) * (scale / n)[None, :] + tl.log(n)[None, :]
    finite = (logit > float("-inf")) & (logit < float("inf"))  # neither holds of NaN
    logit = tl.where(there[None, :] & finite, logit, float("-inf"))
    number = (b * kv_heads + kv_head) * (group * rows) + m  # of the query row among [B, H, rows]
    tl.store(logits + number[:, None] * pages + page[None, :], logit, mask=query_ok[:, None] & (page < whole)[None, :])
    best = tl.max(logit, 1)
    safe = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.exp(logit - safe[:, None]), 1)
    part = tl.where(total > 0, safe + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(parts + number * chunks + chunk, part, mask=query_ok)
