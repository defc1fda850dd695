"""Memory movers: pack kept rows to contiguous storage, put packed results back, invert lists. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.grid_device import tile_of_yz
from tsa_compile.kernels.common.rows_device import copy_rows


@triton.jit(do_not_specialize=["i_sb", "i_sg", "s_sb", "s_sg", "lists"])
def invert_kernel(indices, counts, slots, i_sb, i_sg, s_sb, s_sg, lists, BLOCK: tl.constexpr):
    """slots[b, g, indices[b, g, c]] = c for c < counts[b]; the caller filled `slots` with -1."""
    b, g = (tl.program_id(0) // lists).to(tl.int64), (tl.program_id(0) % lists).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < tl.load(counts + b)
    at = tl.load(indices + b * i_sb + g * i_sg + c, mask=ok, other=0)
    tl.store(slots + b * s_sb + g * s_sg + at, c, mask=ok)


@triton.jit(do_not_specialize=["capacity", "skipped", "i_sb", "i_sg", "heads", "packed_heads", "lists"])
def pack_kernel(
    x, packed, indices, counts, x_sb, x_sh, x_sl, x_sd, i_sb, i_sg, heads, packed_heads, lists, capacity, skipped,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """Kept rows of x [B, heads, L, D] to packed [B, packed_heads, capacity, D]; both heads and lists divide packed_heads.

    x holds the last L of the capacity's positions, from `skipped` on; a kept row before them is zero. TAIL rows after the last
    are zeroed: an engine that reads whole key tiles must find finite numbers there.
    Programs of neighbouring heads run side by side, as their rows of one token are neighbours in memory.
    """
    b, h = (tl.program_id(0) // packed_heads).to(tl.int64), (tl.program_id(0) % packed_heads).to(tl.int64)
    n = tl.load(counts + b)
    first = tile_of_yz() * BLOCK
    if first >= n + TAIL:
        return
    slots = first + tl.arange(0, BLOCK)
    kept = indices + b * i_sb + h * lists // packed_heads * i_sg
    at = tl.load(kept + slots, mask=slots < n, other=0).to(tl.int64) - skipped
    x += b * x_sb + h * heads // packed_heads * x_sh
    to = packed + (b * packed_heads + h) * capacity * D
    copy_rows(x, to, at, x_sl, x_sd, slots, (slots < n) & (at >= 0), slots < capacity, D, BLOCK_D)


@triton.jit(do_not_specialize=["q_len", "s_sb", "s_sg", "heads", "lists"])
def scatter_kernel(
    packed, out, slots, p_sb, p_sh, p_sl, o_sb, o_sh, o_sl, s_sb, s_sg, heads, lists, q_len,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every row of out: its packed row, or zero where slots [B, G, Lq] is -1."""
    b, h = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    rows = tile_of_yz() * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + b * s_sb + h * lists // heads * s_sg + rows, mask=rows < q_len, other=-1)
    d = tl.arange(0, BLOCK_DV)
    packed += b * p_sb + h * p_sh
    values = tl.load(
        packed + slot.to(tl.int64)[:, None] * p_sl + d[None, :],
        mask=(slot >= 0)[:, None] & (d < DV)[None, :],
        other=0.0,
    )
    out += b * o_sb + h * o_sh
    o_at = out + rows.to(tl.int64)[:, None] * o_sl + d[None, :]
    tl.store(o_at, values, mask=(rows < q_len)[:, None] & (d < DV)[None, :])
