"""Attention of 1 to 16 query rows to a cache: the keys are split among programs, a second kernel merges their parts. Triton.

The query heads of a KV head and the rows are one tile (M rows), so keys and values are read once for all of them. Lengths lie
on the device: each program takes its share of the tiles that its row of the batch really has, so that any length in any
capacity is spread evenly, and returns at once if that is none.

Tiles of scores are [M, keys], or [keys, M] if SWAP: the tensor cores of Hopper take 64 rows at a time of their first factor,
which keys fill and a few query rows do not.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.cache_device import (
    LOG2_E,
    PAGE,
    add_bias,
    by_key,
    by_query,
    capped,
    key_range,
    keys_of_tile,
    load_tile,
    rows_of_keys,
)
from tsa_compile.kernels.common.splits_device import LN_2, log_sum

MOST = tl.constexpr(60000.0)  # of a score that is dumped
LENGTHS = (
    "group", "rows", "capacity", "window", "block", "per_row", "blocks_sb", "splits", "mask_sb", "mask_sl",
    "bias_sb", "bias_sh", "bias_sr", "bias_sl", "pages_sb", "pages_sh", "score_length", "tiles_m", "kv_heads", "first_keys",
)  # fmt: skip


@triton.jit
def softmax_step(acc, row_max, row_sum, logits, v, PRECISION: tl.constexpr, SWAP: tl.constexpr):
    """One step of the online softmax in base 2; a row may have had no key so far."""
    axis: tl.constexpr = 0 if SWAP else 1
    new_max = tl.maximum(row_max, tl.max(logits, axis))
    finite = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = tl.exp2(row_max - finite)
    p = tl.exp2(logits - by_query(finite, SWAP))
    row_sum = row_sum * shrink + tl.sum(p, axis)
    acc = acc * by_query(shrink, SWAP)
    if SWAP:
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc, input_precision=PRECISION)
    else:
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def with_sink(acc, row_max, row_sum, sink, SWAP: tl.constexpr):
    """Adds a logit (base 2) that has no value to the softmax."""
    new_max = tl.maximum(row_max, sink)
    shrink = tl.exp2(row_max - new_max)
    return acc * by_query(shrink, SWAP), new_max, row_sum * shrink + tl.exp2(sink - new_max)


@triton.jit
def store_scores(dumped, scores, shown, e_ok, j, length, BLOCK_E: tl.constexpr, SWAP: tl.constexpr):
    """A tile of scores to dumped [entries, length], -inf where they are not shown; what float16 cannot say, as the largest."""
    e = tl.arange(0, BLOCK_E)
    at = dumped + (by_query(e * length, SWAP) + by_key(j, SWAP))
    scores = tl.where(shown, tl.minimum(tl.maximum(scores, -MOST), MOST), float("-inf"))
    tl.store(at, scores.to(dumped.dtype.element_ty), mask=by_query(e_ok, SWAP) & by_key((j >= 0) & (j < length), SWAP))


@triton.jit
def hide_scores(
    dumped, first_tile, end_tile, e_ok, length, split, splits, BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, SWAP: tl.constexpr
):
    """-inf to this program's share of the tiles of dumped [entries, length] that no query sees."""
    nothing = tl.zeros([BLOCK_N, BLOCK_E] if SWAP else [BLOCK_E, BLOCK_N], tl.float32)
    for tile in tl.range(split, first_tile, splits):
        store_scores(dumped, nothing, nothing > 0, e_ok, tile * BLOCK_N + tl.arange(0, BLOCK_N), length, BLOCK_E, SWAP)
    for tile in tl.range(end_tile + split, tl.cdiv(length, BLOCK_N), splits):
        store_scores(dumped, nothing, nothing > 0, e_ok, tile * BLOCK_N + tl.arange(0, BLOCK_N), length, BLOCK_E, SWAP)


@triton.jit(do_not_specialize=LENGTHS)
def decode_kernel(
    q, k, v, out, lse, part, part_lse, blocks, start, lengths, key_mask, bias, sinks, pages, counts, dumped, windows,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, o_sl,
    mask_sb, mask_sl, bias_sb, bias_sh, bias_sr, bias_sl, pages_sb, pages_sh, blocks_sb, score_length,
    kv_heads, group, rows, capacity, window, block, per_row, splits, tiles_m, first_keys, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
    SWAP: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): one part of the keys of one KV head, for BLOCK_M of its group * rows query rows.

    Args:
        out, lse: [B, H, rows, DV], float32 [B, H, rows]; written if ONE: there is one part.
        part, part_lse: float32 [B, H, rows, splits, DV], base 2 [B, H, rows, splits]; written otherwise.
        blocks, start, lengths: KvView; key_mask: bool [B, capacity]; bias: bool or numbers [B, H, rows, capacity];
            sinks: [H]; pages, counts: int32 [B, Hk, N], [B, Hk]. Each may be None.
        dumped: float16 or float32 [B, H, 2, score_length], of the first and the last row, or None. These rows are another, small
            tile (BLOCK_E of them): to pick them out of the tile of all costs more than their product.
        windows: int32 [H], of heads that see the first `first_keys` keys and so many last ones, 0: every key; or None.
        per_row: blocks in a row of k.
    """
    tile_m, head_index, split = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ok = m < group * rows
    r, h = m % rows, kv_head * group + tl.minimum(m // rows, group - 1)
    number = (b * kv_heads + kv_head) * (group * rows) + m  # of the query row among [B, H, rows]

    first, end = key_range(start, lengths, b, capacity, rows, window)
    count, first_tile, tiles = 0, first // BLOCK_N, tl.cdiv(end, BLOCK_N)
    if pages is not None:
        pages += b * pages_sb + kv_head * pages_sh
        count = tl.load(counts + head_index)
        first_tile, tiles = 0, tl.cdiv(count * PAGE, BLOCK_N)
    tiles = tl.maximum(tiles - first_tile, 0)
    e = tl.arange(0, BLOCK_E)
    e_ok, e_row, e_head = (e < 2 * group) & (tile_m == 0), e % 2 * (rows - 1), kv_head * group + tl.minimum(e // 2, group - 1)
    if dumped is not None:
        dumped += head_index.to(tl.int64) * (2 * group) * score_length
        hide_scores(dumped, first_tile, first_tile + tiles, e_ok, score_length, split, splits, BLOCK_E, BLOCK_N, SWAP)
    low, high = first_tile + split * tiles // splits, first_tile + (split + 1) * tiles // splits
    if not ONE:  # noqa: SIM102
        if low >= high:
            tl.store(part_lse + number * splits + split, float("-inf"), mask=query_ok)
            return
    own = end - rows + r  # a query row's position
    last = own if CAUSAL else tl.full([BLOCK_M], 0, tl.int32) + end
    oldest = tl.where(window > 0, own - window + 1, first)
    if windows is not None:
        width = tl.load(windows + h)
        oldest = tl.where(width > 0, own - width + 1, first)
    if blocks is not None:
        blocks += b * blocks_sb
    if key_mask is not None:
        key_mask += b * mask_sb
    k += kv_head * k_sh
    v += kv_head * v_sh
    at_bias = b * bias_sb + h * bias_sh + r * bias_sr
    d = tl.arange(0, BLOCK_D)
    q_at = q + b * q_sb + (h * q_sh + r * q_sl)[:, None] + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=query_ok[:, None] & (d < D)[None, :], other=0.0)
    if dumped is not None:
        e_at = q + b * q_sb + (e_head * q_sh + e_row * q_sl)[:, None] + d[None, :] * q_sd
        e_tile = tl.load(e_at, mask=e_ok[:, None] & (d < D)[None, :], other=0.0)
        e_own, e_bias = end - rows + e_row, b * bias_sb + e_head * bias_sh + e_row * bias_sr
    acc = tl.zeros([BLOCK_DV, BLOCK_M] if SWAP else [BLOCK_M, BLOCK_DV], tl.float32)
    row_max, row_sum = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)

    next_j, next_entry, next_there = keys_of_tile(low, pages, count, blocks, key_mask, mask_sl, block, first, end, BLOCK_N)
    for tile in tl.range(low, high):
        j, entry, there = next_j, next_entry, next_there
        next_j, next_entry, next_there = keys_of_tile(  # what addresses depend on is read a tile ahead
            tile + 1, pages, count, blocks, key_mask, mask_sl, block, first, end, BLOCK_N
        )
        k_tile = load_tile(rows_of_keys(k, k_sb, k_sl, j, entry, blocks, block, per_row, b), k_sd, there, D, BLOCK_D)
        if SWAP:
            logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * scale
        else:
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        if CAPPED:
            logits = capped(logits, softcap)
        recent = by_key(j, SWAP) >= by_query(oldest, SWAP)
        if windows is not None:
            recent = recent | by_key(j < first + first_keys, SWAP)
        visible = by_key(there, SWAP) & (by_key(j, SWAP) <= by_query(last, SWAP)) & recent
        if bias is not None:
            logits, shown = add_bias(logits, bias, bias_sl, at_bias, query_ok, j, there, SWAP)
            visible = visible & shown
        if dumped is not None:
            if SWAP:
                scores = tl.dot(k_tile, tl.trans(e_tile), input_precision=PRECISION) * scale
            else:
                scores = tl.dot(e_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
            if CAPPED:
                scores = capped(scores, softcap)
            e_seen = by_key(there, SWAP) & by_query(e_ok, SWAP)
            if CAUSAL:
                e_seen = e_seen & (by_key(j, SWAP) <= by_query(e_own, SWAP))
            e_seen = e_seen & (by_key(j, SWAP) > by_query(tl.where(window > 0, e_own - window, -1), SWAP))
            if bias is not None:
                scores, shown = add_bias(scores, bias, bias_sl, e_bias, e_ok, j, there, SWAP)
                e_seen = e_seen & shown
            store_scores(dumped, scores, e_seen, e_ok, j, score_length, BLOCK_E, SWAP)
        logits = tl.where(visible, logits * LOG2_E, float("-inf"))
        v_tile = load_tile(rows_of_keys(v, v_sb, v_sl, j, entry, blocks, block, per_row, b), v_sd, there, DV, BLOCK_DV)
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, logits, v_tile, PRECISION, SWAP)

    dv = tl.arange(0, BLOCK_DV)
    ok = by_query(query_ok, SWAP) & by_key(dv < DV, SWAP)
    if ONE:
        if sinks is not None:
            sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
            acc, row_max, row_sum = with_sink(acc, row_max, row_sum, sink, SWAP)
        logs, total = log_sum(row_max, row_sum)
        o_at = out + b * o_sb + by_query(h * o_sh + r * o_sl, SWAP) + by_key(dv, SWAP)
        tl.store(o_at, (acc / by_query(total, SWAP)).to(out.dtype.element_ty), mask=ok)
        tl.store(lse + number, logs * LN_2, mask=query_ok)
    else:
        logs, total = log_sum(row_max, row_sum)
        p_at = part + by_query((number * splits + split) * DV, SWAP) + by_key(dv, SWAP)
        tl.store(p_at, acc / by_query(total, SWAP), mask=ok)
        tl.store(part_lse + number * splits + split, logs, mask=query_ok)
