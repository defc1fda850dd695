"""Scores by the last queries on the GPU: their log-sum-exp, then the mean attention each key gets. Triton.

Everything is in rank space: rank r of a row is its r-th real token. Without padding ranks are positions. K is read twice; nothing
of size queries x length is stored. Programs of the heads that share a KV head run side by side and share its keys in L2.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.ranks_device import positions_of, row_extent
from tsa_compile.kernels.common.softmax_device import merged_lse

LENGTHS = ("heads", "kv_heads", "q_len", "k_len", "last_queries", "splits", "span", "pool")


@triton.jit
def load_queries(
    q, order, b, first, rows, length, q_len, k_len, q_sl, q_sd, d,
    D: tl.constexpr, BLOCK_M: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """(tile of scoring queries [BLOCK_M, BLOCK_D], their ranks, which exist)."""
    r = first + tl.arange(0, BLOCK_M)
    ok = r < rows
    rank = length - rows + r
    at = positions_of(order, b, rank, ok, k_len, PADDED) - (k_len - q_len)
    at = tl.where(ok, at, 0)
    tile = tl.load(q + at[:, None] * q_sl + d[None, :] * q_sd, mask=ok[:, None] & (d < D)[None, :], other=0.0)
    return tile, rank, ok


@triton.jit
def scaled_scores(
    q_tile, k, order, b, start, rank, length, k_len, k_sl, k_sd, d, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * log2(e) * q k^T [BLOCK_M, BLOCK_N] of the keys from rank `start` on; -inf for later keys."""
    j = start + tl.arange(0, BLOCK_N)
    at = positions_of(order, b, j, j < length, k_len, PADDED)
    k_tile = tl.load(k + at[None, :] * k_sl + d[:, None] * k_sd, mask=(d < D)[:, None], other=0.0)
    scores = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale_log2
    return tl.where((j[None, :] <= rank[:, None]) & (j < length)[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def score_lse_kernel(
    q, k, part_max, part_sum, order, ranks,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd,
    heads, kv_heads, q_len, k_len, last_queries, splits, span, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running maximum and sum (base 2) of BLOCK_M scoring queries over one span of keys, to [B, H, splits, last_queries]."""
    head_index, split, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_M
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    length, rows = row_extent(ranks, b, q_len, k_len, last_queries, PADDED)
    d = tl.arange(0, BLOCK_D)
    q += b * q_sb + h * q_sh
    k += b * k_sb + (h * kv_heads // heads) * k_sh
    q_tile, rank, ok = load_queries(q, order, b, first, rows, length, q_len, k_len, q_sl, q_sd, d, D, BLOCK_M, PADDED)
    row_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(split * span, tl.minimum(split * span + span, length), BLOCK_N):
        scores = scaled_scores(
            q_tile, k, order, b, start, rank, length, k_len, k_sl, k_sd, d, scale_log2, D, BLOCK_N, PADDED, PRECISION
        )
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(scores - new_max[:, None]), 1)
        row_max = new_max
    at = (head_index.to(tl.int64) * splits + split) * last_queries + first + tl.arange(0, BLOCK_M)
    tl.store(part_max + at, row_max, mask=ok)
    tl.store(part_sum + at, row_sum, mask=ok)


@triton.jit(do_not_specialize=LENGTHS)
def score_mean_kernel(
    q, k, part_max, part_sum, mean, order, ranks,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd,
    heads, kv_heads, q_len, k_len, last_queries, splits, span, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mean attention of the scoring queries to each key of one span before them, to mean [B, H, Lk] by rank."""
    head_index, split = tl.program_id(0), tl.program_id(1)
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    length, rows = row_extent(ranks, b, q_len, k_len, last_queries, PADDED)
    d = tl.arange(0, BLOCK_D)
    q += b * q_sb + h * q_sh
    k += b * k_sb + (h * kv_heads // heads) * k_sh
    mean += head_index.to(tl.int64) * k_len
    last = tl.minimum(split * span + span, length - last_queries)
    for first in tl.range(0, rows, BLOCK_M):
        q_tile, rank, ok = load_queries(q, order, b, first, rows, length, q_len, k_len, q_sl, q_sd, d, D, BLOCK_M, PADDED)
        base = head_index.to(tl.int64) * splits
        lse = merged_lse(part_max, part_sum, base, splits, last_queries, first + tl.arange(0, BLOCK_M), ok, BLOCK_M)
        for start in tl.range(split * span, last, BLOCK_N):
            scores = scaled_scores(
                q_tile,
                k,
                order,
                b,
                start,
                rank,
                length,
                k_len,
                k_sl,
                k_sd,
                d,
                scale_log2,
                D,
                BLOCK_N,
                PADDED,
                PRECISION,
            )
            p = tl.where(ok[:, None], tl.exp2(scores - lse[:, None]), 0.0)
            j = start + tl.arange(0, BLOCK_N)
            total = tl.sum(p, 0) / rows
            if first > 0:  # this program alone writes these keys
                total += tl.load(mean + j, mask=j < last, other=0.0)
            tl.store(mean + j, total, mask=j < last)
