"""Query rows of padding: each reads the real keys before it. Triton.

`order` (`ranks.py`) ends with the padding, ascending: these are the rows. The keys of a row are the first `ranks[row]` entries.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.grid_device import tile_and_row
from tsa_compile.kernels.common.rows_device import load_columns, load_rows, store_lse, store_rows
from tsa_compile.kernels.common.softmax_device import softmax_step_or_none


@triton.jit
def padding_rows(order, ranks, tile, q_len, k_len, BLOCK_M: tl.constexpr):
    """A tile of the queries that are padding: (positions, how many real keys precede each; 0 behind the last such query)."""
    skipped = k_len - q_len
    real = tl.load(ranks + k_len - 1) - tl.load(ranks + skipped - 1, mask=skipped > 0, other=0)  # real queries
    t = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    there = t < q_len - real
    at = tl.load(order + k_len - (q_len - real) + t, mask=there, other=skipped)
    return at, tl.load(ranks + at, mask=there, other=0)


@triton.jit(do_not_specialize=["heads", "kv_heads", "q_len", "k_len"])
def padding_kernel(
    q, k, v, out, order, ranks, lse,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, o_sl,
    heads, kv_heads, q_len, k_len, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M such rows of one head; rows without a key before them are left as they are.

    lse: takes the natural log-sum-exp [B, H, Lq] of the rows that are written; None: nobody needs it.
    """
    tile, head_index = tile_and_row(tl.cdiv(q_len, BLOCK_M))
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    order += b * k_len
    ranks += b * k_len
    at, counts = padding_rows(order, ranks, tile, q_len, k_len, BLOCK_M)
    n = tl.max(counts)
    if n == 0:
        return
    rows, row_ok = at - (k_len - q_len), counts > 0

    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    kv_head = h * kv_heads // heads
    k += b * k_sb + kv_head * k_sh
    v += b * v_sb + kv_head * v_sh
    q_at = q + b * q_sb + h * q_sh + rows.to(tl.int64)[:, None] * q_sl + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start in tl.range(0, n, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        key_at = tl.load(order + tl.minimum(slots, n - 1)).to(tl.int64)
        scores = tl.dot(q_tile, load_columns(k, key_at, k_sl, k_sd, d, D, BLOCK_D), input_precision=PRECISION)
        v_tile = load_rows(v, key_at, v_sl, v_sd, dv, DV, BLOCK_DV)
        allowed = slots[None, :] < counts[:, None]
        acc, row_max, row_sum = softmax_step_or_none(acc, row_max, row_sum, scores, allowed, scale_log2, v_tile, PRECISION)

    row_sum = tl.where(row_ok, row_sum, 1.0)
    store_rows(out + b * o_sb + h * o_sh, o_sl, acc / row_sum[:, None], rows, row_ok, DV, BLOCK_DV)
    if lse is not None:
        store_lse(lse + (b * heads + h) * q_len, row_max, row_sum, rows, row_ok)
