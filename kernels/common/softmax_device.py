"""The online softmax, in base 2, and how the sums of its parts come together. Triton."""

import triton
import triton.language as tl


@triton.jit
def softmax_step(acc, row_max, row_sum, scores, scale_log2, v, PRECISION: tl.constexpr):
    """One step of the online softmax, in base 2: scale_log2 > 0 is scale * log2(e). Every row has had a key."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    shrink = tl.exp2(row_max - new_max)
    p = tl.exp2(scores * scale_log2 - new_max[:, None])
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def softmax_step_or_none(acc, row_max, row_sum, scores, allowed, scale_log2, v, PRECISION: tl.constexpr):
    """`softmax_step` where only `allowed` scores take part, and a row may have had no key so far."""
    scores = tl.where(allowed, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale_log2)
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    shrink = tl.exp2(row_max - finite_max)
    p = tl.exp2(scores * scale_log2 - finite_max[:, None])
    row_sum = row_sum * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def merged_lse(part_max, part_sum, base, splits, queries, row, ok, BLOCK_M: tl.constexpr):
    """The log-sum-exp (base 2) of each row over all spans."""
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for s in tl.range(0, splits):
        at = (base + s) * queries + row
        m = tl.load(part_max + at, mask=ok, other=-1.0e30)
        new = tl.maximum(top, m)
        total = total * tl.exp2(top - new) + tl.load(part_sum + at, mask=ok, other=1.0) * tl.exp2(m - new)
        top = new
    return tl.where(ok, top + tl.log2(total), 0.0)
