"""Where the entry of a page lies in a page index, and where pages lie in a list. Triton."""

import triton
import triton.language as tl

PAGE = tl.constexpr(16)  # rows of a page


@triton.jit
def place_of_page(page, ok, blocks, blocks_sb, block_pages, per_row, b):
    """(entry of the first dimension, page within it) of the row's pages `page`, where `ok`.

    Without a table of blocks, the batch row and the page itself. `block_pages`: pages of a block; `per_row`: blocks in one
    entry of the first dimension.
    """
    if blocks is not None:
        entry = tl.load(blocks + b * blocks_sb + page // block_pages, mask=ok, other=0)
        return entry // per_row, entry % per_row * block_pages + page % block_pages
    return tl.zeros_like(page) + b.to(tl.int32), tl.where(ok, page, 0)


@triton.jit
def part_of_list(listed, count, first, size):
    """Where the entries from `first` to `first + size` lie in an ascending list of `count`: (begin, end)."""
    side = tl.arange(0, 2)
    wanted = first + side * size
    low, high = tl.zeros([2], tl.int32), tl.zeros([2], tl.int32) + count
    while tl.max(high - low, 0) > 0:
        middle = (low + high) // 2
        open_ = low < high
        below = tl.load(listed + middle, mask=open_, other=0) < wanted
        low, high = tl.where(open_ & below, middle + 1, low), tl.where(open_ & ~below, middle, high)
    return tl.min(low, 0), tl.max(low, 0)
