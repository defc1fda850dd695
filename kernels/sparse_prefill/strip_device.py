"""The completion strip: every row reads its window, the sinks and the heavy tokens, beside the kept ones. Triton.

One program takes a tile of real rows in order of rank, so that padding anywhere costs nothing. It starts its online
softmax from the finished attention over the kept tokens (output and log-sum-exp) and adds the keys that are not in it.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.sparse_prefill.device import load_columns, load_rows

LENGTHS = (
    "heads", "kv_heads", "lists", "q_len", "k_len", "n_heavy", "window", "sinks",
    "s_sb", "s_sg", "h_sb", "h_sg", "l_sb", "l_sh",
)  # fmt: skip


@triton.jit
def strip_step(acc, row_max, row_sum, scores, allowed, scale_log2, v, PRECISION: tl.constexpr):
    """An online softmax step in which a row may have had no key so far."""
    scores = tl.where(allowed, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = tl.exp2(row_max - finite_max)
    p = tl.exp2(scores * scale_log2 - finite_max[:, None])
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


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


@triton.jit(do_not_specialize=LENGTHS)
def strip_kernel(
    q, k, v, out, part, part_lse, slots, heavy, order, ranks,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, o_sl, p_sb, p_sh, p_sl,
    l_sb, l_sh, s_sb, s_sg, h_sb, h_sg,
    heads, kv_heads, lists, q_len, k_len, n_heavy, window, sinks, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PADDED: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows of one head; writes every row, zero where it is padding or reads nothing.

    `slots` [B, G, Lk] is the place of a position in its kept list, or -1. `part` and `part_lse` hold the attention over
    the kept tokens, by slot if PACKED, else by row; `part` may be `out`.
    """
    tile = tl.program_id(0)
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    slots += b * s_sb + h * lists // heads * s_sg
    heavy += b * h_sb + h * lists // heads * h_sg
    order += b * k_len
    ranks += b * k_len
    t, at, rank, real, first, last = strip_rows(order, ranks, tile, q_len, k_len, PADDED, BLOCK_M)
    any_real = last >= first
    rows = at - (k_len - q_len)
    slot = tl.load(slots + at, mask=real, other=-1)
    selected = slot >= 0
    # A kept key lies behind the horizon of a selected row: that row has it already. One multiply-add an element.
    behind: tl.constexpr = 1 << 29
    hides = selected.to(tl.int32)[:, None]

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

    for start in tl.range(tl.maximum(first - window + 1, 0), tl.where((window > 0) & any_real, last + 1, 0), BLOCK_N):
        key_rank = tl.minimum(start + tl.arange(0, BLOCK_N), last + 1)  # last + 1: hidden from all rows
        key_at = tl.minimum(key_rank, k_len - 1)
        if PADDED:
            key_at = tl.load(order + key_at)
        kept = tl.where(tl.load(slots + key_at) >= 0, behind, 0)
        distance = rank[:, None] - key_rank[None, :] - hides * kept[None, :]
        allowed = distance.to(tl.uint32, bitcast=True) < window.to(tl.uint32)
        key_at = key_at.to(tl.int64)
        scores = tl.dot(q_tile, load_columns(k, key_at, k_sl, k_sd, d, D, BLOCK_D), input_precision=PRECISION)
        v_tile = load_rows(v, key_at, v_sl, v_sd, dv, DV, BLOCK_DV)
        acc, row_max, row_sum = strip_step(acc, row_max, row_sum, scores, allowed, scale_log2, v_tile, PRECISION)

    for start in tl.range(0, tl.where((last >= window) & any_real, sinks + n_heavy, 0), BLOCK_N):
        c = start + tl.arange(0, BLOCK_N)
        sink_at = tl.minimum(c, k_len - 1)
        heavy_at = tl.load(heavy + c - sinks, mask=(c >= sinks) & (c < sinks + n_heavy), other=-1)
        present = (c < sinks) | (heavy_at >= 0)
        heavy_at = tl.maximum(heavy_at, 0)
        heavy_rank = heavy_at
        if PADDED:
            sink_at = tl.load(order + sink_at)
            heavy_rank = tl.load(ranks + heavy_at) - 1
        key_rank = tl.where(c < sinks, c, heavy_rank)
        present = present & ((c < sinks) | (heavy_rank >= sinks))
        key_at = tl.where(c < sinks, sink_at, heavy_at)
        kept = tl.where(tl.load(slots + key_at) >= 0, behind, 0)
        key_rank = tl.where(present, key_rank, behind)
        allowed = key_rank[None, :] + hides * kept[None, :] <= rank[:, None] - window
        key_at = key_at.to(tl.int64)
        scores = tl.dot(q_tile, load_columns(k, key_at, k_sl, k_sd, d, D, BLOCK_D), input_precision=PRECISION)
        v_tile = load_rows(v, key_at, v_sl, v_sd, dv, DV, BLOCK_DV)
        acc, row_max, row_sum = strip_step(acc, row_max, row_sum, scores, allowed, scale_log2, v_tile, PRECISION)

    acc = tl.where((real & (row_sum > 0))[:, None], acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None], 0.0)
    o_at = out + b * o_sb + h * o_sh + rows.to(tl.int64)[:, None] * o_sl + dv[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=(t < q_len)[:, None] & (dv < DV)[None, :])
