"""Attention to teams of keys that were drawn, and to the recent pages. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.attend.sampled.teams_device import LENGTHS, TILE, codes_of_pages, drawn_pages, shown
from tsa_compile.kernels.common.cache_device import LOG2_E, key_range, load_tile, rows_of_keys
from tsa_compile.kernels.common.pages_device import PAGE
from tsa_compile.kernels.common.splits_device import log_sum
from tsa_compile.kernels.common.teams_device import SLOTS, team_of_row


@triton.jit
def from_rank(rank):
    """The float32 that has this rank."""
    ordered = ((rank.to(tl.int64) << 1) - 0x80000000).to(tl.int32)
    return tl.where(ordered >= 0, ordered, ordered ^ 0x7FFFFFFF).to(tl.float32, bitcast=True)


@triton.jit
def items_of_rows(step, listed, drawn, exact, teams, teams_sb, teams_sh, kv_head, blocks, block_pages, index_row, b):
    """Of a step's rows, 16 of each item: the item, its slot if it is a team, its page, and the page's bits."""
    item = step * (TILE // PAGE) + tl.arange(0, TILE) // PAGE
    is_drawn = item < drawn
    slot = tl.load(listed + item, mask=is_drawn, other=0)
    page = tl.where(is_drawn, slot // SLOTS, exact + item - drawn)
    high = tl.where(is_drawn, exact, 0)
    return item, slot, page, codes_of_pages(page, high, teams, teams_sb, teams_sh, kv_head, blocks, block_pages, index_row, b)


@triton.jit(do_not_specialize=LENGTHS)
def team_attention_kernel(
    q, k, v, teams, phis, cuts, listed, counts, part, part_lse, blocks, start, lengths, key_mask,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, teams_sb, teams_sh, mask_sb, mask_sl, blocks_sb,
    heads, group, capacity, block, per_row, block_pages, index_row, slots, recent, draws, splits, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * H, splits): a part of a head's teams and of the recent pages, four at a time; `merge_kernel` joins the parts.

    Rows of K and V outside of them are not loaded. part: float32 [B, H, splits, DV]; part_lse: [B, H, splits], base 2.
    """
    number, split = tl.program_id(0), tl.program_id(1)
    b, h = (number // heads).to(tl.int64), number % heads
    kv_head = (h // group).to(tl.int64)
    first, end = key_range(start, lengths, b, capacity, 1, 0)
    _, exact = drawn_pages(first, end, recent)
    drawn = tl.load(counts + number)
    items = drawn + tl.maximum(tl.cdiv(end, PAGE) - exact, 0)
    steps = tl.cdiv(items, TILE // PAGE)
    if key_mask is not None:
        key_mask += b * mask_sb
    if blocks is not None:
        blocks += b * blocks_sb
    k += kv_head * k_sh
    v += kv_head * v_sh
    phis += number.to(tl.int64) * slots
    listed += number.to(tl.int64) * draws
    m, n, d, dv = tl.arange(0, 16), tl.arange(0, TILE), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_at = q + b * q_sb + h * q_sh + m[:, None] * 0 + d[None, :] * q_sd
    query = tl.load(q_at, mask=(m == 0)[:, None] & (d < D)[None, :], other=0.0)  # the rows of a product; the others are zero
    cut = tl.load(cuts + number)
    tau = tl.where(cut > 0, from_rank(cut), -1e30)
    acc, whole, top = tl.zeros([16, BLOCK_DV], tl.float32), tl.zeros([TILE], tl.float32), -1e30
    low, high = split * steps // splits, (split + 1) * steps // splits
    next_item, next_slot, next_page, next_code = items_of_rows(
        low, listed, drawn, exact, teams, teams_sb, teams_sh, kv_head, blocks, block_pages, index_row, b
    )
    for step in tl.range(low, high):
        item, slot, page, code = next_item, next_slot, next_page, next_code
        next_item, next_slot, next_page, next_code = items_of_rows(  # what addresses depend on is read a step ahead
            step + 1, listed, drawn, exact, teams, teams_sb, teams_sh, kv_head, blocks, block_pages, index_row, b
        )
        is_drawn, row = item < drawn, n % PAGE
        phi = tl.load(phis + slot, mask=is_drawn, other=0.0)
        j = page * PAGE + row
        there = (item < items) & (j >= first) & (j < end) & ((team_of_row(code, row) == slot % SLOTS) | ~is_drawn)
        there = shown(key_mask, mask_sl, j, there)
        entry = j
        if blocks is not None:
            entry = tl.load(blocks + j // block, mask=there, other=0)
        k_tile = load_tile(rows_of_keys(k, k_sb, k_sl, j, entry, blocks, block, per_row, b), k_sd, there, D, BLOCK_D)
        v_tile = load_tile(rows_of_keys(v, v_sb, v_sl, j, entry, blocks, block, per_row, b), v_sd, there, DV, BLOCK_DV)
        rate = tl.exp(tl.minimum(phi - tau, 30.0))
        chance = tl.where(rate < 1e-3, rate * (1.0 - rate * (0.5 - rate * 0.16666666)), 1.0 - tl.exp(-rate))
        logits = tl.sum(tl.dot(query, tl.trans(k_tile), input_precision=PRECISION), 0) * scale
        logits = (logits - tl.where(is_drawn, tl.log(tl.where(is_drawn, chance, 1.0)), 0.0)) * LOG2_E
        logits = tl.where(there & (tl.abs(logits) < float("inf")), logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 0))
        weight, shrink = tl.exp2(logits - new), tl.exp2(top - new)
        whole = whole * shrink + weight
        weights = tl.where((m == 0)[:, None], weight[None, :], 0.0).to(v_tile.dtype)
        acc = acc * shrink + tl.dot(weights, v_tile, input_precision=PRECISION)
        top = new
    logs, total = log_sum(top, tl.sum(whole, 0))
    at = number.to(tl.int64) * splits + split
    tl.store(part + at * DV + dv, tl.sum(acc, 0) / total, mask=dv < DV)
    tl.store(part_lse + at, logs)
