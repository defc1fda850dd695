"""Flash-attention prefill over kept tokens: loads gather by index, stores write each row to its place. Triton.

The causal order among kept tokens is the order of their list, so only the tile on the diagonal masks. The number of
kept tokens is read on the device: the grid covers the capacity, and programs beyond the count return at once.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.rows_device import load_columns, load_rows, store_lse, store_rows, zero_rows
from tsa_compile.kernels.common.softmax_device import softmax_step

LENGTHS = ("heads", "kv_heads", "lists", "q_len", "k_len", "tiles", "section", "i_sb", "i_sg")


@triton.jit
def diagonal_steps(
    acc, row_max, row_sum, q_tile, k, v, k_sl, k_sd, v_sl, v_sd, kept, slots, first, n, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax steps over the keys of the query tile itself, which starts at slot `first`: a slot sees those up to its own."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    for start in tl.range(first, tl.minimum(first + BLOCK_M, n), BLOCK_N):
        key_slots = start + tl.arange(0, BLOCK_N)
        at = tl.load(kept + key_slots, mask=key_slots < n, other=0).to(tl.int64)
        k_tile = load_columns(k, at, k_sl, k_sd, d, D, BLOCK_D)
        scores = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        scores = tl.where(key_slots[None, :] <= slots[:, None], scores, float("-inf"))
        v_tile = load_rows(v, at, v_sl, v_sd, dv, DV, BLOCK_DV)
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, scale_log2, v_tile, PRECISION)
    return acc, row_max, row_sum


@triton.jit
def schedule(section, tiles):
    """Program id -> (batch * heads + head, tile counted from the longest).

    `section` heads advance together, tile by tile, so that the keys and values they share stay in L2.
    """
    pid = tl.program_id(0)
    rest = pid % (section * tiles)
    return pid // (section * tiles) * section + rest % section, rest // section


@triton.jit(do_not_specialize=LENGTHS)
def sparse_prefill_kernel(
    q, k, v, out, lse, indices, counts,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, o_sl, i_sb, i_sg,
    heads, kv_heads, lists, q_len, k_len, tiles, section, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STRIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BLOCK_M kept queries of one head.

    Without a strip the program also zeroes the rows between its own that are not kept. With one it leaves them, and
    stores the log-sum-exp [B, H, Lq] of its rows for the merge.
    """
    tl.static_assert(BLOCK_M % BLOCK_N == 0)
    head_index, from_longest = schedule(section, tiles)
    b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
    n = tl.load(counts + b)
    n_tiles = tl.maximum(tl.cdiv(n, BLOCK_M), 1)
    tile = n_tiles - 1 - from_longest
    if tile < 0:
        return
    kept = indices + b * i_sb + h * lists // heads * i_sg
    first = tile * BLOCK_M
    slots = first + tl.arange(0, BLOCK_M)
    rows = tl.load(kept + slots, mask=slots < n, other=-1) - (k_len - q_len)
    row_ok = rows >= 0
    dv = tl.arange(0, BLOCK_DV)
    out += b * o_sb + h * o_sh
    if not STRIP:
        before = tl.load(kept + first - 1, mask=first > 0, other=-1) + 1 - (k_len - q_len)
        after = tl.where(tile == n_tiles - 1, q_len, tl.max(rows) + 1)
        zero_rows(out, o_sl, tl.maximum(before, 0), after, dv, dv < DV, BLOCK_M)
    if tl.max(rows) < 0:
        return

    d = tl.arange(0, BLOCK_D)
    kv_head = h * kv_heads // heads
    q += b * q_sb + h * q_sh
    k += b * k_sb + kv_head * k_sh
    v += b * v_sb + kv_head * v_sh
    q_at = q + rows.to(tl.int64)[:, None] * q_sl + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    for start in tl.range(0, first, BLOCK_N):  # every key of these tiles precedes every row
        at = tl.load(kept + start + tl.arange(0, BLOCK_N)).to(tl.int64)
        k_tile = load_columns(k, at, k_sl, k_sd, d, D, BLOCK_D)
        scores = tl.dot(q_tile, k_tile, input_precision=PRECISION)
        v_tile = load_rows(v, at, v_sl, v_sd, dv, DV, BLOCK_DV)
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, scale_log2, v_tile, PRECISION)

    acc, row_max, row_sum = diagonal_steps(
        acc, row_max, row_sum, q_tile, k, v, k_sl, k_sd, v_sl, v_sd, kept, slots, first, n, scale_log2,
        D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip
    store_rows(out, o_sl, acc / row_sum[:, None], rows, row_ok, DV, BLOCK_DV)
    if STRIP:
        store_lse(lse + (b * heads + h) * q_len, row_max, row_sum, rows, row_ok)
