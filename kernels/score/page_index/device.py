"""Logits of pages by their mean keys. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE, place_of_page

LENGTHS = (
    "group", "rows", "kv_heads", "tiles_m", "capacity", "pages", "chunks", "splits", "block_pages", "per_row", "blocks_sb",
    "counts_sb",
)  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def page_scores_kernel(
    q, sums, counts, logits, parts, blocks, start, lengths,
    q_sb, q_sh, q_sl, q_sd, sums_sb, sums_sh, sums_sp, counts_sb, blocks_sb, block_pages, per_row,
    kv_heads, group, rows, tiles_m, capacity, pages, chunks, splits, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, Q: tl.constexpr, CHUNK: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): a part of the chunks of pages of one KV head, for Q of its group * rows query rows.

    Args:
        sums, counts: [N, Hk, pages, D], int32 [N, 1, pages].
        logits, parts: float32 [B, H, rows, pages], [B, H, rows, chunks]: written up to the row's last whole page.
        blocks, start, lengths: KvView, each may be None.
        Q: BLOCK_M, or a power of two that holds all rows: behind the product only these are worked on.
    """
    tile_m, head_index, split = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    end = capacity
    if lengths is not None:
        begin = 0
        if start is not None:
            begin = tl.maximum(tl.load(start + b), 0)
        end = tl.minimum(begin + tl.load(lengths + b), end)
    whole = end // PAGE
    used = tl.cdiv(whole, CHUNK)
    low, high = split * used // splits, (split + 1) * used // splits
    if low >= high:
        return
    m, d = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    h, r = kv_head * group + tl.minimum(m // rows, group - 1), m % rows
    q_at = q + b * q_sb + (h * q_sh + r * q_sl)[:, None] + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=(m < group * rows)[:, None] & (d < D)[None, :], other=0.0).to(sums.dtype.element_ty)
    own = tile_m * BLOCK_M + tl.arange(0, Q)
    own_ok = own < group * rows
    own = (b * kv_heads + kv_head) * (group * rows) + own  # query rows among [B, H, rows]
    for chunk in tl.range(low, high, num_stages=STAGES):
        page = chunk * CHUNK + tl.arange(0, CHUNK)
        there = page < whole
        owner, place = place_of_page(page, there, blocks, blocks_sb, block_pages, per_row, b)
        n = tl.load(counts + owner.to(tl.int64) * counts_sb + place, mask=there, other=0)
        at = sums + owner.to(tl.int64) * sums_sb + kv_head * sums_sh + place.to(tl.int64) * sums_sp
        tile = tl.load(at[:, None] + d[None, :], mask=there[:, None] & (d < D)[None, :], other=0.0)  # waits for no count
        logit = tl.dot(q_tile, tl.trans(tile), input_precision=PRECISION)
        logit = tl.sum(tl.reshape(logit, [BLOCK_M // Q, Q, CHUNK]), 0)  # the rows behind the first Q are zeros
        real = tl.maximum(n, 1).to(tl.float32)
        logit = logit * (scale / real)[None, :] + tl.log(real)[None, :]
        finite = (logit > float("-inf")) & (logit < float("inf"))  # neither holds of NaN
        logit = tl.where((n > 0)[None, :] & finite, logit, float("-inf"))
        tl.store(logits + own[:, None] * pages + page[None, :], logit, mask=own_ok[:, None] & there[None, :])
        best = tl.max(logit, 1)
        safe = tl.where(best == float("-inf"), 0.0, best)
        total = tl.sum(tl.exp(logit - safe[:, None]), 1)
        part = tl.where(total > 0, safe + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
        tl.store(parts + own * chunks + chunk, part, mask=own_ok)
