"""Ranks and positions: rank r of a batch row is its r-th real key. Without padding (PADDED false) they are the same. Triton."""

import triton
import triton.language as tl


@triton.jit
def row_extent(ranks, b, q_len, k_len, last_queries, PADDED: tl.constexpr):
    """(real tokens of the row, scoring queries): the last real tokens, as far as they are queries."""
    if PADDED:
        length = tl.load(ranks + b * k_len + k_len - 1, mask=k_len > 0, other=0)
        before = tl.load(ranks + b * k_len + k_len - q_len - 1, mask=k_len > q_len, other=0)
        queries = length - before
    else:
        length, queries = k_len, q_len
    return length, tl.minimum(queries, last_queries)


@triton.jit
def positions_of(order, b, rank, ok, k_len, PADDED: tl.constexpr):
    """Positions of the tokens with these ranks."""
    if PADDED:
        return tl.load(order + b * k_len + rank, mask=ok, other=0).to(tl.int64)
    return tl.where(ok, rank, 0).to(tl.int64)


@triton.jit(do_not_specialize=["k_len"])
def order_kernel(ranks, order, k_len, BLOCK: tl.constexpr):
    """order[b]: the real positions, ascending, then the padding. ranks [B, Lk]: running count of real positions."""
    ranks += tl.program_id(0).to(tl.int64) * k_len
    order += tl.program_id(0).to(tl.int64) * k_len
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = at < k_len
    rank = tl.load(ranks + at, mask=ok, other=0)
    real = rank > tl.load(ranks + at - 1, mask=ok & (at > 0), other=0)
    tl.store(order + tl.where(real, rank - 1, tl.load(ranks + k_len - 1) + at - rank), at, mask=ok)
