"""Probe scores on the GPU: log-sum-exp of the probing queries over all keys, then the mean attention each key gets. Triton.

Everything is in rank space, as in the window scores: rank r of a row is its r-th real key. K is read twice; nothing of size
probes x length is stored.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.ranks_device import positions_of
from tsa_compile.kernels.common.softmax_device import merged_lse

LENGTHS = ("heads", "kv_heads", "k_len", "probes", "splits", "span")


@triton.jit
def real_keys(ranks, b, k_len, PADDED: tl.constexpr):
    if PADDED:
        return tl.load(ranks + b * k_len + k_len - 1, mask=k_len > 0, other=0)
    return k_len


@triton.jit
def probe_tile(q, head_index, first, probes, d, D: tl.constexpr, BLOCK_M: tl.constexpr):
    """(probing queries [BLOCK_M, BLOCK_D] of contiguous q [B, H, probes, D], which exist)"""
    r = first + tl.arange(0, BLOCK_M)
    ok = r < probes
    at = (head_index.to(tl.int64) * probes + r)[:, None] * D + d[None, :]
    return tl.load(q + at, mask=ok[:, None] & (d < D)[None, :], other=0.0), ok


@triton.jit
def probe_products(
    q_tile, k, order, b, start, length, k_len, k_sl, k_sd, d, scale_log2,
    D: tl.constexpr, BLOCK_N: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale * log2(e) * q k^T [BLOCK_M, BLOCK_N] of the keys from rank `start` on; -inf beyond the last."""
    j = start + tl.arange(0, BLOCK_N)
    at = positions_of(order, b, j, j < length, k_len, PADDED)
    k_tile = tl.load(k + at[None, :] * k_sl + d[:, None] * k_sd, mask=(d < D)[:, None], other=0.0)
    scores = tl.dot(q_tile, k_tile, input_precision=PRECISION) * scale_log2
    return tl.where((j < length)[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=LENGTHS)
def probe_lse_kernel(
    q, k, part_max, part_sum, order, ranks, k_sb, k_sh, k_sl, k_sd,
    heads, kv_heads, k_len, probes, splits, span, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Running maximum and sum (base 2) of BLOCK_M probes over one span of keys, to [B, H, splits, probes]."""
    head_index, split, first = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_M
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    length = real_keys(ranks, b, k_len, PADDED)
    d = tl.arange(0, BLOCK_D)
    k += b * k_sb + (h * kv_heads // heads) * k_sh
    q_tile, ok = probe_tile(q, head_index, first, probes, d, D, BLOCK_M)
    row_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(split * span, tl.minimum(split * span + span, length), BLOCK_N):
        scores = probe_products(
            q_tile, k, order, b, start, length, k_len, k_sl, k_sd, d, scale_log2, D, BLOCK_N, PADDED, PRECISION
        )
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(scores - new_max[:, None]), 1)
        row_max = new_max
    at = (head_index.to(tl.int64) * splits + split) * probes + first + tl.arange(0, BLOCK_M)
    tl.store(part_max + at, row_max, mask=ok)
    tl.store(part_sum + at, row_sum, mask=ok)


@triton.jit(do_not_specialize=LENGTHS)
def probe_mean_kernel(
    q, k, part_max, part_sum, mean, order, ranks, k_sb, k_sh, k_sl, k_sd,
    heads, kv_heads, k_len, probes, splits, span, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Mean attention of the probes to each key of one span, to mean [B, H, Lk] by rank."""
    head_index, split = tl.program_id(0), tl.program_id(1)
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    length = real_keys(ranks, b, k_len, PADDED)
    d = tl.arange(0, BLOCK_D)
    k += b * k_sb + (h * kv_heads // heads) * k_sh
    mean += head_index.to(tl.int64) * k_len
    base = head_index.to(tl.int64) * splits
    last = tl.minimum(split * span + span, length)
    for first in tl.range(0, probes, BLOCK_M):
        q_tile, ok = probe_tile(q, head_index, first, probes, d, D, BLOCK_M)
        lse = merged_lse(part_max, part_sum, base, splits, probes, first + tl.arange(0, BLOCK_M), ok, BLOCK_M)
        for start in tl.range(split * span, last, BLOCK_N):
            scores = probe_products(
                q_tile, k, order, b, start, length, k_len, k_sl, k_sd, d, scale_log2, D, BLOCK_N, PADDED, PRECISION
            )
            p = tl.where(ok[:, None], tl.exp2(scores - lse[:, None]), 0.0)
            j = start + tl.arange(0, BLOCK_N)
            total = tl.sum(p, 0) / probes
            if first > 0:  # this program alone writes these keys
                total += tl.load(mean + j, mask=j < last, other=0.0)
            tl.store(mean + j, total, mask=j < last)
