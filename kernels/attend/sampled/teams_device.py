"""Attention to sampled teams of keys: which ones each query head reads, and their keys and values. Triton.

Three launches, in this order, and a merge. What a team's bits are: common/teams.py; what is computed: teams.py.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.attend.sampled.draw_device import TILE, position_word
from tsa_compile.kernels.common.cache_device import key_range, load_tile, rows_of_keys
from tsa_compile.kernels.common.pages_device import PAGE, place_of_page
from tsa_compile.kernels.common.teams_device import SLOTS, number_of_teams, representative, rows_of_team, team_of_row

BINS = tl.constexpr(256)
AT_ONCE, FEW = tl.constexpr(4096), tl.constexpr(1024)  # ranks
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


@triton.jit
def size_of_team(code, s, page, first, end, key_mask, mask_sl, there):
    """float32: how many keys of team s of a page lie between `first` and `end`, and no mask hides."""
    if key_mask is not None:
        j = (page * PAGE)[:, None] + tl.arange(0, PAGE)[None, :]
        member = there[:, None] & (team_of_row(code[:, None], tl.arange(0, PAGE)[None, :]) == s[:, None])
        return tl.sum(shown(key_mask, mask_sl, j, member & (j >= first) & (j < end)).to(tl.float32), 1)
    return rows_of_team(code, s, first - page * PAGE, end - page * PAGE).to(tl.float32)


@triton.jit
def codes_of_pages(page, high, teams, teams_sb, teams_sh, kv_head, blocks, block_pages, index_row, b):
    """The bits of pages; 0 from page `high` on. `blocks`: the batch row's, or None."""
    owner, place = place_of_page(page, page < high, blocks, 0, block_pages, index_row, b)
    return tl.load(teams + owner.to(tl.int64) * teams_sb + kv_head * teams_sh + place, mask=page < high, other=0)


@triton.jit(do_not_specialize=LENGTHS)
def team_scores_kernel(
    q, k, teams, phis, ranks, blocks, start, lengths, key_mask, seed,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sl, k_sd, teams_sb, teams_sh, mask_sb, mask_sl, blocks_sb, seed_sb,
    kv_heads, group, capacity, block, per_row, block_pages, index_row, slots, recent, splits, tiles_m, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): a part of the drawn pages, 16 at a time, for BLOCK_M query heads.

    phis, ranks: float32, int32 [B, H, slots], 4 of each page: log masses, and ranks of these with noise; 0: there is no team.
    BLOCK_G: heads that there are, or BLOCK_M; only for these is there noise, which takes longer than the scores.
    """
    tile_m, head_index, split = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    m, g = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_m * BLOCK_M + tl.arange(0, BLOCK_G)
    h = kv_head * group + tl.minimum(m, group - 1)
    first, end = key_range(start, lengths, b, capacity, 1, 0)
    low, high = drawn_pages(first, end, recent)
    if key_mask is not None:
        key_mask += b * mask_sb
    if blocks is not None:
        blocks += b * blocks_sb
    k += kv_head * k_sh
    seed += b * seed_sb
    i, d = tl.arange(0, TILE), tl.arange(0, BLOCK_D)
    q_at = q + b * q_sb + (h * q_sh)[:, None] + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=(m < group)[:, None] & (d < D)[None, :], other=0.0)
    of_head = ((head_index * group + g).to(tl.int64) * slots)[:, None]
    head = (kv_head * group).to(tl.int32) + tl.zeros([BLOCK_G, TILE], tl.int32) + g[:, None]
    count = tl.cdiv(high - low, PAGE)
    begin, last = split * count // splits, (split + 1) * count // splits
    next_code = codes_of_pages(
        low + begin * PAGE + i // SLOTS, high, teams, teams_sb, teams_sh, kv_head, blocks, block_pages, index_row, b
    )
    for tile in tl.range(begin, last):
        code = next_code
        page, s = low + tile * PAGE + i // SLOTS, i % SLOTS
        next_code = codes_of_pages(  # what addresses depend on is read a tile ahead
            page + PAGE, high, teams, teams_sb, teams_sh, kv_head, blocks, block_pages, index_row, b
        )
        slot, inside = page * SLOTS + s, page < high
        j = page * PAGE + representative(code, s)
        there = shown(key_mask, mask_sl, j, inside & (s < number_of_teams(code)) & (j >= first) & (j < end))
        entry = j
        if blocks is not None:
            entry = tl.load(blocks + j // block, mask=there, other=0)
        k_tile = load_tile(rows_of_keys(k, k_sb, k_sl, j, entry, blocks, block, per_row, b), k_sd, there, D, BLOCK_D)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        logits = tl.sum(tl.reshape(logits, [BLOCK_M // BLOCK_G, BLOCK_G, TILE]), 0)  # rows behind the heads are zero
        size = size_of_team(code, s, page, first, end, key_mask, mask_sl, there)
        phi = logits + tl.log(tl.maximum(size, 1.0))[None, :]
        ok = there[None, :] & (tl.abs(phi) < float("inf"))
        word = position_word(seed, slot[None, :], head, b.to(tl.int32), end - 1)
        stored = (g < group)[:, None] & inside[None, :]
        tl.store(phis + of_head + slot[None, :], phi, mask=stored)
        tl.store(ranks + of_head + slot[None, :], tl.where(ok, rank_of(phi + gumbel(word)), 0), mask=stored)


@triton.jit
def narrowed(count, cut, need, width):
    """The `need`-th largest of ranks that begin with `cut`, by how many fall in which bin of their next `width` bits.

    (`cut` with these bits, which of its bin's ranks it is, 1; 0 if there are not as many ranks).
    """
    above = tl.sum(count) - tl.cumsum(count, 0)  # how many in higher bins
    here = (above < need) & (above + count >= need)
    cut = (cut << width) | tl.sum(tl.where(here, tl.arange(0, BINS), 0))
    return cut, need - tl.sum(tl.where(here, above, 0)), tl.sum(here.to(tl.int32))


@triton.jit
def bins_of(rank, cut, shift, width):
    """How many ranks above 0 that begin with `cut` have which of the next `width` bits; `shift`: the bits behind these."""
    upper = rank >> shift
    return tl.histogram(upper & ((1 << width) - 1), BINS, mask=(rank > 0) & ((upper >> width) == cut))


@triton.jit
def least_of_largest(ranks, n, wanted):
    """A rank above 0 that at least `wanted` of n ranks reach, if as many are above 0. By each AT_ONCE-th's largest."""
    i, best = tl.arange(0, AT_ONCE), tl.zeros([AT_ONCE], tl.int32)
    for at in tl.range(0, n, AT_ONCE):
        best = tl.maximum(best, tl.load(ranks + at + i, mask=at + i < n, other=0))
    cut, need, enough = narrowed(bins_of(best, 0, 23, 8), 0, wanted, 8)
    found, _, both = narrowed(bins_of(best, cut, 15, 8), cut, need, 8)
    return tl.maximum(tl.where((enough > 0) & (both > 0), found << 15, 0), 1)


@triton.jit(do_not_specialize=LENGTHS)
def team_cut_kernel(ranks, places, cuts, listed, counts, start, lengths, heads, capacity, slots, recent, draws):
    """Grid (B * H): the teams that are read, and the rank above which they are: of at most `draws`.

    places: int32 [B, H, slots], scratch: where ranks are that may be among the largest. cuts, counts: int32 [B, H]; a cut is 0
    where there are no more teams. listed: int32 [B, H, draws], slots, ascending. Radix search: 8, 8, 8 and 7 bits.
    """
    number = tl.program_id(0)
    first, end = key_range(start, lengths, number // heads, capacity, 1, 0)
    low, high = drawn_pages(first, end, recent)
    ranks += number.to(tl.int64) * slots + low * SLOTS
    places += number.to(tl.int64) * slots
    listed += number.to(tl.int64) * draws
    n, i, few = (high - low) * SLOTS, tl.arange(0, AT_ONCE), tl.arange(0, FEW)
    least, kept = least_of_largest(ranks, n, draws + 1), tl.zeros([], tl.int32)
    for at in tl.range(0, n, AT_ONCE):
        large = (tl.load(ranks + at + i, mask=at + i < n, other=0) >= least).to(tl.int32)
        tl.store(places + kept + tl.cumsum(large, 0) - 1, at + i, mask=large > 0)
        kept += tl.sum(large, 0)
    tl.debug_barrier()
    cut, need, width = tl.zeros([], tl.int32), draws + 1, tl.full([], 8, tl.int32)
    shift, enough = tl.full([], 23, tl.int32), tl.full([], 1, tl.int32)
    while (shift >= 0) & (enough > 0):
        count = tl.zeros([BINS], tl.int32)
        for at in tl.range(0, kept, FEW):
            place = tl.load(places + at + few, mask=at + few < kept, other=0)
            count += bins_of(tl.load(ranks + place, mask=at + few < kept, other=0), cut, shift, width)
        cut, need, enough = narrowed(count, cut, need, width)
        width = tl.where(shift == 7, 7, 8)
        shift -= width
    cut = tl.where(enough > 0, cut, 0)
    tl.store(cuts + number, cut)
    used = tl.zeros([], tl.int32)
    for at in tl.range(0, kept, FEW):
        place = tl.load(places + at + few, mask=at + few < kept, other=0)
        chosen = (tl.load(ranks + place, mask=at + few < kept, other=0) > cut).to(tl.int32)
        tl.store(listed + used + tl.cumsum(chosen, 0) - 1, low * SLOTS + place, mask=chosen > 0)
        used += tl.sum(chosen, 0)
    tl.store(counts + number, used)
