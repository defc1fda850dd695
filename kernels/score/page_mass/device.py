"""Means of key blocks, one pass over the keys. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.grid_device import tile_and_row
from tsa_compile.kernels.common.range_device import valid_keys
from tsa_compile.kernels.common.view_device import place_of_rows

LENGTHS = ("kv_heads", "k_len", "key_blocks", "m_sb", "blocks_sb", "block_rows", "per_row")


@triton.jit(do_not_specialize=LENGTHS)
def key_block_means_kernel(
    k, means, counts, starts, lengths, key_mask, blocks, k_sb, k_sh, k_sl, k_sd, m_sb, kv_heads, k_len, key_blocks,
    blocks_sb, block_rows, per_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr, KEYS: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One key block of one head, to means [B, Hk, key blocks, D]; the first head's programs store counts [B, key blocks]."""
    block, head = tile_and_row(key_blocks)
    head = head.to(tl.int64)
    b, h = head // kv_heads, head % kv_heads
    at, d = block * KEYS + tl.arange(0, KEYS), tl.arange(0, BLOCK_D)
    ok = valid_keys(at, starts, lengths, key_mask, b, k_len, m_sb, START, LENGTH, MASK)
    if blocks is None:
        k += b * k_sb
    else:
        blocks += b * blocks_sb
    owner, inside = place_of_rows(at, ok, blocks, block_rows, per_row)
    rows = k + h * k_sh + (owner * k_sb + inside * k_sl)[:, None] + d[None, :] * k_sd
    tile = tl.load(rows, mask=ok[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    number = tl.sum(ok.to(tl.int32), 0)
    mean = tl.sum(tile, 0) / tl.maximum(number, 1).to(tl.float32)
    tl.store(means + (head * key_blocks + block) * D + d, mean, mask=d < D)
    tl.store(counts + b * key_blocks + block, number, mask=h == 0)
