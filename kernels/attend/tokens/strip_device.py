"""The completion strip: every row reads its window, the sinks and the heavy tokens, beside the kept ones. Triton.

One program takes a tile of real rows in order of rank, so that padding anywhere costs nothing. It starts its online
softmax from the finished attention over the kept tokens (output and log-sum-exp) and adds the keys that are not in it.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.grid_device import tile_and_row
from tsa_compile.kernels.common.rows_device import load_columns, load_rows
from tsa_compile.kernels.common.softmax_device import softmax_step_or_none

LENGTHS = (
    "heads", "kv_heads", "lists", "q_len", "k_len", "heavy", "window", "sinks",
    "s_sb", "s_sg", "h_sb", "h_sg", "l_sb", "l_sh",
)  # fmt: skip


@triton.jit
def strip_rows(order, ranks, tile, q_len, k_len, PADDED: tl.constexpr, BLOCK_M: tl.constexpr):
    """Positions and ranks of a tile's queries, which of them are real, and the ranks first..last that they span."""
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    skipped = k_len - q_len
    if PADDED:  # order: the real positions, then the padding; ranks: real positions up to and with this one
        before = tl.load(ranks + skipped - 1, mask=skipped > 0, other=0)
        n = tl.load(ranks + k_len - 1) - before
        real = t < n
        at = tl.load(order + tl.where(real, before, skipped) + t, mask=t < q_len, other=0)
    else:
        before, n = skipped, q_len
        real = t < n
        at = skipped + t
    return t, at, before + t, real, before + tile * BLOCK_M, before + tl.minimum((tile + 1) * BLOCK_M, n) - 1


@triton.jit
def far_keys(heavy_indices, order, heavy, sinks, horizon, PADDED: tl.constexpr, BLOCK: tl.constexpr):
    """How many of the sinks and heavy tokens, in this order, have a rank up to `horizon`: heavy tokens ascend."""
    if PADDED:
        horizon = tl.load(order + tl.maximum(horizon, 0))
    count = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, heavy, BLOCK):
        i = start + tl.arange(0, BLOCK)
        at = tl.load(heavy_indices + i, mask=i < heavy, other=-1)
        count += ((at >= 0) & (at <= horizon)).to(tl.int32)
    return sinks + tl.sum(count)


@triton.jit
def strip_columns(
    block, near_first, near_blocks, heavy_indices, order, heavy, sinks, k_len, PADDED: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Positions of a block's keys (-1: none), their number in order of rank, and which of them are heavy tokens.

    The first `near_blocks` blocks are the window, from rank `near_first` on; then come the sinks and the heavy tokens.
    """
    is_near = block < near_blocks
    number = tl.where(is_near, near_first + block * BLOCK_N, (block - near_blocks) * BLOCK_N) + tl.arange(0, BLOCK_N)
    is_heavy = (number >= sinks) & (not is_near)
    at = tl.load(heavy_indices + number - sinks, mask=is_heavy & (number < sinks + heavy), other=-1)
    by_rank = tl.minimum(number, k_len - 1)
    if PADDED:
        by_rank = tl.load(order + by_rank)
    return tl.where(is_heavy, at, by_rank), number, is_heavy


@triton.jit
def strip_ranks(at, number, is_heavy, slots, ranks, sinks, BEHIND: tl.constexpr, PADDED: tl.constexpr):
    """Ranks of a block's keys, BEHIND where there is none or it came as a sink; and BEHIND for kept keys, else 0."""
    there = tl.maximum(at, 0)
    heavy_rank = there
    if PADDED:
        heavy_rank = tl.load(ranks + there) - 1
    heavy_rank = tl.where((at >= 0) & (heavy_rank >= sinks), heavy_rank, BEHIND)
    kept = tl.where(tl.load(slots + there) >= 0, BEHIND, 0)
    return tl.where(is_heavy, heavy_rank, number), kept


@triton.jit(do_not_specialize=LENGTHS)
def strip_kernel(
    q, k, v, out, part, part_lse, slots, heavy_indices, order, ranks, lse,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, o_sl, p_sb, p_sh, p_sl,
    l_sb, l_sh, s_sb, s_sg, h_sb, h_sg,
    heads, kv_heads, lists, q_len, k_len, heavy, window, sinks, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows of one head; writes every row, zero where it is padding or reads nothing.

    `slots` [B, G, Lk] is the place of a position in its kept list, or -1. `part` and `part_lse` hold the attention over
    the kept tokens, by slot if PACKED, else by row; `part` may be `out`. `lse`: takes the natural log-sum-exp [B, H, Lq] of
    every row, -inf where it reads nothing; None: nobody needs it.
    """
    tile, head_index = tile_and_row(tl.cdiv(q_len, BLOCK_M))
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    slots += b * s_sb + h * lists // heads * s_sg
    heavy_indices += b * h_sb + h * lists // heads * h_sg
    order += b * k_len
    ranks += b * k_len
    t, at, rank, real, first, last = strip_rows(order, ranks, tile, q_len, k_len, PADDED, BLOCK_M)
    rows = at - (k_len - q_len)
    slot = tl.load(slots + at, mask=real, other=-1)
    selected = slot >= 0

    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    kv_head = h * kv_heads // heads
    k += b * k_sb + kv_head * k_sh
    v += b * v_sb + kv_head * v_sh
    q_at = q + b * q_sb + h * q_sh + rows.to(tl.int64)[:, None] * q_sl + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    part_row = (slot if PACKED else rows).to(tl.int64)
    part_at = part + b * p_sb + h * p_sh + part_row[:, None] * p_sl + dv[None, :]
    acc = tl.load(part_at, mask=selected[:, None] & (dv < DV)[None, :], other=0.0).to(tl.float32)
    log2_e: tl.constexpr = 1.4426950408889634
    row_max = tl.load(part_lse + b * l_sb + h * l_sh + part_row, mask=selected, other=float("-inf")) * log2_e
    row_sum = tl.where(selected, 1.0, 0.0)

    BEHIND: tl.constexpr = 1 << 29  # as a rank: behind every row's horizon
    hides = selected.to(tl.int32)[:, None]  # a kept key is behind the horizon of a selected row, which has it already
    near_first = tl.maximum(first - window + 1, 0)
    near_blocks = tl.where((window > 0) & (last >= first), tl.cdiv(last + 1 - near_first, BLOCK_N), 0)
    far = far_keys(heavy_indices, order, heavy, sinks, last - window, PADDED, 128)
    far_blocks = tl.where((last >= window) & (last >= first), tl.cdiv(far, BLOCK_N), 0)
    # For the mask, positions are read two blocks ahead and what depends on them one block ahead, by hand: the compiler
    # pipelines only what a product reads.
    mask_at, number, is_heavy = strip_columns(
        0, near_first, near_blocks, heavy_indices, order, heavy, sinks, k_len, PADDED, BLOCK_N
    )
    key_rank, kept = strip_ranks(mask_at, number, is_heavy, slots, ranks, sinks, BEHIND, PADDED)
    next_at, number, is_heavy = strip_columns(
        1, near_first, near_blocks, heavy_indices, order, heavy, sinks, k_len, PADDED, BLOCK_N
    )
    for block in tl.range(0, near_blocks + far_blocks):
        next_rank, next_kept = strip_ranks(next_at, number, is_heavy, slots, ranks, sinks, BEHIND, PADDED)
        key_at, _, _ = strip_columns(block, near_first, near_blocks, heavy_indices, order, heavy, sinks, k_len, PADDED, BLOCK_N)
        next_at, number, is_heavy = strip_columns(
            block + 2, near_first, near_blocks, heavy_indices, order, heavy, sinks, k_len, PADDED, BLOCK_N
        )
        # near: 0 <= distance < window; far: window <= distance
        nearest = tl.where(block < near_blocks, 0, window)
        reach = tl.where(block < near_blocks, window, BEHIND).to(tl.uint32)
        distance = (rank - nearest)[:, None] - (key_rank[None, :] + hides * kept[None, :])
        allowed = distance.to(tl.uint32, bitcast=True) < reach
        key_at = tl.maximum(key_at, 0).to(tl.int64)
        scores = tl.dot(q_tile, load_columns(k, key_at, k_sl, k_sd, d, D, BLOCK_D), input_precision=PRECISION)
        v_tile = load_rows(v, key_at, v_sl, v_sd, dv, DV, BLOCK_DV)
        acc, row_max, row_sum = softmax_step_or_none(acc, row_max, row_sum, scores, allowed, scale_log2, v_tile, PRECISION)
        key_rank, kept = next_rank, next_kept

    acc = tl.where((real & (row_sum > 0))[:, None], acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None], 0.0)
    o_at = out + b * o_sb + h * o_sh + rows.to(tl.int64)[:, None] * o_sl + dv[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=(t < q_len)[:, None] & (dv < DV)[None, :])
    if lse is not None:
        ln2: tl.constexpr = 0.6931471805599453
        reads = real & (row_sum > 0)
        value = tl.where(reads, (row_max + tl.log2(tl.where(reads, row_sum, 1.0))) * ln2, float("-inf"))
        tl.store(lse + (b * heads + h) * q_len + rows, value, mask=t < q_len)
