"""Where the rows of a view with blocks lie (`KvView`, types.py). Triton."""

import triton
import triton.language as tl


@triton.jit
def place_of_rows(at, ok, blocks, block, per_row):
    """(entry of the first dimension, row within it), int64, of the positions `at` of a batch row, where `ok`.

    Args:
        blocks: the batch row's table, int32; None: the tensor is the batch row's own, and positions are rows.
        block: rows of a block.
        per_row: blocks in one entry of the first dimension.
    """
    owner = tl.zeros_like(at).to(tl.int64)
    inside = at.to(tl.int64)
    if blocks is not None:
        entry = tl.load(blocks + at // block, mask=ok, other=0)
        owner = (entry // per_row).to(tl.int64)
        inside = (entry % per_row * block + at % block).to(tl.int64)
    return owner, inside
