"""How much the two scored rows of a verify step weigh each key, for each KV head. Triton."""

import triton
import triton.language as tl

LENGTHS = ("length", "rows", "group", "kv_heads")


@triton.jit(do_not_specialize=LENGTHS)
def rank_kernel(scores, lse, begin, rank, length, rows, group, kv_heads, BLOCK: tl.constexpr):
    """Grid (B * Hk, ceil(length / BLOCK)): the mean weight of BLOCK keys, -1 where they are hidden or not before `begin`.

    Args:
        scores: float32 [B, H, 2, length], of the first and the last row; lse: float32 [B, H, rows].
        begin: int32 [B]. rank: float32 [B, Hk, length], written.
    """
    number = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = j < tl.minimum(tl.load(begin + number // kv_heads), length)
    total, seen = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
    for n in tl.range(0, 2 * group):
        row = number * (2 * group) + n  # of all [B, H, 2]
        score = tl.load(scores + row * length + j, mask=there, other=float("-inf"))
        weight = tl.exp(score - tl.load(lse + row // 2 * rows + row % 2 * (rows - 1)))
        total += tl.where((weight >= 0.0) & (weight <= 3e38), weight, 0.0)  # what is not finite weighs nothing
        seen = seen | (score > float("-inf")).to(tl.int32)
    tl.store(rank + number * length + j, tl.where(seen > 0, total / (2 * group), -1.0), mask=j < length)
