"""Attention that reads every key and some values: the masses of all keys, then what is drawn from them. Triton.

Two launches, in this order, and one that adds parts if a head draws many. Which keys are drawn is computed in whole numbers, as
draw.py has it: no sum depends on its order. A sample is one value that is read: a head's samples are so few bytes beside the keys
that heads of a group do not wait for each other to share them.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.attend.sampled.draw_device import (
    TILE,
    exponents_of,
    key_of_sample,
    masses_of_keys,
    offset_of,
    position_word,
    tile_of_sample,
    visible_logits,
    whole_of_row,
)
from tsa_compile.kernels.common.cache_device import LOG2_E, key_range, keys_of_tile, load_tile, rows_of_keys
from tsa_compile.kernels.common.splits_device import LN_2

LENGTHS = (
    "group", "kv_heads", "heads", "capacity", "block", "per_row", "blocks_sb", "splits", "parts", "tiles", "tiles_m", "mask_sb",
    "mask_sl", "bias_sb", "bias_sh", "bias_sl", "samples", "spare", "seed_sb",
)  # fmt: skip


@triton.jit(do_not_specialize=LENGTHS)
def mass_kernel(
    q, k, masses, totals, exponents, blocks, start, lengths, key_mask, bias,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sl, k_sd, mask_sb, mask_sl, bias_sb, bias_sh, bias_sl, blocks_sb,
    kv_heads, group, capacity, block, per_row, splits, tiles, tiles_m, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, TILES: tl.constexpr, CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): a part of the keys, TILES tiles at a time, for BLOCK_M query heads.

    masses: int32 [B, H, tiles * 64]; totals, exponents: int32, float32 [B, H, tiles]; `tiles`: a multiple of TILES. What lies
    before the first step that has a key, and behind the last, is not written.
    """
    BLOCK_N: tl.constexpr = TILES * TILE
    tile_m, head_index, split = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ok = m < group
    h = kv_head * group + tl.minimum(m, group - 1)
    first, end = key_range(start, lengths, b, capacity, 1, 0)
    low = first // BLOCK_N
    count = tl.maximum(tl.cdiv(end, BLOCK_N) - low, 0)
    low, high = low + split * count // splits, low + (split + 1) * count // splits
    if blocks is not None:
        blocks += b * blocks_sb
    if key_mask is not None:
        key_mask += b * mask_sb
    k += kv_head * k_sh
    d, n, t = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N), tl.arange(0, TILES)
    q_at = q + b * q_sb + (h * q_sh)[:, None] + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=query_ok[:, None] & (d < D)[None, :], other=0.0)
    of_head = ((head_index * group + m).to(tl.int64) * tiles)[:, None]
    next_j, next_entry, next_there = keys_of_tile(low, None, 0, blocks, key_mask, mask_sl, block, first, end, BLOCK_N)
    for step in tl.range(low, high):
        j, entry, there = next_j, next_entry, next_there
        next_j, next_entry, next_there = keys_of_tile(  # what addresses depend on is read a step ahead
            step + 1, None, 0, blocks, key_mask, mask_sl, block, first, end, BLOCK_N
        )
        k_tile = load_tile(rows_of_keys(k, k_sb, k_sl, j, entry, blocks, block, per_row, b), k_sd, there, D, BLOCK_D)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        logits = visible_logits(logits, bias, b * bias_sb + h * bias_sh, bias_sl, query_ok, j, there, softcap, CAPPED)
        logits = tl.reshape(logits, [BLOCK_M, TILES, TILE])
        exponent = exponents_of(logits)
        mass = masses_of_keys(logits, exponent)
        tile = step * TILES + t[None, :]
        tl.store(totals + of_head + tile, tl.sum(mass, 2), mask=query_ok[:, None])
        tl.store(exponents + of_head + tile, exponent, mask=query_ok[:, None])
        at = masses + (of_head + step * TILES) * TILE + n[None, :]
        tl.store(at, tl.reshape(mass, [BLOCK_M, BLOCK_N]), mask=query_ok[:, None])


@triton.jit
def log_of_row(top, whole, spare, sinks, h):
    """(lse of the row in base 2, the part of it that keys have)."""
    logs = tl.where(whole > 0, tl.log2(tl.maximum(whole, 1).to(tl.float32)) + (top - 24.0 - spare), float("-inf"))
    share = 1.0
    if sinks is not None:
        sink = tl.load(sinks + h).to(tl.float32) * LOG2_E
        best = tl.maximum(logs, sink)
        keys, rest = tl.exp2(logs - best), tl.exp2(sink - best)
        logs, share = best + tl.log2(keys + rest), keys / (keys + rest)
    return logs, share


@triton.jit(do_not_specialize=LENGTHS)
def sample_kernel(
    v, out, lse, part, masses, totals, exponents, blocks, start, lengths, sinks, seed,
    v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, blocks_sb, seed_sb,
    heads, group, capacity, block, per_row, tiles, samples, spare, parts,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr, EQUAL: tl.constexpr, ONE: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, parts): the values that a part of a head's samples draw, CHUNK at a time, added by their weights.

    lse: float32 [B, H], natural. part: float32 [B, H, parts, DV]; ONE: there is one, and out [B, H, 1, DV] is written.
    EQUAL: form "flash".
    """
    number, own = tl.program_id(0), tl.program_id(1)
    b, h = (number // heads).to(tl.int64), number % heads
    first, end = key_range(start, lengths, b, capacity, 1, 0)
    low = first // TILE
    high = tl.maximum(tl.cdiv(end, TILE), low)
    sampled = end - first > samples
    each = tl.maximum(samples // tl.maximum(high - low, 1), 1) if EQUAL else samples
    slots = tl.where(sampled, each * (high - low) if EQUAL else samples, tl.maximum(end - first, 0))
    totals += number.to(tl.int64) * tiles
    exponents += number.to(tl.int64) * tiles
    masses += number.to(tl.int64) * tiles * TILE
    v += (h // group).to(tl.int64) * v_sh
    seed += b * seed_sb
    if blocks is not None:
        blocks += b * blocks_sb
    top, whole = whole_of_row(totals, exponents, low, high, spare, BLOCK_T)
    logs, share = log_of_row(top, whole, spare, sinks, h)
    tl.store(lse + number, logs * LN_2, mask=own == 0)
    divisor, row = tl.maximum(whole, 1), b.to(tl.int32)
    of_row = offset_of(position_word(seed, -1, h, row, end - 1), whole)
    head, dv = tl.zeros([CHUNK], tl.int32) + h, tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    chunks = tl.cdiv(slots, CHUNK)
    for chunk in tl.range(own * chunks // parts, (own + 1) * chunks // parts, disable_licm=True):
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        live = (i < slots) & (whole > 0)
        j = first + i
        tile, rank, drawn = j // TILE, i * 0, i * 0 + 1
        if sampled:
            if EQUAL:
                tile, rank, drawn = low + i // each, i % each, i * 0 + each
            else:
                tile, rank, drawn = tile_of_sample(
                    totals, exponents, low, high, spare, top, divisor, samples, of_row, chunk * CHUNK, BLOCK_T, CHUNK
                )
        total = tl.load(totals + tile, mask=live, other=0)
        lower = tl.minimum(tl.load(exponents + tile, mask=live, other=0.0) - top, 0.0)  # above 0 in tiles without keys alone
        unit = tl.exp2(lower + spare) / divisor.to(tl.float32) * share  # of a mass
        if sampled:
            offset = offset_of(position_word(seed, tile, head, row, end - 1), total.to(tl.int64))
            j = tile * TILE + key_of_sample(masses, tile, rank, drawn, total, offset, live)
            weight = tl.where(live, 1.0, 0.0) * (share / samples)
            if EQUAL:
                weight = total.to(tl.float32) * unit / each
        else:
            weight = tl.load(masses + j, mask=live, other=0).to(tl.float32) * unit
        there = live & (weight > 0)
        entry = j
        if blocks is not None:
            entry = tl.load(blocks + j // block, mask=there, other=0)
        values = load_tile(rows_of_keys(v, v_sb, v_sl, j, entry, blocks, block, per_row, b), v_sd, there, DV, BLOCK_DV)
        acc += tl.sum(values.to(tl.float32) * weight[:, None], 0)
    if ONE:
        tl.store(out + b * o_sb + h * o_sh + dv, acc.to(out.dtype.element_ty), mask=dv < DV)
    else:
        tl.store(part + (number.to(tl.int64) * parts + own) * DV + dv, acc, mask=dv < DV)


@triton.jit(do_not_specialize=LENGTHS)
def add_parts_kernel(part, out, o_sb, o_sh, heads, parts, DV: tl.constexpr, BLOCK_DV: tl.constexpr, AT_ONCE: tl.constexpr):
    """Grid (B * H): out [B, H, 1, DV] of part, float32 [B, H, parts, DV]."""
    number = tl.program_id(0)
    n, dv = tl.arange(0, AT_ONCE), tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for at in tl.range(0, parts, AT_ONCE):
        rows = number.to(tl.int64) * parts + at + n
        acc += tl.sum(
            tl.load(part + rows[:, None] * DV + dv[None, :], mask=(at + n < parts)[:, None] & (dv < DV)[None, :], other=0.0), 0
        )
    at_out = out + (number // heads).to(tl.int64) * o_sb + number % heads * o_sh + dv
    tl.store(at_out, acc.to(out.dtype.element_ty), mask=dv < DV)
