"""Attention of 1 to 16 query rows to a cache: the keys are split among programs, a second kernel merges their parts. Triton.

The query heads of a KV head and the rows are one tile (M rows), so keys and values are read once for all of them. Lengths lie
on the device: each program takes its share of the tiles that its row of the batch really has, so that any length in any
capacity is spread evenly, and returns at once if that is none.

Tiles of scores are [M, keys], or [keys, M] if SWAP: the tensor cores of Hopper take 64 rows at a time of their first factor,
which keys fill and a few query rows do not.
"""

import triton
import triton.language as tl

PAGE = tl.constexpr(16)  # rows of a page
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
LENGTHS = (
    "group", "rows", "capacity", "window", "block", "per_row", "blocks_sb", "splits", "mask_sb", "mask_sl",
    "bias_sb", "bias_sh", "bias_sr", "bias_sl", "pages_sb", "pages_sh", "score_length", "tiles_m", "kv_heads",
)  # fmt: skip


@triton.jit
def by_query(x, SWAP: tl.constexpr):
    """A vector over the tile's query rows, to be combined with a tile of scores."""
    return x[None, :] if SWAP else x[:, None]


@triton.jit
def by_key(x, SWAP: tl.constexpr):
    """A vector over the tile's keys, to be combined with a tile of scores."""
    return x[:, None] if SWAP else x[None, :]


@triton.jit
def key_range(start, lengths, b, capacity, rows, window):
    """First position that some query row sees, and the first behind the last that is a key."""
    begin = 0
    if start is not None:
        begin = tl.maximum(tl.load(start + b), 0)
    end = capacity
    if lengths is not None:
        end = tl.minimum(begin + tl.load(lengths + b), capacity)
    first = tl.where(window > 0, tl.maximum(begin, end - rows + 1 - window), begin)
    return first, end


@triton.jit
def keys_of_tile(tile, pages, count, blocks, key_mask, mask_sl, block, first, end, BLOCK_N: tl.constexpr):
    """Of a tile's keys: their positions, entries of the table of blocks (unless None), and which are there to be seen."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    j = n
    if pages is not None:
        page = tl.load(pages + n // PAGE, mask=n < count * PAGE, other=-1)
        j = page * PAGE + n % PAGE  # below 0 behind the list's end
    there = (j >= first) & (j < end)
    entry = j
    if blocks is not None:
        entry = tl.load(blocks + j // block, mask=there, other=0)
    if key_mask is not None:
        there = there & tl.load(key_mask + j.to(tl.int64) * mask_sl, mask=there, other=0).to(tl.int1)
    return j, entry, there


@triton.jit
def rows_of_keys(x, x_sb, x_sl, j, entry, blocks, block, per_row, b):
    """Addresses [keys] of the rows of x [N, Hk, L, D] that hold the keys at positions j."""
    if blocks is not None:  # of the table, whose entries count the blocks of all N
        owner, inside = entry // per_row, entry % per_row * block + j % block
        return x + owner.to(tl.int64) * x_sb + inside.to(tl.int64) * x_sl
    return x + b * x_sb + tl.maximum(j, 0).to(tl.int64) * x_sl


@triton.jit
def load_tile(at, x_sd, there, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows at addresses `at`, as a tile [keys, BLOCK_D]: zero where no key is there, which is not read, and beyond D."""
    d = tl.arange(0, BLOCK_D)
    ok = there[:, None] if D == BLOCK_D else there[:, None] & (d < D)[None, :]
    return tl.load(at[:, None] + d[None, :] * x_sd, mask=ok, other=0.0)


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap)."""
    return softcap * (1.0 - 2.0 / (tl.exp2(logits * (2.0 * LOG2_E / softcap)) + 1.0))


@triton.jit
def add_bias(logits, bias, bias_sl, at_query, query_ok, j, there, SWAP: tl.constexpr):
    """Scores plus a mask of numbers, or hidden by a bool mask; (scores, visible). Numbers at or below -1e38 hide."""
    at = bias + by_query(at_query, SWAP) + by_key(tl.maximum(j, 0).to(tl.int64) * bias_sl, SWAP)
    ok = by_query(query_ok, SWAP) & by_key(there, SWAP)
    if bias.dtype.element_ty == tl.int1:
        visible = tl.load(at, mask=ok, other=0).to(tl.int1)
    else:
        value = tl.load(at, mask=ok, other=float("-inf")).to(tl.float32)
        visible = value > -1e38
        logits += tl.where(visible, value, 0.0)
    return logits, visible


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
def log_sum(row_max, row_sum):
    """log2 of the sum of exponentials, -inf where there was no key; and what to divide by."""
    total = tl.where(row_sum > 0, row_sum, 1.0)
    return tl.where(row_sum > 0, row_max + tl.log2(total), float("-inf")), total


@triton.jit
def dump_scores(dumped, logits, number, r, query_ok, rows, j, there, length, SWAP: tl.constexpr):
    """Logits of the first and the last row, natural, to dumped [B * H, 2, length]."""
    at = dumped + by_query(number * 2 * length, SWAP) + by_key(tl.maximum(j, 0).to(tl.int64), SWAP)
    ok = by_query(query_ok, SWAP) & by_key(there, SWAP)
    tl.store(at, logits, mask=ok & by_query(r == 0, SWAP))
    tl.store(at + length, logits, mask=ok & by_query(r == rows - 1, SWAP))


@triton.jit(do_not_specialize=LENGTHS)
def decode_kernel(
    q, k, v, out, lse, part, part_lse, blocks, start, lengths, key_mask, bias, sinks, pages, counts, dumped,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, o_sl,
    mask_sb, mask_sl, bias_sb, bias_sh, bias_sr, bias_sl, pages_sb, pages_sh, blocks_sb, score_length,
    kv_heads, group, rows, capacity, window, block, per_row, splits, tiles_m, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
    SWAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): one part of the keys of one KV head, for BLOCK_M of its group * rows query rows.

    Args:
        out, lse: [B, H, rows, DV], float32 [B, H, rows]; written if ONE: there is one part.
        part, part_lse: float32 [B, H, rows, splits, DV], base 2 [B, H, rows, splits]; written otherwise.
        blocks, start, lengths: KvView; key_mask: bool [B, capacity]; bias: bool or numbers [B, H, rows, capacity];
            sinks: [H]; pages, counts: int32 [B, Hk, N], [B, Hk]. Each may be None.
        dumped: float32 [B, H, 2, score_length], or None.
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
    low, high = first_tile + split * tiles // splits, first_tile + (split + 1) * tiles // splits
    if not ONE:  # noqa: SIM102
        if low >= high:
            tl.store(part_lse + number * splits + split, float("-inf"), mask=query_ok)
            return
    own = end - rows + r  # a query row's position
    last = own if CAUSAL else tl.full([BLOCK_M], 0, tl.int32) + end
    oldest = tl.where(window > 0, own - window + 1, first)
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
        visible = by_key(there, SWAP) & (by_key(j, SWAP) <= by_query(last, SWAP)) & (by_key(j, SWAP) >= by_query(oldest, SWAP))
        if bias is not None:
            logits, shown = add_bias(logits, bias, bias_sl, at_bias, query_ok, j, there, SWAP)
            visible = visible & shown
        if dumped is not None:
            natural = tl.where(visible, logits, float("-inf"))
            dump_scores(dumped, natural, number // rows, r, query_ok, rows, j, there, score_length, SWAP)
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


@triton.jit(do_not_specialize=("heads", "rows", "splits"))
def merge_kernel(
    part, part_lse, out, lse, sinks, o_sb, o_sh, o_sl, heads, rows, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * rows): joins the parts of one query row, BLOCK_S at a time. Of a part without keys only the lse is read."""
    number = tl.program_id(0).to(tl.int64)
    b, h, r = number // (heads * rows), number // rows % heads, number % rows
    dv = tl.arange(0, BLOCK_DV)
    acc, total = tl.zeros([BLOCK_DV], tl.float32), 0.0
    best = float("-inf")
    if sinks is not None:
        best = tl.load(sinks + h).to(tl.float32) * LOG2_E
        total = 1.0
    for first in tl.range(0, splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        logs = tl.load(part_lse + number * splits + s, mask=s < splits, other=float("-inf"))
        there = logs > float("-inf")
        values = tl.load(
            part + (number * splits + s)[:, None] * DV + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0
        )
        new = tl.maximum(best, tl.max(logs, 0))
        finite = tl.where(new == float("-inf"), 0.0, new)
        weights, shrink = tl.exp2(logs - finite), tl.exp2(best - finite)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * values, 0)
        best = new
    logs, total = log_sum(best, total)
    tl.store(out + b * o_sb + h * o_sh + r * o_sl + dv, (acc / total).to(out.dtype.element_ty), mask=dv < DV)
    tl.store(lse + number, logs * LN_2)
