"""Partial attentions over parts of the keys, one more dimension of a scratch tensor, become one. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.cache_device import LOG2_E

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log_sum(row_max, row_sum):
    """log2 of the sum of exponentials, -inf where there was no key; and what to divide by."""
    total = tl.where(row_sum > 0, row_sum, 1.0)
    return tl.where(row_sum > 0, row_max + tl.log2(total), float("-inf")), total


@triton.jit(do_not_specialize=("heads", "rows", "splits"))
def merge_kernel(
    part, part_lse, out, lse, sinks, o_sb, o_sh, o_sl, heads, rows, splits,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * rows): joins the parts of one query row, BLOCK_S at a time. Of a part without keys only the lse is read."""
    number = tl.program_id(0).to(tl.int64)
    b, h, r = number // (heads * rows), number // rows % heads, number % rows
    dv = tl.arange(0, BLOCK_DV)
    acc, total = tl.zeros([BLOCK_DV], tl.float32), 0.0
    best = float("-inf")
    if sinks is not None:
        best = tl.load(sinks + h).to(tl.float32) * LOG2_E
        total = 1.0
    for first in tl.range(0, splits, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        logs = tl.load(part_lse + number * splits + s, mask=s < splits, other=float("-inf"))
        there = logs > float("-inf")
        values = tl.load(
            part + (number * splits + s)[:, None] * DV + dv[None, :], mask=there[:, None] & (dv < DV)[None, :], other=0.0
        )
        new = tl.maximum(best, tl.max(logs, 0))
        finite = tl.where(new == float("-inf"), 0.0, new)
        weights, shrink = tl.exp2(logs - finite), tl.exp2(best - finite)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(weights[:, None] * values, 0)
        best = new
    logs, total = log_sum(best, total)
    tl.store(out + b * o_sb + h * o_sh + r * o_sl + dv, (acc / total).to(out.dtype.element_ty), mask=dv < DV)
    tl.store(lse + number, logs * LN_2)
