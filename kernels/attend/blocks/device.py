"""Block-sparse attention over kept tokens: pooled scores, the choice of blocks, and the prefill. Triton.

A slot is a kept token's place in its list; blocks are blocks of slots. Counts stay on the device: grids cover the capacity, and
programs beyond the count return at once.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.attend.tokens.device import diagonal_steps, schedule
from tsa_compile.kernels.common.grid_device import tile_and_row
from tsa_compile.kernels.common.rows_device import load_columns, load_rows, store_lse, store_rows, zero_rows
from tsa_compile.kernels.common.softmax_device import softmax_step

LENGTHS = (
    "heads", "x_heads", "kv_heads", "lists", "skipped", "n_pooled", "n_blocks", "sinks", "local", "dense_below", "q_len", "k_len",
    "tiles", "section", "i_sb", "i_sg",
)  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def pool_rows_kernel(
    x, pooled, indices, counts, x_sb, x_sh, x_sl, x_sd, i_sb, i_sg, heads, x_heads, lists, skipped, n_pooled,
    D: tl.constexpr, BLOCK_D: tl.constexpr, POOL: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Means of every POOL kept rows of x [B, x_heads, L, D], to pooled [B, heads, n_pooled, D].

    Row 0 of x is at position `skipped`; kept tokens before it do not count.
    """
    tile, head_index = tile_and_row(tl.cdiv(n_pooled, SUB))
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    first, n = tile * SUB, tl.load(counts + b)
    if first * POOL >= n:
        return
    slots = first * POOL + tl.arange(0, SUB * POOL)
    kept = indices + b * i_sb + h * lists // heads * i_sg
    rows = tl.load(kept + slots, mask=slots < n, other=-1) - skipped
    ok = rows >= 0
    d = tl.arange(0, BLOCK_D)
    x += b * x_sb + h * x_heads // heads * x_sh
    x_at = x + rows.to(tl.int64)[:, None] * x_sl + d[None, :] * x_sd
    tile = tl.load(x_at, mask=ok[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(tl.reshape(tile, [SUB, POOL, BLOCK_D]), 1)
    number = tl.sum(tl.reshape(ok.to(tl.float32), [SUB, POOL]), 1)
    mean = total / tl.maximum(number, 1.0)[:, None]
    out_row = first + tl.arange(0, SUB)
    pooled += ((b * heads + h) * n_pooled + out_row)[:, None] * D + d[None, :]
    tl.store(pooled, mean.to(pooled.dtype.element_ty), mask=(out_row < n_pooled)[:, None] & (d < D)[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def block_mass_kernel(
    queries, keys, masses, indices, counts, i_sb, i_sg, heads, lists, q_len, k_len, n_pooled, n_blocks, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, POOL: tl.constexpr, PER: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Estimated mass of one block of queries (PER pooled rows, at most 16) to each block of keys, to masses [B, H, N, N]."""
    row, head_index = tile_and_row(n_blocks)
    head_index = head_index.to(tl.int64)
    b, h = head_index // heads, head_index % heads
    n = tl.load(counts + b)
    if row * PER * POOL >= n:
        return
    r, d = tl.arange(0, 16), tl.arange(0, BLOCK_D)
    u = row * PER + r  # pooled rows; those of the block that hold a query count
    last_slot = tl.minimum((u + 1) * POOL, n) - 1
    kept = indices + b * i_sb + h * lists // heads * i_sg
    present = (r < PER) & (u * POOL < n)
    present &= tl.load(kept + last_slot, mask=present, other=-1) >= k_len - q_len
    q_at = queries + (head_index * n_pooled + u)[:, None] * D + d[None, :]
    q_tile = tl.load(q_at, mask=present[:, None] & (d < D)[None, :], other=0.0)
    keys += (b * lists + h * lists // heads) * n_pooled * D
    end, last = (row + 1) * PER, tl.cdiv(n, POOL) - 1
    row_max = tl.full([16], -1.0e30, tl.float32)
    row_sum = tl.zeros([16], tl.float32)
    for start in tl.range(0, end, COLS):
        w = start + tl.arange(0, COLS)
        k_tile = load_columns(keys, tl.minimum(w, last), D, 1, d, D, BLOCK_D)
        scores = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale_log2
        scores = tl.where((w[None, :] <= u[:, None]) & (w <= last)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(scores - new_max[:, None]), 1)
        row_max = new_max
    lse = row_max + tl.log2(row_sum)
    masses += (head_index * n_blocks + row) * n_blocks
    for start in tl.range(0, end, COLS):
        w = start + tl.arange(0, COLS)
        k_tile = load_columns(keys, tl.minimum(w, last), D, 1, d, D, BLOCK_D)
        scores = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale_log2
        visible = (w[None, :] <= u[:, None]) & (w <= last)[None, :] & present[:, None]
        share = tl.sum(tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0), 0)
        column = start // PER + tl.arange(0, COLS // PER)
        total = tl.sum(tl.reshape(share, [COLS // PER, PER]), 1)
        total = tl.where((total >= 0.0) & (total <= 2.0 * PER), total, 0.0)  # not finite: counts for nothing
        tl.store(masses + column, total, mask=column <= row)


@triton.jit
def mass_above(masses, n, bits, CHUNK: tl.constexpr):
    """Sum of the first n masses whose float32 bits are above `bits`."""
    total = tl.zeros([CHUNK], tl.float32)
    for start in tl.range(0, n, CHUNK):
        i = start + tl.arange(0, CHUNK)
        m = tl.load(masses + i, mask=i < n, other=0.0)
        total += tl.where(m.to(tl.int32, bitcast=True) > bits, m, 0.0)
    return tl.sum(total)


@triton.jit
def least_kept(masses, n, mass, CHUNK: tl.constexpr):
    """Float32 bits of the lightest block that is kept: the least value above which the masses sum to less than the share."""
    wanted = mass * mass_above(masses, n, -1, CHUNK)
    low, high = tl.full([], -1, tl.int32), tl.full([], 0x7F800000, tl.int32)
    while high - low > 1:
        middle = low + (high - low) // 2
        enough = mass_above(masses, n, middle, CHUNK) < wanted
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, middle)
    return high


@triton.jit(do_not_specialize=LENGTHS)
def pick_blocks_kernel(
    masses, blocks, block_counts, indices, counts, i_sb, i_sg, heads, lists, q_len, k_len, n_blocks, mass, sinks, local,
    dense_below, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The kept key blocks of one block of queries, ascending, then -1, to blocks [B, H, N, N]; their number to block_counts."""
    row, head_index = tile_and_row(n_blocks)
    head_index = head_index.to(tl.int64)
    b, h = head_index // heads, head_index % heads
    n = tl.load(counts + b)
    out = (head_index * n_blocks + row) * n_blocks
    last_slot = tl.minimum((row + 1) * BLOCK, n) - 1
    here = row * BLOCK < n
    kept = indices + b * i_sb + h * lists // heads * i_sg
    here &= tl.load(kept + last_slot, mask=here, other=-1) >= k_len - q_len
    number = tl.zeros([], tl.int32)
    if here:
        all_kept = (n <= dense_below) | (mass >= 1.0)
        threshold = tl.full([], -1, tl.int32)
        if not all_kept:
            threshold = least_kept(masses + out, row + 1, mass, CHUNK)
        for start in tl.range(0, row + 1, CHUNK):
            i = start + tl.arange(0, CHUNK)
            bits = tl.load(masses + out + i, mask=i <= row, other=0.0).to(tl.int32, bitcast=True)
            take = ((bits >= threshold) | (i < sinks) | (i > row - local)) & (i <= row)
            place = number + tl.cumsum(take.to(tl.int32), 0) - 1
            tl.store(blocks + out + place, i.to(tl.int16), mask=take)
            number += tl.sum(take.to(tl.int32))
    tl.store(block_counts + head_index * n_blocks + row, number)
    for start in tl.range(number, n_blocks, CHUNK):
        i = start + tl.arange(0, CHUNK)
        tl.store(blocks + out + i, tl.full([CHUNK], -1, tl.int16), mask=i < n_blocks)


@triton.jit(do_not_specialize=LENGTHS)
def block_prefill_kernel(
    q, k, v, out, lse, indices, counts, blocks, block_counts,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, o_sl, i_sb, i_sg,
    heads, kv_heads, lists, q_len, k_len, n_blocks, tiles, section, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STRIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `sparse_prefill_kernel`, but the tile of BLOCK_M kept queries reads only the key blocks of its block's list.

    The list is ascending and ends with the block of the queries themselves, of which the last tiles mask.
    """
    tl.static_assert(BLOCK % BLOCK_M == 0 and BLOCK_M % BLOCK_N == 0)
    head_index, from_longest = schedule(section, tiles)
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    n = tl.load(counts + b)
    n_tiles = tl.maximum(tl.cdiv(n, BLOCK_M), 1)
    tile = n_tiles - 1 - from_longest
    if tile < 0:
        return
    kept = indices + b * i_sb + h * lists // heads * i_sg
    first = tile * BLOCK_M
    slots = first + tl.arange(0, BLOCK_M)
    rows = tl.load(kept + slots, mask=slots < n, other=-1) - (k_len - q_len)
    row_ok = rows >= 0
    dv = tl.arange(0, BLOCK_DV)
    out += b * o_sb + h * o_sh
    if not STRIP:
        before = tl.load(kept + first - 1, mask=first > 0, other=-1) + 1 - (k_len - q_len)
        after = tl.where(tile == n_tiles - 1, q_len, tl.max(rows) + 1)
        zero_rows(out, o_sl, tl.maximum(before, 0), after, dv, dv < DV, BLOCK_M)
    if tl.max(rows) < 0:
        return

    d = tl.arange(0, BLOCK_D)
    kv_head = h * kv_heads // heads
    q += b * q_sb + h * q_sh
    k += b * k_sb + kv_head * k_sh
    v += b * v_sb + kv_head * v_sh
    q_at = q + rows.to(tl.int64)[:, None] * q_sl + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    own = first // BLOCK
    listed = (b * heads + h) * n_blocks + own
    blocks += listed * n_blocks
    per_block: tl.constexpr = BLOCK // BLOCK_N
    steps = (tl.load(block_counts + listed) - 1) * per_block + (first - own * BLOCK) // BLOCK_N
    block = tl.load(blocks).to(tl.int32)
    for step in tl.range(0, steps):  # every key of these tiles precedes every row
        start = block * BLOCK + step % per_block * BLOCK_N
        at = tl.load(kept + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        block = tl.load(blocks + (step + 1) // per_block).to(tl.int32)  # a step ahead: loads of loads are not pipelined twice
        k_tile = load_columns(k, at, k_sl, k_sd, d, D, BLOCK_D)
        scores = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        v_tile = load_rows(v, at, v_sl, v_sd, dv, DV, BLOCK_DV)
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, scale_log2, v_tile, PRECISION)

    acc, row_max, row_sum = diagonal_steps(
        acc, row_max, row_sum, q_tile, k, v, k_sl, k_sd, v_sl, v_sd, kept, slots, first, n, scale_log2,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    store_rows(out, o_sl, acc / row_sum[:, None], rows, row_ok, DV, BLOCK_DV)
    if STRIP:
        store_lse(lse + (b * heads + h) * q_len, row_max, row_sum, rows, row_ok)
