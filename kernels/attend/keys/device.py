"""Flash attention of all queries to the kept keys of their head, which are packed first: every query tile reads them. Triton.

No order among keys: only the last tile, up to the count that is read on the device, masks.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.grid_device import tile_and_row
from tsa_compile.kernels.common.rows_device import copy_rows, load_columns, load_rows
from tsa_compile.kernels.common.softmax_device import softmax_step

LENGTHS = ("heads", "kv_heads", "lists", "q_len", "k_len", "tiles", "i_sb", "i_sg")


@triton.jit(do_not_specialize=LENGTHS)
def pack_keys_kernel(
    k, v, packed_k, packed_v, indices, counts,
    k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, i_sb, i_sg, kv_heads, lists, k_len,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Kept rows of k and v of each list, to packed_* [B, G, Lk, D or Dv]; rows beyond the count are left as they are."""
    tile, row = tile_and_row(tl.cdiv(k_len, BLOCK))
    b, g = (row // lists).to(tl.int64), (row % lists).to(tl.int64)
    n = tl.load(counts + b)
    slots = tile * BLOCK + tl.arange(0, BLOCK)
    if tile * BLOCK >= n:
        return
    ok = slots < n
    at = tl.load(indices + b * i_sb + g * i_sg + slots, mask=ok, other=0).to(tl.int64)
    kv_head = g * kv_heads // lists
    to = (b * lists + g) * k_len
    copy_rows(k + b * k_sb + kv_head * k_sh, packed_k + to * D, at, k_sl, k_sd, slots, ok, ok, D, BLOCK_D)
    copy_rows(v + b * v_sb + kv_head * v_sh, packed_v + to * DV, at, v_sl, v_sd, slots, ok, ok, DV, BLOCK_DV)


@triton.jit(do_not_specialize=LENGTHS)
def key_attention_kernel(
    q, packed_k, packed_v, out, counts, lse, q_sb, q_sh, q_sl, q_sd, o_sb, o_sh, o_sl,
    heads, lists, q_len, k_len, tiles, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M queries of one head; the tiles of a head run side by side and share its keys in L2.

    lse: takes the natural log-sum-exp [B, H, Lq], -inf without a key; None: nobody needs it.
    """
    head_index, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    n = tl.load(counts + b)
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    first_key = (b * lists + h * lists // heads) * k_len
    k, v = packed_k + first_key * D, packed_v + first_key * DV
    row_ok = rows < q_len
    q_at = q + b * q_sb + h * q_sh + rows.to(tl.int64)[:, None] * q_sl + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    whole = n // BLOCK_N * BLOCK_N
    for start in tl.range(0, whole, BLOCK_N):
        slots = start + tl.arange(0, BLOCK_N)
        k_tile = load_columns(k, slots, D, 1, d, D, BLOCK_D)
        scores = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        v_tile = load_rows(v, slots, DV, 1, dv, DV, BLOCK_DV)
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, scale_log2, v_tile, PRECISION)
    for start in tl.range(whole, n, BLOCK_N):  # at most once
        slots = start + tl.arange(0, BLOCK_N)
        at = tl.minimum(slots, n - 1)  # what lies beyond the count was never written
        k_tile = load_columns(k, at, D, 1, d, D, BLOCK_D)
        scores = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        scores = tl.where((slots < n)[None, :], scores, float("-inf"))
        v_tile = load_rows(v, at, DV, 1, dv, DV, BLOCK_DV)
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, scale_log2, v_tile, PRECISION)

    acc = acc / tl.where(n > 0, row_sum, 1.0)[:, None]
    o_at = out + b * o_sb + h * o_sh + rows.to(tl.int64)[:, None] * o_sl + dv[None, :]
    tl.store(o_at, acc.to(out.dtype.element_ty), mask=row_ok[:, None] & (dv < DV)[None, :])
    if lse is not None:
        ln2: tl.constexpr = 0.6931471805599453
        value = tl.where(n > 0, (row_max + tl.log2(tl.where(n > 0, row_sum, 1.0))) * ln2, float("-inf"))
        tl.store(lse + (b * heads + h) * q_len + rows, value, mask=row_ok)
