"""Flash-attention prefill over kept tokens: loads gather by index, stores write each row to its place. Triton.

The causal order among kept tokens is the order of their list, so only the tile on the diagonal masks. The number of
kept tokens is read on the device: the grid covers the capacity, and programs beyond the count return at once.
"""

import triton
import triton.language as tl

LENGTHS = ("heads", "kv_heads", "lists", "q_len", "k_len", "tiles", "section", "i_sb", "i_sg")


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
def load_rows(x, at, stride_l, stride_d, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows `at` of x [L, D] as a tile [len(at), BLOCK_D]; columns beyond D are zero."""
    x += at[:, None] * stride_l + d[None, :] * stride_d
    if D == BLOCK_D:
        return tl.load(x)
    return tl.load(x, mask=(d < D)[None, :], other=0.0)


@triton.jit
def load_columns(x, at, stride_l, stride_d, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows `at` of x [L, D], transposed: a tile [BLOCK_D, len(at)]."""
    x += at[None, :] * stride_l + d[:, None] * stride_d
    if D == BLOCK_D:
        return tl.load(x)
    return tl.load(x, mask=(d < D)[:, None], other=0.0)


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
def store_rows(out, stride_l, tile, rows, row_ok, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Stores a tile [len(rows), BLOCK_DV] as the rows `rows` of out [L, DV]."""
    dv = tl.arange(0, BLOCK_DV)
    at = out + rows.to(tl.int64)[:, None] * stride_l + dv[None, :]
    tl.store(at, tile.to(out.dtype.element_ty), mask=row_ok[:, None] & (dv < DV)[None, :])


@triton.jit
def store_lse(lse, row_max, row_sum, rows, row_ok):
    """Stores the natural log-sum-exp of the rows `rows` to lse [L]; row_max is in base 2."""
    ln2: tl.constexpr = 0.6931471805599453
    tl.store(lse + rows, (row_max + tl.log2(row_sum)) * ln2, mask=row_ok)


@triton.jit
def schedule(section, tiles):
    """Program id -> (batch * heads + head, tile counted from the longest).

    `section` heads advance together, tile by tile, so that the keys and values they share stay in L2.
    """
    pid = tl.program_id(0)
    rest = pid % (section * tiles)
    return pid // (section * tiles) * section + rest % section, rest // section


@triton.jit
def zero_rows(out, stride_l, first, last, columns, column_ok, BLOCK: tl.constexpr):
    """Zeroes the rows first..last-1 of one head, then waits for the whole program."""
    for start in tl.range(first, last, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        at = out + rows.to(tl.int64)[:, None] * stride_l + columns[None, :]
        tl.store(at, 0.0, mask=(rows < last)[:, None] & column_ok[None, :])
    tl.debug_barrier()  # the kept rows among them are stored later, by other threads


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
