"""Attention that reads every key and some values, form "prop": masses, samples by tile, keys drawn, values added. Triton.

Four launches, in this order. Which keys are drawn is computed in whole numbers, as draw.py has it: no sum depends on its order.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.attend.sampled.draw_device import (
    TILE,
    exponent_of,
    offset_of,
    position_word,
    systematic,
    tile_mass,
    tile_masses,
    visible_logits,
)
from tsa_compile.kernels.common.cache_device import LOG2_E, key_range, keys_of_tile, load_tile, rows_of_keys
from tsa_compile.kernels.common.splits_device import LN_2

LENGTHS = (
    "group", "kv_heads", "capacity", "block", "per_row", "blocks_sb", "splits", "tiles", "tiles_m", "mask_sb", "mask_sl",
    "bias_sb", "bias_sh", "bias_sl", "samples", "slots", "spare", "seed_sb",
)  # fmt: skip


@triton.jit
def tile_range(start, lengths, b, capacity):
    """First position of a key, the one behind the last, and the tiles that they lie in, the last one excluded."""
    first, end = key_range(start, lengths, b, capacity, 1, 0)
    return first, end, first // TILE, tl.maximum(tl.cdiv(end, TILE), first // TILE)


@triton.jit(do_not_specialize=LENGTHS)
def mass_kernel(
    q, k, masses, totals, exponents, blocks, start, lengths, key_mask, bias,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sl, k_sd, mask_sb, mask_sl, bias_sb, bias_sh, bias_sl, blocks_sb,
    kv_heads, group, capacity, block, per_row, splits, tiles, tiles_m, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): a part of the tiles, for BLOCK_M query heads.

    masses: int32 [B, H, tiles * 64]; totals, exponents: int32, float32 [B, H, tiles]. Tiles that hold no key are not written.
    """
    tile_m, head_index, split = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ok = m < group
    h = kv_head * group + tl.minimum(m, group - 1)
    first, end, low, high = tile_range(start, lengths, b, capacity)
    count = high - low
    low, high = low + split * count // splits, low + (split + 1) * count // splits
    if blocks is not None:
        blocks += b * blocks_sb
    if key_mask is not None:
        key_mask += b * mask_sb
    k += kv_head * k_sh
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, TILE)
    q_at = q + b * q_sb + (h * q_sh)[:, None] + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=query_ok[:, None] & (d < D)[None, :], other=0.0)
    of_head = (head_index * group + m).to(tl.int64) * tiles
    for tile in tl.range(low, high):
        j, entry, there = keys_of_tile(tile, None, 0, blocks, key_mask, mask_sl, block, first, end, TILE)
        k_tile = load_tile(rows_of_keys(k, k_sb, k_sl, j, entry, blocks, block, per_row, b), k_sd, there, D, BLOCK_D)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        logits = visible_logits(logits, bias, b * bias_sb + h * bias_sh, bias_sl, query_ok, j, there, softcap, CAPPED)
        exponent = exponent_of(logits)
        mass = tile_masses(logits, exponent)
        tl.store(masses + (of_head + tile)[:, None] * TILE + n[None, :], mass, mask=query_ok[:, None])
        tl.store(totals + of_head + tile, tl.sum(mass, 1), mask=query_ok)
        tl.store(exponents + of_head + tile, exponent, mask=query_ok)


@triton.jit(do_not_specialize=LENGTHS)
def tile_samples_kernel(
    totals, exponents, counts, first_slots, worth, lse, indices, start, lengths, sinks, seed,
    seed_sb, kv_heads, group, capacity, tiles, samples, slots, spare,
    BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk): how many samples each tile of each head gets, and where what they draw is written.

    counts: int32 [B, H, tiles]; first_slots: int32 [B, Hk, tiles]. lse: float32 [B, H], natural. indices: int32 [B, Hk, slots],
    -1 behind the last slot that a tile has. worth: float32 [B, H], of one sample; in a row that is exact, its lse in base 2.
    """
    head_index = tl.program_id(0)
    b, m, t = head_index // kv_heads, tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_T)
    ok = m < group
    h = head_index % kv_heads * group + tl.minimum(m, group - 1)
    first, end, low, high = tile_range(start, lengths, b, capacity)
    of_head = (head_index * group + m).to(tl.int64) * tiles
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for at in tl.range(low, high, BLOCK_T):
        there = ok[:, None] & (at + t < high)[None, :]
        total = tl.load(totals + of_head[:, None] + at + t[None, :], mask=there, other=0)
        exponent = tl.load(exponents + of_head[:, None] + at + t[None, :], mask=there, other=0.0)
        top = tl.maximum(top, tl.max(tl.where(total > 0, exponent, float("-inf")), 1))
    some = top > float("-inf")
    top = tl.where(some, top, 0.0)
    whole = tl.zeros([BLOCK_M], tl.int64)
    for at in tl.range(low, high, BLOCK_T):
        there = ok[:, None] & (at + t < high)[None, :]
        total = tl.load(totals + of_head[:, None] + at + t[None, :], mask=there, other=0)
        exponent = tl.load(exponents + of_head[:, None] + at + t[None, :], mask=there, other=0.0)
        whole += tl.sum(tile_mass(total, exponent, top[:, None], spare), 1)

    logs = tl.where(some, tl.log2(tl.maximum(whole, 1).to(tl.float32)) + (top - 24.0 - spare), float("-inf"))
    share = tl.where(some, 1.0, 0.0)
    all_logs = logs
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        best = tl.maximum(logs, sink)
        all_logs = best + tl.log2(tl.exp2(logs - best) + tl.exp2(sink - best))
        share = tl.exp2(logs - all_logs)
    sampled = end - first > samples
    tl.store(lse + head_index * group + m, all_logs * LN_2, mask=ok)
    tl.store(worth + head_index * group + m, tl.where(sampled, share / samples, all_logs), mask=ok)
    used = tl.maximum(end - first, 0)
    if sampled:
        offset = offset_of(position_word(seed + b * seed_sb, -1, h, b, end - 1), whole)
        seen, used = tl.zeros([BLOCK_M], tl.int64), tl.zeros([], tl.int32)
        for at in tl.range(low, high, BLOCK_T):
            there = ok[:, None] & (at + t < high)[None, :]
            total = tl.load(totals + of_head[:, None] + at + t[None, :], mask=there, other=0)
            exponent = tl.load(exponents + of_head[:, None] + at + t[None, :], mask=there, other=0.0)
            mass = tile_mass(total, exponent, top[:, None], spare)
            ends = seen[:, None] + tl.cumsum(mass, 1)
            divisor = tl.maximum(whole, 1)[:, None]
            drawn = (offset[:, None] + samples * ends) // divisor - (offset[:, None] + samples * (ends - mass)) // divisor
            drawn = drawn.to(tl.int32)
            tl.store(counts + of_head[:, None] + at + t[None, :], drawn, mask=there)
            room = tl.minimum(tl.sum(drawn, 0), TILE)
            tl.store(first_slots + head_index.to(tl.int64) * tiles + at + t, used + tl.cumsum(room, 0) - room, mask=at + t < high)
            seen += tl.sum(mass, 1)
            used += tl.sum(room)
    for at in tl.range(used, slots, BLOCK_T):
        tl.store(indices + head_index.to(tl.int64) * slots + at + t, -1, mask=at + t < slots)


@triton.jit(do_not_specialize=LENGTHS)
def draw_kernel(
    masses, totals, exponents, counts, first_slots, worth, indices, weights, start, lengths, seed,
    seed_sb, kv_heads, group, capacity, tiles, samples, slots,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, B * Hk): the keys that a tile's samples draw, each once for its KV head, and what each head weighs them by.

    indices: int32 [B, Hk, slots], -1 where none; weights: float32 [B, H, slots].
    """
    tile, head_index = tl.program_id(0), tl.program_id(1)
    b, m, n = head_index // kv_heads, tl.arange(0, BLOCK_M), tl.arange(0, TILE)
    first, end, low, high = tile_range(start, lengths, b, capacity)
    if (tile < low) | (tile >= high):
        return
    ok = m < group
    of_head = (head_index * group + m).to(tl.int64)
    sampled = end - first > samples
    drawn = tl.load(counts + of_head * tiles + tile, mask=ok & sampled, other=0)
    room = tl.minimum(tl.sum(drawn), TILE)
    if sampled & (room == 0):
        return
    mass = tl.load(masses + (of_head * tiles + tile)[:, None] * TILE + n[None, :], mask=ok[:, None], other=0)
    value = tl.load(worth + of_head, mask=ok, other=0.0)
    j = tile * TILE + n
    indices += head_index.to(tl.int64) * slots
    at = weights + of_head[:, None] * slots
    if sampled:
        total = tl.load(totals + of_head * tiles + tile, mask=ok, other=0)
        h = head_index % kv_heads * group + m
        offset = offset_of(position_word(seed + b * seed_sb, tile, h, b, end - 1), total.to(tl.int64))
        times = systematic(mass, total, drawn, offset)
        is_drawn = (tl.max(times, 0) > 0).to(tl.int32)
        slot = tl.load(first_slots + head_index.to(tl.int64) * tiles + tile) + tl.cumsum(is_drawn, 0) - 1
        tl.store(indices + slot, j, mask=is_drawn > 0)
        tl.store(at + slot[None, :], times * value[:, None], mask=ok[:, None] & (is_drawn > 0)[None, :])
        unused = tl.load(first_slots + head_index.to(tl.int64) * tiles + tile) + n
        tl.store(indices + unused, -1, mask=(n >= tl.sum(is_drawn)) & (n < room))
    else:
        slot, there = j - first, (j >= first) & (j < end)
        exponent = tl.load(exponents + of_head * tiles + tile, mask=ok, other=0.0)
        power = tl.where(tl.max(mass, 1) > 0, exponent - 24.0 - value, 0.0)  # infinite without masses
        weight = mass.to(tl.float32) * tl.exp2(power)[:, None]
        tl.store(indices + slot, tl.where(tl.max(mass, 0) > 0, j, -1), mask=there)
        tl.store(at + slot[None, :], weight, mask=ok[:, None] & there[None, :])


@triton.jit(do_not_specialize=LENGTHS)
def value_kernel(
    v, out, part, indices, weights, blocks, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, blocks_sb,
    kv_heads, group, block, per_row, slots, splits, tiles_m,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): adds the listed values by their weights, for BLOCK_M query heads.

    part: float32 [B, H, splits, DV], of several parts of the slots. ONE: there is one, and out [B, H, 1, DV] is written.
    """
    tile_m, head_index, split = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    m, n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, TILE)
    ok = m < group
    number = head_index.to(tl.int64) * group + m
    indices += head_index.to(tl.int64) * slots
    if blocks is not None:
        blocks += b * blocks_sb
    v += kv_head * v_sh
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    steps = tl.cdiv(slots, TILE)
    for step in tl.range(split * steps // splits, (split + 1) * steps // splits):
        slot = step * TILE + n
        j = tl.load(indices + slot, mask=slot < slots, other=-1)
        there = j >= 0
        weight = tl.load(weights + number[:, None] * slots + slot[None, :], mask=ok[:, None] & there[None, :], other=0.0)
        entry = j
        if blocks is not None:
            entry = tl.load(blocks + j // block, mask=there, other=0)
        tile = load_tile(rows_of_keys(v, v_sb, v_sl, j, entry, blocks, block, per_row, b), v_sd, there, DV, BLOCK_DV)
        high = weight.to(tile.dtype)  # weights in two parts: a product keeps all of a count's digits
        low = (weight - high.to(tl.float32)).to(tile.dtype)
        acc = tl.dot(high, tile, acc, input_precision=PRECISION)
        acc = tl.dot(low, tile, acc, input_precision=PRECISION)
    dv = tl.arange(0, BLOCK_DV)
    stored = ok[:, None] & (dv < DV)[None, :]
    if ONE:
        at = out + b * o_sb + ((kv_head * group + m) * o_sh)[:, None] + dv[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=stored)
    else:
        tl.store(part + (number * splits + split)[:, None] * DV + dv[None, :], acc, mask=stored)
