"""Flash attention of each row to one run of keys: its block up to itself and, for a block's first rows, keys before it. Triton.

A program loops over the keys that any of its rows reads and masks the others, so that exactly the keys named enter the softmax.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.grid_device import tile_and_row
from tsa_compile.kernels.common.range_device import valid_keys, valid_range
from tsa_compile.kernels.common.rows_device import store_rows
from tsa_compile.kernels.common.softmax_device import softmax_step
from tsa_compile.kernels.common.view_device import place_of_rows

LENGTHS = (
    "heads", "kv_heads", "q_len", "k_len", "m_sb", "blocks_sb", "block_rows", "per_row", "width", "bridged", "sources", "offset",
)  # fmt: skip


@triton.jit
def lowest_keys(position, width, bridged, sources, offset):
    """The first position that rows at `position` read; positions count from the batch row's first key."""
    position = tl.maximum(position, 0)
    place = (position + width - offset) % width
    return tl.maximum(position - place - tl.where(place < bridged, sources, 0), 0)


@triton.jit(do_not_specialize=LENGTHS)
def bridge_attention_kernel(
    q, k, v, out, lse, starts, lengths, key_mask, blocks,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, o_sl, m_sb,
    heads, kv_heads, q_len, k_len, blocks_sb, block_rows, per_row, width, bridged, sources, offset, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, MASK: tl.constexpr, LSE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M rows of one head. blocks: the table of a view with blocks, int32 [B, P], or None."""
    tile, head_index = tile_and_row(tl.cdiv(q_len, BLOCK_M))
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    at, row_ok = row + k_len - q_len, row < q_len
    first, end = valid_range(starts, lengths, b, k_len, START, LENGTH)
    low = first + lowest_keys(at - first, width, bridged, sources, offset)

    d, dv, i = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    k += h * kv_heads // heads * k_sh
    v += h * kv_heads // heads * v_sh
    if blocks is None:
        k += b * k_sb
        v += b * v_sb
    else:
        blocks += b * blocks_sb
    q_at = q + b * q_sb + h * q_sh + row.to(tl.int64)[:, None] * q_sl + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -1.0e30, tl.float32)  # finite: a row may see none of a step's keys
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(tl.min(low), tl.minimum(end, tl.max(at) + 1), BLOCK_N):
        keys = start + i
        real = valid_keys(keys, starts, lengths, key_mask, b, k_len, m_sb, START, LENGTH, MASK)
        owner, inside = place_of_rows(keys, real, blocks, block_rows, per_row)
        k_at = k + (owner * k_sb + inside * k_sl)[None, :] + d[:, None] * k_sd
        k_tile = tl.load(k_at, mask=real[None, :] & (d < D)[:, None], other=0.0)
        scores = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        seen = (keys[None, :] >= low[:, None]) & (keys[None, :] <= at[:, None]) & real[None, :]
        v_at = v + (owner * v_sb + inside * v_sl)[:, None] + dv[None, :] * v_sd
        v_tile = tl.load(v_at, mask=real[:, None] & (dv < DV)[None, :], other=0.0)
        scores = tl.where(seen, scores, float("-inf"))
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, scale_log2, v_tile, PRECISION)

    some = row_sum > 0
    result = tl.where(some[:, None], acc / tl.where(some, row_sum, 1.0)[:, None], 0.0)
    store_rows(out + b * o_sb + h * o_sh, o_sl, result, row, row_ok, DV, BLOCK_DV)
    if LSE:
        ln2: tl.constexpr = 0.6931471805599453
        value = tl.where(some, (row_max + tl.log2(tl.where(some, row_sum, 1.0))) * ln2, float("-inf"))
        tl.store(lse + (b * heads + h) * q_len + row, value, mask=row_ok)
