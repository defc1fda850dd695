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
    """Where the entries from `first` to `first + size` lie in an ascending list of `count`: (begin, end).

    By probes: which of 128 parts of the list a bound is in, then where. Two loads that wait for each other, up to 16,384 entries.
    """
    i, side = tl.arange(0, 128), tl.arange(0, 2)
    wanted, step = (first + side * size)[:, None], tl.cdiv(count, 128)
    probe = i * step
    below = (tl.load(listed + probe, mask=probe < count, other=0)[None, :] < wanted) & (probe < count)[None, :]
    found = tl.maximum(tl.sum(below.to(tl.int32), 1) - 1, 0) * step
    number = tl.zeros([2], tl.int32)
    for at in tl.range(0, step, 128):
        entry = found[:, None] + (at + i)[None, :]
        ok = (at + i < step)[None, :] & (entry < count)
        number += tl.sum((ok & (tl.load(listed + entry, mask=ok, other=0) < wanted)).to(tl.int32), 1)
    found += number
    return tl.min(found, 0), tl.max(found, 0)
