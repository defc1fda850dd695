"""The teams of the pages that new rows have filled: farthest points of 16 keys. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE, place_of_page
from tsa_compile.kernels.common.teams_device import NUMBER, REPRESENTATIVES

LENGTHS = ("block_pages", "per_row", "blocks_sb", "mask_sb", "mask_sl", "kv_heads")


@triton.jit
def row_at(tile, row):
    """Row `row` of a tile [16, D]."""
    return tl.sum(tl.where((tl.arange(0, PAGE) == row)[:, None], tile, 0.0), 0)


@triton.jit
def distances(tile, to):
    """Squared, of the rows of a tile [16, D] from a row [D]."""
    return tl.sum((tile - to[None, :]) * (tile - to[None, :]), 1)


@triton.jit
def teams_of_page(tile, real, COUNT: tl.constexpr):
    """The 64 bits of a page [16, D] whose rows `real` are no padding; others are 0."""
    row = tl.arange(0, PAGE)
    some = tl.sum(real.to(tl.int32)) > 0
    mean = tl.sum(tile, 0) / tl.maximum(tl.sum(real.to(tl.float32)), 1.0)
    distance = tl.where(real, distances(tile, mean), float("inf"))
    first = tl.min(tl.where(real & (distance == tl.min(distance)), row, PAGE))
    near = tl.where(real, distances(tile, row_at(tile, first)), -1.0)
    team, number = tl.zeros([PAGE], tl.int64), some.to(tl.int64)
    code = first.to(tl.int64) << REPRESENTATIVES
    for s in tl.static_range(1, COUNT):
        most = tl.max(near)
        farthest = tl.min(tl.where(near == most, row, PAGE))
        distance = tl.where(
            near > 0, distances(tile, row_at(tile, farthest)), 0.0
        )  # 0 in all: another one would equal one there is
        closer = distance < near
        more = tl.max(closer.to(tl.int64))
        team, near = tl.where(closer, s, team), tl.where(closer, distance, near)
        code += (more * farthest) << (REPRESENTATIVES + 4 * s)
        number += more
    code += tl.sum(tl.where(real, team << (2 * row).to(tl.int64), 0)) + (number << NUMBER)
    return tl.where(some, code, 0)


@triton.jit(do_not_specialize=LENGTHS)
def append_teams_kernel(
    teams, k, blocks, start, begin, end, key_mask,
    k_sb, k_sh, k_sl, k_sd, teams_sb, teams_sh, blocks_sb, mask_sb, mask_sl, block_pages, per_row, kv_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGES: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk, pages that may have been filled / PAGES). A page is read from the cache when its last row is there.

    Args:
        teams: int64 [N, Hk, pages]; entries of pages from begin // 16 up to end // 16 are written.
        begin, end: int32 [B], rows before and now. blocks, start, key_mask: may be None.
        block_pages: pages of a block; per_row: blocks in a row of k.
    """
    b, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    filled = tl.load(end + b) // PAGE
    low = tl.load(begin + b) // PAGE + tl.program_id(1) * PAGES
    row, d = tl.arange(0, PAGE), tl.arange(0, BLOCK_D)
    for page in tl.range(low, tl.minimum(low + PAGES, filled)):
        owner, place = place_of_page(page + tl.zeros([PAGE], tl.int32), row >= 0, blocks, blocks_sb, block_pages, per_row, b)
        j = page * PAGE + row
        real = j >= 0
        if start is not None:
            real = real & (j >= tl.load(start + b))
        if key_mask is not None:
            real = real & tl.load(key_mask + b * mask_sb + j.to(tl.int64) * mask_sl).to(tl.int1)
        at = k + owner.to(tl.int64) * k_sb + kv_head * k_sh + (place * PAGE + row).to(tl.int64) * k_sl
        tile = tl.load(at[:, None] + d[None, :] * k_sd, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        to = teams + owner.to(tl.int64) * teams_sb + kv_head * teams_sh + place
        tl.store(to, teams_of_page(tile, real, COUNT) + tl.zeros([PAGE], tl.int64), mask=row == 0)
