"""Which key blocks each row block reads: pooled queries against means of keys, and the threshold, in one kernel. Triton.

A program has ROW_BLOCKS row blocks of a head, each with PER score rows (the mean of POOL queries): M score rows together. Scores
are cheap (a 4096th of attention's at POOL 64), so they are computed again in each of three passes: the softmaxes' sums, the
heaviest block, the bits.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.grid_device import tile_and_row
from tsa_compile.kernels.common.range_device import valid_keys, valid_range

LENGTHS = (
    "heads",
    "kv_heads",
    "q_len",
    "k_len",
    "row_blocks",
    "key_blocks",
    "words",
    "window",
    "sinks",
    "last_dense",
    "behind",
    "m_sb",
)
ROWS = tl.constexpr(128)  # as in common/row_blocks.py
KEYS = tl.constexpr(64)
WORD = tl.constexpr(64)
FLAGS = tl.constexpr(4)


@triton.jit
def pool_queries(
    q, q_sl, q_sd, first_position, skipped, starts, lengths, key_mask, b, k_len, m_sb,
    D: tl.constexpr, BLOCK_D: tl.constexpr, POOL: tl.constexpr, PER: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    STEP: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums [M, BLOCK_D] of every POOL queries from `first_position` on, by products with zeros and ones, and how many each is of
    [M]. Padding does not count."""
    d, row = tl.arange(0, BLOCK_D), tl.arange(0, STEP)
    m = tl.arange(0, ROW_BLOCKS * PER)
    total = tl.zeros([ROW_BLOCKS * PER, BLOCK_D], tl.float32)
    number = tl.zeros([ROW_BLOCKS * PER], tl.float32)
    for i in tl.range(0, ROW_BLOCKS * (ROWS // STEP)):
        at = first_position + i * STEP + row
        ok = (at >= skipped) & valid_keys(at, starts, lengths, key_mask, b, k_len, m_sb, START, LENGTH, MASK)
        x = tl.load(
            q + (at - skipped).to(tl.int64)[:, None] * q_sl + d[None, :] * q_sd, mask=ok[:, None] & (d < D)[None, :], other=0.0
        )
        member = m[:, None] == (i * STEP + row[None, :]) // POOL
        total = tl.dot(member.to(x.dtype), x, total, input_precision=PRECISION)
        number += tl.sum((member & ok[None, :]).to(tl.float32), 1)
    return total, number


@triton.jit
def page_scores(mean_q, means, counts, start, number, own, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [M, WORD] of the key blocks from `start` on, of `number`, in base 2; -inf where not scored.

    Scored are blocks wholly before `own` [M], the first key of the row block's own, that hold a key; finite scores.
    """
    c, d = tl.arange(0, WORD) + start, tl.arange(0, BLOCK_D)
    ok = c < number
    k_tile = tl.load(means + c[None, :] * D + d[:, None], mask=ok[None, :] & (d < D)[:, None], other=0.0)
    ok &= tl.load(counts + c, mask=ok, other=0) > 0
    scores = tl.dot(mean_q, k_tile, input_precision=PRECISION)
    scored = ok[None, :] & ((c + 1)[None, :] * KEYS <= own[:, None]) & (tl.abs(scores) < float("inf"))
    return tl.where(scored, scores, float("-inf"))


@triton.jit
def row_sums(mean_q, means, counts, number, own, weight, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """What to take from each row's scores [M], in base 2, so that exponentials are the row's share of the row block's mass."""
    M: tl.constexpr = mean_q.shape[0]
    row_max = tl.full([M], -1.0e30, tl.float32)
    row_sum = tl.zeros([M], tl.float32)
    for step in tl.range(0, tl.cdiv(number, WORD)):
        scores = page_scores(mean_q, means, counts, step * WORD, number, own, D, BLOCK_D, PRECISION)
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(scores - new_max[:, None]), 1)
        row_max = new_max
    some = (row_sum > 0) & (weight > 0)
    return tl.where(some, row_max + tl.log2(tl.where(some, row_sum, 1.0) / tl.where(some, weight, 1.0)), float("inf"))


@triton.jit
def block_mass(scores, shift, ROW_BLOCKS: tl.constexpr, PER: tl.constexpr):
    """Masses [ROW_BLOCKS, WORD] in base 2, up to a factor for each row block; of one score row they are its scores."""
    shifted = scores - shift[:, None]
    if PER == 1:
        mass = shifted
    else:
        share = tl.exp2(shifted)
        mass = tl.log2(tl.sum(tl.reshape(share, [ROW_BLOCKS, PER, WORD]), 1))
    return mass


@triton.jit
def forced_blocks(c, counts, key_blocks, begin, own, first, end, window, sinks, last_dense):
    """(key blocks c [N] that hold a key and do not lie behind the row block, those that are always kept), [ROW_BLOCKS, N] each,
    of row blocks that begin at `begin` and whose own keys begin at `own`."""
    at = (c * KEYS)[None, :]
    begin, own = begin[:, None], own[:, None]
    visible = (tl.load(counts + c, mask=c < key_blocks, other=0) > 0)[None, :] & (at < own + ROWS)
    forced = (at + KEYS > own - window + 1) | (at >= own) | (at < first + sinks)
    forced |= (last_dense > 0) & (begin < end) & (begin + ROWS > end - last_dense)
    return visible, forced


@triton.jit
def count_keys(counts, key_blocks):
    """All keys of a batch row."""
    number = tl.zeros([WORD], tl.int32)
    for start in tl.range(0, key_blocks, WORD):
        c = start + tl.arange(0, WORD)
        number += tl.load(counts + c, mask=c < key_blocks, other=0)
    return tl.sum(number, 0)


@triton.jit(do_not_specialize=LENGTHS)
def select_key_blocks_kernel(
    q, means, counts, bits, starts, lengths, key_mask, alphas, flags, q_sb, q_sh, q_sl, q_sd, m_sb,
    heads, kv_heads, q_len, k_len, row_blocks, key_blocks, words, scale_log2, alpha_log2, window, sinks, last_dense, behind,
    D: tl.constexpr, BLOCK_D: tl.constexpr, POOL: tl.constexpr, PER: tl.constexpr, ROW_BLOCKS: tl.constexpr, STEP: tl.constexpr,
    START: tl.constexpr, LENGTH: tl.constexpr, MASK: tl.constexpr, BY_HEAD: tl.constexpr, POOLING: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """ROW_BLOCKS row blocks of one head, to bits [B, H, row blocks, words]. BY_HEAD: alphas [H] in place of alpha_log2.

    flags: int32 [FLAGS + B] for the attention that follows, or None. The first is set to zero, its queue of tiles; with MASK,
    those from FLAGS on to whether the mask hides a key between a row's first and last.
    behind: how many rows before its own a row block's scoring rows begin. If any, the call's first row block reads everything.

    PER: score rows of a row block. STEP: queries that are summed at a time. POOLING, PRECISION: how queries are summed, and how
    float32 means are multiplied.
    """
    tile, head = tile_and_row(tl.cdiv(row_blocks, ROW_BLOCKS))
    head = head.to(tl.int64)
    b, h = head // heads, head % heads
    first, end = valid_range(starts, lengths, b, k_len, START, LENGTH)
    skipped = k_len - q_len
    block0 = tile * ROW_BLOCKS
    first_position = (skipped // ROWS + block0) * ROWS
    last_own = tl.maximum(end - 1, 0) // ROWS * ROWS

    own_m = tl.minimum(first_position + tl.arange(0, ROW_BLOCKS * PER) // PER * ROWS, last_own)
    mean_q, weight = pool_queries(
        q + b * q_sb + h * q_sh, q_sl, q_sd, first_position - behind, skipped, starts, lengths, key_mask, b, k_len, m_sb,
        D, BLOCK_D, POOL, PER, ROW_BLOCKS, STEP, START, LENGTH, MASK, POOLING,
    )  # fmt: skip
    mean_q *= (scale_log2 / tl.maximum(weight, 1.0))[:, None]
    means += (b * kv_heads + h * kv_heads // heads) * key_blocks * D
    counts += b * key_blocks
    if flags is not None:
        tl.store(flags, 0, mask=tl.program_id(0) == 0)
        if MASK:
            tells = (h == 0) & (tile == 0)  # one program for a row of the batch
            number = count_keys(counts, tl.where(tells, key_blocks, 0))
            tl.store(flags + FLAGS + b, (number < end - first).to(tl.int32), mask=tells)
    n_scored = tl.minimum(first_position + (ROW_BLOCKS - 1) * ROWS, last_own) // KEYS  # of the last row block
    steps = tl.cdiv(n_scored, WORD)
    shift = tl.where(weight > 0, 0.0, float("inf"))
    if PER > 1:
        shift = row_sums(mean_q, means, counts, n_scored, own_m, weight, D, BLOCK_D, PRECISION)

    block = block0 + tl.arange(0, ROW_BLOCKS)
    begin = (skipped // ROWS + block) * ROWS
    own = tl.minimum(begin, last_own)
    heaviest = tl.full([ROW_BLOCKS], float("-inf"), tl.float32)
    for step in tl.range(0, steps):
        c = tl.arange(0, WORD) + step * WORD
        scores = page_scores(mean_q, means, counts, step * WORD, n_scored, own_m, D, BLOCK_D, PRECISION)
        mass = block_mass(scores, shift, ROW_BLOCKS, PER)
        visible, forced = forced_blocks(c, counts, key_blocks, begin, own, first, end, window, sinks, last_dense)
        heaviest = tl.maximum(heaviest, tl.max(tl.where(visible & (forced == 0), mass, float("-inf")), 1))
    if BY_HEAD:
        alpha_log2 = tl.load(alphas + h)
    least = tl.where(heaviest > float("-inf"), heaviest + alpha_log2, float("inf"))
    least = tl.where(alpha_log2 > float("-inf"), least, float("-inf"))  # alpha 0: everything

    bits += (head * row_blocks + block) * words
    for step in tl.range(0, words):
        c = tl.arange(0, WORD) + step * WORD
        visible, forced = forced_blocks(c, counts, key_blocks, begin, own, first, end, window, sinks, last_dense)
        kept = forced | ((behind > 0) & (block == 0))[:, None]
        if step < steps:
            scores = page_scores(mean_q, means, counts, step * WORD, n_scored, own_m, D, BLOCK_D, PRECISION)
            kept |= block_mass(scores, shift, ROW_BLOCKS, PER) >= least[:, None]
        word = tl.sum((kept & visible).to(tl.int64) << tl.arange(0, WORD)[None, :].to(tl.int64), 1)
        tl.store(bits + step, word, mask=block < row_blocks)
