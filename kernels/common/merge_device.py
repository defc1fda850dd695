"""Two partial attentions into one, row by row. Triton."""

import triton
import triton.language as tl

LENGTHS = ("heads", "rows", "tiles", "l_sb", "l_sh", "l_sl", "m_sb", "m_sh", "m_sl")


@triton.jit
def add_part(acc, out, at, lse, whole, ok, columns_ok):
    """Adds exp(lse - whole) * out to acc; a part without keys is not read."""
    there = ok & (lse > float("-inf"))
    share = tl.where(there, tl.exp(lse - tl.where(there, whole, 0.0)), 0.0)
    values = tl.load(out + at, mask=there[:, None] & columns_ok[None, :], other=0.0).to(tl.float32)
    return acc + share[:, None] * values


@triton.jit(do_not_specialize=LENGTHS)
def merge_kernel(
    out, lse, other, other_lse, merged, merged_lse,
    p_sb, p_sh, p_sl, p_sd, l_sb, l_sh, l_sl, o_sb, o_sh, o_sl, o_sd, m_sb, m_sh, m_sl, w_sb, w_sh, w_sl,
    heads, rows, tiles, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * tiles): BLOCK rows of one head. merged [B, H, rows, D], merged_lse float32 [B, H, rows], contiguous."""
    head_index = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = head_index // heads, head_index % heads
    r = (tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    ok, columns_ok = r < rows, d < D
    first = tl.load(lse + b * l_sb + h * l_sh + r * l_sl, mask=ok, other=float("-inf"))
    second = tl.load(other_lse + b * m_sb + h * m_sh + r * m_sl, mask=ok, other=float("-inf"))
    top = tl.maximum(first, second)
    finite = tl.where(top == float("-inf"), 0.0, top)
    total = tl.exp(first - finite) + tl.exp(second - finite)
    whole = tl.where(total > 0, finite + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    at = b * p_sb + h * p_sh + r[:, None] * p_sl + d[None, :] * p_sd
    acc = add_part(tl.zeros([BLOCK, BLOCK_D], tl.float32), out, at, first, whole, ok, columns_ok)
    at = b * o_sb + h * o_sh + r[:, None] * o_sl + d[None, :] * o_sd
    acc = add_part(acc, other, at, second, whole, ok, columns_ok)
    at = merged + b * w_sb + h * w_sh + r[:, None] * w_sl + d[None, :]
    tl.store(at, acc.to(merged.dtype.element_ty), mask=ok[:, None] & columns_ok[None, :])
    tl.store(merged_lse + head_index * rows + r, whole, mask=ok)
