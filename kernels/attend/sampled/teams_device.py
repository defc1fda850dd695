"""Attention to sampled teams of keys: which ones each query head reads, and their keys and values. Triton.

Three launches, in this order, and a merge. What a team's bits are: common/teams.py; what is computed: teams.py.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.attend.sampled.draw_device import TILE, position_word
from tsa_compile.kernels.common.cache_device import LOG2_E, key_range, keys_of_tile, load_tile, rows_of_keys
from tsa_compile.kernels.common.pages_device import PAGE, place_of_page
from tsa_compile.kernels.common.splits_device import log_sum
from tsa_compile.kernels.common.teams_device import SLOTS, number_of_teams, representative, team_of_row

BINS = tl.constexpr(2048)
AT_ONCE = tl.constexpr(4096)  # ranks
LENGTHS = (
    "group", "kv_heads", "capacity", "block", "per_row", "block_pages", "index_row", "blocks_sb", "splits", "slots", "tiles_m",
    "mask_sb", "mask_sl", "recent", "draws", "seed_sb", "heads",
)  # fmt: skip


@triton.jit
def gumbel(word):
    """Gumbel noise of words in [0, 2**32), as int64."""
    u = tl.minimum((word.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    few = u * (1.0 + u * (0.5 + u * 0.3333333333333333))  # -log(1 - u) of a small u
    return -tl.log(tl.where(u < 1e-3, few, -tl.log(1.0 - u)))


@triton.jit
def rank_of(y):
    """int32 from 1 on, in the order of float32 `y`, whose last bit does not count."""
    bits = y.to(tl.int32, bitcast=True)
    ordered = tl.where(bits >= 0, bits, bits ^ 0x7FFFFFFF).to(tl.int64) + 0x80000000
    return tl.maximum(ordered >> 1, 1).to(tl.int32)


@triton.jit
def from_rank(rank):
    """The float32 that has this rank."""
    ordered = ((rank.to(tl.int64) << 1) - 0x80000000).to(tl.int32)
    return tl.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def drawn_pages(first, end, recent):
    """Pages whose teams are drawn: the first, and the one behind the last. Later ones are read whole."""
    low = first // PAGE
    return low, tl.maximum((end - 1) // PAGE - recent + 1, low)


@triton.jit
def shown(key_mask, mask_sl, j, ok):
    """Which of the positions j, where `ok`, no mask hides."""
    if key_mask is not None:
        ok = ok & tl.load(key_mask + j.to(tl.int64) * mask_sl, mask=ok, other=0).to(tl.int1)
    return ok


@triton.jit(do_not_specialize=LENGTHS)
def team_scores_kernel(
    q, k, teams, phis, ranks, blocks, start, lengths, key_mask, seed,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sl, k_sd, teams_sb, teams_sh, mask_sb, mask_sl, blocks_sb, seed_sb,
    kv_heads, group, capacity, block, per_row, block_pages, index_row, slots, recent, splits, tiles_m, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): a part of the drawn pages, 16 at a time, for BLOCK_M query heads.

    phis, ranks: float32, int32 [B, H, slots], 4 of each page: log masses, and ranks of these with noise; 0: there is no team.
    """
    tile_m, head_index, split = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ok = m < group
    h = kv_head * group + tl.minimum(m, group - 1)
    first, end = key_range(start, lengths, b, capacity, 1, 0)
    low, high = drawn_pages(first, end, recent)
    if key_mask is not None:
        key_mask += b * mask_sb
    i, row, d = tl.arange(0, TILE), tl.arange(0, PAGE), tl.arange(0, BLOCK_D)
    q_at = q + b * q_sb + (h * q_sh)[:, None] + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=query_ok[:, None] & (d < D)[None, :], other=0.0)
    of_head = ((head_index * group + m).to(tl.int64) * slots)[:, None]
    count = tl.cdiv(high - low, PAGE)
    for tile in tl.range(split * count // splits, (split + 1) * count // splits):
        slot = (low + tile * PAGE) * SLOTS + i
        page, s = slot // SLOTS, slot % SLOTS
        inside = page < high
        owner, place = place_of_page(page, inside, blocks, blocks_sb, block_pages, index_row, b)
        at = teams + owner.to(tl.int64) * teams_sb + kv_head * teams_sh + place
        code = tl.load(at, mask=inside, other=0)
        j = page * PAGE + representative(code, s)
        there = shown(key_mask, mask_sl, j, inside & (s < number_of_teams(code)) & (j >= first) & (j < end))
        all_j = (page * PAGE)[:, None] + row[None, :]
        is_member = there[:, None] & (team_of_row(code[:, None], row[None, :]) == s[:, None])
        size = tl.sum(shown(key_mask, mask_sl, all_j, is_member & (all_j >= first) & (all_j < end)).to(tl.float32), 1)
        entry = j
        if blocks is not None:
            entry = tl.load(blocks + b * blocks_sb + j // block, mask=there, other=0)
        k_tile = load_tile(
            rows_of_keys(k + kv_head * k_sh, k_sb, k_sl, j, entry, blocks, block, per_row, b), k_sd, there, D, BLOCK_D
        )
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        phi = logits + tl.log(tl.maximum(size, 1.0))[None, :]
        ok = there[None, :] & (tl.abs(phi) < float("inf"))
        zero = tl.zeros([BLOCK_M, TILE], tl.int32)
        word = position_word(seed + b * seed_sb, zero + slot[None, :], zero + h.to(tl.int32)[:, None], b.to(tl.int32), end - 1)
        stored = query_ok[:, None] & inside[None, :]
        tl.store(phis + of_head + slot[None, :], phi, mask=stored)
        tl.store(ranks + of_head + slot[None, :], tl.where(ok, rank_of(phi + gumbel(word)), 0), mask=stored)


@triton.jit(do_not_specialize=LENGTHS)
def team_cut_kernel(ranks, cuts, start, lengths, heads, capacity, slots, recent, draws):
    """Grid (B * H): the rank above which `draws` teams are, at most, to cuts int32 [B, H]; 0: there are no more.

    Radix search: 11, 10 and 10 bits.
    """
    number = tl.program_id(0)
    first, end = key_range(start, lengths, number // heads, capacity, 1, 0)
    low, high = drawn_pages(first, end, recent)
    ranks += number.to(tl.int64) * slots + low * SLOTS
    n, bin = (high - low) * SLOTS, tl.arange(0, BINS)
    cut, need, width = tl.zeros([], tl.int32), draws + 1, tl.full([], 11, tl.int32)
    shift, enough = tl.full([], 20, tl.int32), tl.full([], 1, tl.int32)
    while (shift >= 0) & (enough > 0):
        count = tl.zeros([BINS], tl.int32)
        for at in tl.range(0, n, AT_ONCE):
            i = at + tl.arange(0, AT_ONCE)
            rank = tl.load(ranks + i, mask=i < n, other=0)
            upper = rank >> shift
            count += tl.histogram(upper & ((1 << width) - 1), BINS, mask=(rank > 0) & ((upper >> width) == cut))
        above = tl.sum(count) - tl.cumsum(count, 0)  # how many in higher bins
        here = (above < need) & (above + count >= need)
        enough = tl.sum(here.to(tl.int32))
        cut = (cut << width) | tl.sum(tl.where(here, bin, 0))
        need -= tl.sum(tl.where(here, above, 0))
        width = tl.full([], 10, tl.int32)
        shift -= 10
    tl.store(cuts + number, tl.where(enough > 0, cut, 0))


@triton.jit(do_not_specialize=LENGTHS)
def team_attention_kernel(
    q, k, v, teams, phis, ranks, cuts, part, part_lse, blocks, start, lengths, key_mask,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, teams_sb, teams_sh, mask_sb, mask_sl, blocks_sb,
    kv_heads, group, capacity, block, per_row, block_pages, index_row, slots, recent, splits, tiles_m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): a part of the tiles of 64 keys, for BLOCK_M query heads; `merge_kernel` joins the parts.

    Rows of K and V that no head of the program reads are not loaded. part: float32 [B, H, splits, DV]; part_lse: [B, H, splits],
    base 2.
    """
    tile_m, head_index, split = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ok = m < group
    h = kv_head * group + tl.minimum(m, group - 1)
    number = head_index.to(tl.int64) * group + m
    first, end = key_range(start, lengths, b, capacity, 1, 0)
    _, exact = drawn_pages(first, end, recent)
    low = first // TILE
    count = tl.maximum(tl.cdiv(end, TILE) - low, 0)
    low, high = low + split * count // splits, low + (split + 1) * count // splits
    blocks_of = blocks
    if blocks is not None:
        blocks_of += b * blocks_sb
    if key_mask is not None:
        key_mask += b * mask_sb
    k += kv_head * k_sh
    v += kv_head * v_sh
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_at = q + b * q_sb + (h * q_sh)[:, None] + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=query_ok[:, None] & (d < D)[None, :], other=0.0)
    cut = tl.load(cuts + number, mask=query_ok, other=0)
    tau = tl.where(cut > 0, from_rank(cut), -1e30)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    top, whole = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for tile in tl.range(low, high):
        j, entry, there = keys_of_tile(tile, None, 0, blocks_of, key_mask, mask_sl, block, first, end, TILE)
        page = j // PAGE
        is_drawn = there & (page < exact)
        owner, place = place_of_page(page, is_drawn, blocks, blocks_sb, block_pages, index_row, b)
        code = tl.load(teams + owner.to(tl.int64) * teams_sb + kv_head * teams_sh + place, mask=is_drawn, other=0)
        at = (number * slots)[:, None] + (page * SLOTS + team_of_row(code, j % PAGE))[None, :]
        asked = query_ok[:, None] & is_drawn[None, :]
        rank = tl.load(ranks + at, mask=asked, other=0)
        chosen = asked & (rank > cut[:, None])
        read = chosen | (query_ok[:, None] & (there & (page >= exact))[None, :])
        needed = tl.max(read.to(tl.int32), 0) > 0
        if tl.max(needed.to(tl.int32)) > 0:
            phi = tl.load(phis + at, mask=chosen, other=0.0)
            rate = tl.exp(tl.minimum(phi - tau[:, None], 30.0))
            chance = tl.where(rate < 1e-3, rate * (1.0 - rate * (0.5 - rate * 0.16666666)), 1.0 - tl.exp(-rate))
            k_tile = load_tile(rows_of_keys(k, k_sb, k_sl, j, entry, blocks, block, per_row, b), k_sd, needed, D, BLOCK_D)
            logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
            logits = (logits - tl.where(chosen, tl.log(tl.where(chosen, chance, 1.0)), 0.0)) * LOG2_E
            logits = tl.where(read & (tl.abs(logits) < float("inf")), logits, float("-inf"))
            new = tl.maximum(top, tl.max(logits, 1))
            finite = tl.where(new == float("-inf"), 0.0, new)
            weight, shrink = tl.exp2(logits - finite[:, None]), tl.exp2(top - finite)
            v_tile = load_tile(rows_of_keys(v, v_sb, v_sl, j, entry, blocks, block, per_row, b), v_sd, needed, DV, BLOCK_DV)
            whole = whole * shrink + tl.sum(weight, 1)
            acc = acc * shrink[:, None] + tl.dot(weight.to(v_tile.dtype), v_tile, input_precision=PRECISION)
            top = new
    logs, total = log_sum(top, whole)
    p_at = part + (number * splits + split)[:, None] * DV + dv[None, :]
    tl.store(p_at, acc / total[:, None], mask=query_ok[:, None] & (dv < DV)[None, :])
    tl.store(part_lse + number * splits + split, logs, mask=query_ok)
