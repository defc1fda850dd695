"""Where the entry of a page lies in a page index. Triton."""

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
