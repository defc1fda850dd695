"""Attention that reads every key and some values, form "flash": each tile of 64 keys draws as many, in one pass. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.attend.sampled.draw_device import (
    MASS_ONE,
    TILE,
    exponent_of,
    offset_of,
    position_word,
    systematic,
    tile_masses,
    visible_logits,
)
from tsa_compile.kernels.common.cache_device import key_range, keys_of_tile, load_tile, rows_of_keys
from tsa_compile.kernels.common.splits_device import log_sum

LENGTHS = (
    "group", "kv_heads", "capacity", "block", "per_row", "blocks_sb", "splits", "tiles_m", "mask_sb", "mask_sl", "bias_sb",
    "bias_sh", "bias_sl", "samples", "seed_sb",
)  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def flash_kernel(
    q, k, v, part, part_lse, blocks, start, lengths, key_mask, bias, seed,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, mask_sb, mask_sl, bias_sb, bias_sh, bias_sl, blocks_sb,
    seed_sb, kv_heads, group, capacity, block, per_row, splits, tiles_m, samples, scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): a part of the tiles, for BLOCK_M query heads; parts are joined by `merge_kernel`.

    part: float32 [B, H, splits, DV]; part_lse: [B, H, splits], base 2. A value is read once for the heads of a program.
    """
    tile_m, head_index, split = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ok = m < group
    h = kv_head * group + tl.minimum(m, group - 1)
    number = head_index.to(tl.int64) * group + m
    first, end = key_range(start, lengths, b, capacity, 1, 0)
    low = first // TILE
    count = tl.maximum(tl.cdiv(end, TILE) - low, 0)
    sampled = end - first > samples
    each = tl.maximum(samples // tl.maximum(count, 1), 1)
    low, high = low + split * count // splits, low + (split + 1) * count // splits
    if low >= high:
        tl.store(part_lse + number * splits + split, float("-inf"), mask=query_ok)
        return
    if blocks is not None:
        blocks += b * blocks_sb
    if key_mask is not None:
        key_mask += b * mask_sb
    k += kv_head * k_sh
    v += kv_head * v_sh
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_at = q + b * q_sb + (h * q_sh)[:, None] + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=query_ok[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top, whole = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(low, high):
        j, entry, there = keys_of_tile(tile, None, 0, blocks, key_mask, mask_sl, block, first, end, TILE)
        k_tile = load_tile(rows_of_keys(k, k_sb, k_sl, j, entry, blocks, block, per_row, b), k_sd, there, D, BLOCK_D)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        logits = visible_logits(logits, bias, b * bias_sb + h * bias_sh, bias_sl, query_ok, j, there, softcap, CAPPED)
        exponent = exponent_of(logits)
        mass = tile_masses(logits, exponent)
        total = tl.sum(mass, 1)
        share = total.to(tl.float32) / MASS_ONE
        word = position_word(seed + b * seed_sb, tile, h.to(tl.int32), b.to(tl.int32), end - 1)
        times = systematic(mass, total, tl.zeros_like(total) + each, offset_of(word, total.to(tl.int64)))
        weight = tl.where(
            sampled, times.to(tl.float32), mass.to(tl.float32) / MASS_ONE
        )  # counts are below 64: exact in any dtype
        value = tl.where(sampled, share / each, 1.0)
        drawn = there & (tl.max(weight, 0) > 0)
        v_tile = load_tile(rows_of_keys(v, v_sb, v_sl, j, entry, blocks, block, per_row, b), v_sd, drawn, DV, BLOCK_DV)
        new = tl.maximum(top, tl.where(total > 0, exponent, float("-inf")))
        finite = tl.where(new == float("-inf"), 0.0, new)
        shrink, factor = tl.exp2(top - finite), tl.where(total > 0, tl.exp2(exponent - finite), 0.0)
        whole = whole * shrink + share * factor
        sums = tl.dot(weight.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        acc = acc * shrink[:, None] + sums * (value * factor)[:, None]
        top = new
    logs, total = log_sum(top, whole)
    p_at = part + (number * splits + split)[:, None] * DV + dv[None, :]
    tl.store(p_at, acc / total[:, None], mask=query_ok[:, None] & (dv < DV)[None, :])
    tl.store(part_lse + number * splits + split, logs, mask=query_ok)
