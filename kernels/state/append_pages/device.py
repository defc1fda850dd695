"""The sums of the pages that new rows have filled. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE, place_of_page

LENGTHS = ("block_pages", "per_row", "blocks_sb", "mask_sb", "mask_sl", "kv_heads", "counts_sb")


@triton.jit(do_not_specialize=LENGTHS)
def append_pages_kernel(
    sums, counts, k, blocks, start, begin, end, key_mask,
    k_sb, k_sh, k_sl, k_sd, sums_sb, sums_sh, sums_sp, counts_sb, blocks_sb, mask_sb, mask_sl, block_pages, per_row, kv_heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGES: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk, pages that may have been filled / PAGES). A page is read from the cache when its last row is there.

    Args:
        sums, counts: [N, Hk, pages, D], int32 [N, 1, pages]; entries of pages from begin // 16 up to end // 16 are written.
        begin, end: int32 [B], rows before and now. blocks, start, key_mask: may be None.
        block_pages: pages of a block; per_row: blocks in a row of k.
    """
    b, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    filled = tl.load(end + b) // PAGE
    first = tl.load(begin + b) // PAGE + tl.program_id(1) * PAGES
    if first >= filled:
        return
    row = tl.arange(0, PAGES * PAGE)
    page, j = first + row // PAGE, first * PAGE + row
    real = page < filled
    owner, place = place_of_page(page, real, blocks, blocks_sb, block_pages, per_row, b)
    if start is not None:
        real = real & (j >= tl.load(start + b))
    if key_mask is not None:
        real = real & tl.load(key_mask + b * mask_sb + j.to(tl.int64) * mask_sl, mask=real, other=0).to(tl.int1)
    d = tl.arange(0, BLOCK_D)
    at = k + owner.to(tl.int64) * k_sb + kv_head * k_sh + (place * PAGE + row % PAGE).to(tl.int64) * k_sl
    tile = tl.load(at[:, None] + d[None, :] * k_sd, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(tl.reshape(tile, [PAGES, PAGE, BLOCK_D]), 1)
    page = first + tl.arange(0, PAGES)
    owner, place = place_of_page(page, page < filled, blocks, blocks_sb, block_pages, per_row, b)
    to = sums + owner.to(tl.int64) * sums_sb + kv_head * sums_sh + place.to(tl.int64) * sums_sp
    tl.store(to[:, None] + d[None, :], total.to(sums.dtype.element_ty), mask=(page < filled)[:, None] & (d < D)[None, :])
    number = tl.sum(tl.reshape(real.to(tl.int32), [PAGES, PAGE]), 1)
    tl.store(counts + owner.to(tl.int64) * counts_sb + place, number, mask=(page < filled) & (kv_head == 0))
