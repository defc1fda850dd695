"""Flash-attention prefill over a bitmap of key blocks. Triton, for any GPU.

A program first writes down which key blocks its row block keeps, to a list of its own, since loads of a loop over set bits could
not be started ahead. The list is read by the same program only, behind a barrier.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.range_device import valid_keys, valid_range
from tsa_compile.kernels.common.rows_device import load_columns, load_rows, store_rows
from tsa_compile.kernels.common.softmax_device import softmax_step
from tsa_compile.kernels.common.view_device import place_of_rows

LENGTHS = (
    "heads",
    "kv_heads",
    "lists",
    "q_len",
    "k_len",
    "row_blocks",
    "words",
    "tiles",
    "section",
    "total",
    "capacity",
    "m_sb",
    "blocks_sb",
    "block_rows",
    "per_row",
)
ROWS = tl.constexpr(128)  # as in common/row_blocks.py
KEYS = tl.constexpr(64)
WORD = tl.constexpr(64)


@triton.jit
def list_blocks(bits, first_block, end_block, words, listed, CHUNK: tl.constexpr):
    """Writes the set bits from first_block to end_block - 1, ascending, to `listed`; returns their number."""
    number = 0
    word, bit = tl.arange(0, CHUNK)[:, None], tl.arange(0, WORD)[None, :]
    for start in tl.range(0, tl.minimum(words, tl.cdiv(end_block, WORD)), CHUNK):
        value = tl.load(bits + start + word, mask=start + word < words, other=0)
        block = (start + word) * WORD + bit
        kept = (((value >> bit.to(tl.int64)) & 1) != 0) & (block >= first_block) & (block < end_block)
        flat = tl.reshape(kept.to(tl.int32), [CHUNK * WORD])
        place = number + tl.cumsum(flat, 0) - 1
        tl.store(listed + place, tl.reshape(block, [CHUNK * WORD]), mask=flat != 0)
        number += tl.sum(flat)
    tl.debug_barrier()  # other threads read it
    return number


@triton.jit
def masked_step(
    acc, row_max, row_sum, q_tile, k, v, k_sb, k_sl, k_sd, v_sb, v_sl, v_sd, keys, real, at, blocks, block_rows, per_row,
    scale_log2, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A step over the keys at positions `keys`, as far as they are `real`: rows at positions `at` see those up to their own."""
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    owner, inside = place_of_rows(keys, real, blocks, block_rows, per_row)
    k_at = k + (owner * k_sb + inside * k_sl)[None, :] + d[:, None] * k_sd
    k_tile = tl.load(k_at, mask=real[None, :] & (d < D)[:, None], other=0.0)
    scores = tl.dot(q_tile, k_tile, input_precision=PRECISION)
    scores = tl.where((keys[None, :] <= at[:, None]) & real[None, :], scores, float("-inf"))
    v_at = v + (owner * v_sb + inside * v_sl)[:, None] + dv[None, :] * v_sd
    v_tile = tl.load(v_at, mask=real[:, None] & (dv < DV)[None, :], other=0.0)
    return softmax_step(acc, row_max, row_sum, scores, scale_log2, v_tile, PRECISION)


@triton.jit
def attend_tile(
    q_tile, at, k, v, k_sb, k_sl, k_sd, v_sb, v_sl, v_sd, own, limit, listed, number, starts, lengths, key_mask, b, k_len, m_sb,
    blocks, block_rows, per_row, scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PER: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of the rows at positions `at` over `number` listed key blocks, all before `own`, and the keys own..limit-1.

    Without a mask only the first listed block may hold padding, of a prompt padded on the left.
    """
    d, dv, i = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max = tl.full([BLOCK_M], -1.0e30, tl.float32)  # finite: a row may see none of a step's keys
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    masked = number if MASK else tl.minimum(number, 1)
    for step in tl.range(0, masked * PER):
        keys = tl.load(listed + step // PER) * KEYS + step % PER * BLOCK_N + i
        real = valid_keys(keys, starts, lengths, key_mask, b, k_len, m_sb, START, LENGTH, MASK)
        acc, row_max, row_sum = masked_step(
            acc, row_max, row_sum, q_tile, k, v, k_sb, k_sl, k_sd, v_sb, v_sl, v_sd, keys, real, at, blocks, block_rows, per_row,
            scale_log2,
            D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    if not MASK:
        block = tl.load(listed + 1, mask=number > 1, other=0)
        for step in tl.range(PER, number * PER):
            keys = block * KEYS + step % PER * BLOCK_N + i
            owner, inside = place_of_rows(keys, keys >= 0, blocks, block_rows, per_row)
            ahead = (step + 1) // PER
            block = tl.load(listed + ahead, mask=ahead < number, other=0)  # a step ahead: loads of loads start late
            k_tile = load_columns(k, owner * k_sb + inside * k_sl, 1, k_sd, d, D, BLOCK_D)
            scores = tl.dot(q_tile, k_tile, input_precision=PRECISION)
            v_tile = load_rows(v, owner * v_sb + inside * v_sl, 1, v_sd, dv, DV, BLOCK_DV)
            acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, scores, scale_log2, v_tile, PRECISION)
    for start in tl.range(own, limit, BLOCK_N):
        real = valid_keys(start + i, starts, lengths, key_mask, b, k_len, m_sb, START, LENGTH, MASK)
        acc, row_max, row_sum = masked_step(
            acc, row_max, row_sum, q_tile, k, v, k_sb, k_sl, k_sd, v_sb, v_sl, v_sd, start + i, real, at, blocks, block_rows,
            per_row, scale_log2,
            D, DV, BLOCK_D, BLOCK_DV, PRECISION,
        )  # fmt: skip
    return acc, row_max, row_sum


@triton.jit
def find_tile(number, tiles, section):
    """Tile number -> (batch * heads + head, tile of the head, from the last): `section` heads advance together (`schedule`)."""
    rest = number % (section * tiles)
    return number // (section * tiles) * section + rest % section, tiles - 1 - rest // section


@triton.jit(do_not_specialize=LENGTHS)
def key_block_attention_kernel(
    q, k, v, out, lse, bits, starts, lengths, key_mask, blocks, scratch,
    q_sb, q_sh, q_sl, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh, o_sl, m_sb,
    heads, kv_heads, lists, q_len, k_len, row_blocks, words, tiles, section, total, capacity, blocks_sb, block_rows, per_row,
    scale_log2,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PER: tl.constexpr, CHUNK: tl.constexpr, START: tl.constexpr, LENGTH: tl.constexpr, MASK: tl.constexpr,
    LSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every tile of BLOCK_M rows, several a program. scratch: int32 [programs, capacity], key blocks of PER steps."""
    tl.static_assert(ROWS % BLOCK_M == 0 and KEYS == PER * BLOCK_N)
    skipped = k_len - q_len
    d = tl.arange(0, BLOCK_D)
    listed = scratch + tl.program_id(0).to(tl.int64) * capacity
    for number in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        head_index, tile = find_tile(number, tiles, section)
        b, h = (head_index // heads).to(tl.int64), (head_index % heads).to(tl.int64)
        kv_head, row_block = h * kv_heads // heads, tile * BLOCK_M // ROWS
        first, end = valid_range(starts, lengths, b, k_len, START, LENGTH)
        at = skipped // ROWS * ROWS + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        row = at - skipped
        row_ok = (row >= 0) & (row < q_len)
        own = tl.minimum((skipped // ROWS + row_block) * ROWS, tl.maximum(end - 1, 0) // ROWS * ROWS)
        limit = tl.minimum(tl.minimum(own + ROWS, end), tl.max(at) + 1)
        bit_row = bits + ((b * lists + h * lists // heads) * row_blocks + row_block) * words
        tl.debug_barrier()  # all have read the list of the tile before
        kept = list_blocks(bit_row, first // KEYS, own // KEYS, words, listed, CHUNK)

        q_at = q + b * q_sb + h * q_sh + row.to(tl.int64)[:, None] * q_sl + d[None, :] * q_sd
        q_tile = tl.load(q_at, mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
        k_head, v_head, table = k + kv_head * k_sh, v + kv_head * v_sh, blocks
        if blocks is None:
            k_head, v_head = k_head + b * k_sb, v_head + b * v_sb
        else:
            table = blocks + b * blocks_sb
        acc, row_max, row_sum = attend_tile(
            q_tile, at, k_head, v_head, k_sb, k_sl, k_sd, v_sb, v_sl, v_sd, own, limit, listed, kept, starts, lengths, key_mask,
            b, k_len, m_sb, table, block_rows, per_row, scale_log2,
            D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PER, START, LENGTH, MASK, PRECISION,
        )  # fmt: skip
        some = row_sum > 0
        result = tl.where(some[:, None], acc / tl.where(some, row_sum, 1.0)[:, None], 0.0)
        store_rows(out + b * o_sb + h * o_sh, o_sl, result, row, row_ok, DV, BLOCK_DV)
        if LSE:
            ln2: tl.constexpr = 0.6931471805599453
            value = tl.where(some, (row_max + tl.log2(tl.where(some, row_sum, 1.0))) * ln2, float("-inf"))
            tl.store(lse + (b * heads + h) * q_len + row, value, mask=row_ok)
