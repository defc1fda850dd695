"""One query row over the keys in a list and all keys from some position on, as one sequence that programs split. Triton.

The list's keys are gathered as they are read; entry n of the sequence is the list's n-th key, or, behind its end, the key
`since + n - count`. The query heads of a KV head are one tile, as in device.py.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.attend.decode.device import softmax_step, with_sink
from tsa_compile.kernels.common.cache_device import LOG2_E, add_bias, load_tile
from tsa_compile.kernels.common.splits_device import LN_2, log_sum

LENGTHS = (
    "kv_heads", "group", "k_len", "splits", "tiles_m", "mask_sb", "mask_sl", "bias_sb", "bias_sh", "bias_sl", "lists_sb",
    "lists_sh", "counts_sb", "counts_sh", "o_sb", "o_sh",
)  # fmt: skip


@triton.jit
def keys_of_sequence(tile, indices, count, since, total, key_mask, mask_sl, BLOCK_N: tl.constexpr):
    """Positions of a tile's keys, and which are there to be seen."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_listed, there = n < count, n < total
    j = tl.where(is_listed, tl.load(indices + n, mask=is_listed, other=0), since + n - count)
    if key_mask is not None:  # listed keys were visible when they were listed
        at = key_mask + j.to(tl.int64) * mask_sl
        there = there & (is_listed | tl.load(at, mask=there & (n >= count), other=0).to(tl.int1))
    return j, there


@triton.jit(do_not_specialize=LENGTHS)
def listed_kernel(
    q, k, v, out, lse, part, part_lse, indices, counts, since, start, lengths, key_mask, bias, sinks,
    q_sb, q_sh, q_sd, k_sb, k_sh, k_sl, k_sd, v_sb, v_sh, v_sl, v_sd, o_sb, o_sh,
    mask_sb, mask_sl, bias_sb, bias_sh, bias_sl, lists_sb, lists_sh, counts_sb, counts_sh,
    kv_heads, group, k_len, splits, tiles_m, scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): one part of the keys of one KV head, for BLOCK_M of its `group` query heads.

    Args:
        out, lse: [B, H, 1, DV], float32 [B, H, 1]; written if ONE: there is one part.
        part, part_lse: float32 [B, H, splits, DV], base 2 [B, H, splits]; written otherwise.
        indices, counts, since: int32 [B, Hk, N], [B, Hk], [B]; where all heads have one list, the strides of heads are 0.
        start, lengths: int32 [B]; key_mask: bool [B, k_len]; bias: bool or numbers [B, H, 1, k_len]; sinks: [H]; or None.
    """
    tile_m, head_index, split = tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m, tl.program_id(1)
    b, kv_head = (head_index // kv_heads).to(tl.int64), (head_index % kv_heads).to(tl.int64)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    query_ok = m < group
    h = kv_head * group + tl.minimum(m, group - 1)
    number = head_index.to(tl.int64) * group + m  # of the query among [B, H]

    first, end = tl.load(since + b), k_len
    if lengths is not None:
        end = tl.load(lengths + b)
    if start is not None:
        begin = tl.maximum(tl.load(start + b), 0)
        first = tl.maximum(first, begin)
        if lengths is not None:
            end += begin
    count = tl.load(counts + b * counts_sb + kv_head * counts_sh)
    total = count + tl.maximum(tl.minimum(end, k_len) - first, 0)
    tiles = tl.cdiv(total, BLOCK_N)
    low, high = split * tiles // splits, (split + 1) * tiles // splits
    if not ONE:  # noqa: SIM102
        if low >= high:
            tl.store(part_lse + number * splits + split, float("-inf"), mask=query_ok)
            return
    indices += b * lists_sb + kv_head * lists_sh
    if key_mask is not None:
        key_mask += b * mask_sb
    k += b * k_sb + kv_head * k_sh
    v += b * v_sb + kv_head * v_sh
    d = tl.arange(0, BLOCK_D)
    q_at = q + b * q_sb + (h * q_sh)[:, None] + d[None, :] * q_sd
    q_tile = tl.load(q_at, mask=query_ok[:, None] & (d < D)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    row_max, row_sum = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)

    next_j, next_there = keys_of_sequence(low, indices, count, first, total, key_mask, mask_sl, BLOCK_N)
    for tile in tl.range(low, high):
        j, there = next_j.to(tl.int64), next_there
        next_j, next_there = keys_of_sequence(  # what addresses depend on is read a tile ahead
            tile + 1, indices, count, first, total, key_mask, mask_sl, BLOCK_N
        )
        k_tile = load_tile(k + j * k_sl, k_sd, there, D, BLOCK_D)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
        visible = query_ok[:, None] & there[None, :]
        if bias is not None:
            logits, shown = add_bias(logits, bias, bias_sl, b * bias_sb + h * bias_sh, query_ok, j, there, False)
            visible = visible & shown
        logits = tl.where(visible, logits * LOG2_E, float("-inf"))
        v_tile = load_tile(v + j * v_sl, v_sd, there, DV, BLOCK_DV)
        acc, row_max, row_sum = softmax_step(acc, row_max, row_sum, logits, v_tile, PRECISION, False)

    dv = tl.arange(0, BLOCK_DV)
    ok = query_ok[:, None] & (dv < DV)[None, :]
    if ONE:
        if sinks is not None:
            acc, row_max, row_sum = with_sink(acc, row_max, row_sum, tl.load(sinks + h).to(tl.float32) * LOG2_E, False)
        logs, total_sum = log_sum(row_max, row_sum)
        o_at = out + b * o_sb + (h * o_sh)[:, None] + dv[None, :]
        tl.store(o_at, (acc / total_sum[:, None]).to(out.dtype.element_ty), mask=ok)
        tl.store(lse + number, logs * LN_2, mask=query_ok)
    else:
        logs, total_sum = log_sum(row_max, row_sum)
        p_at = part + ((number * splits + split) * DV)[:, None] + dv[None, :]
        tl.store(p_at, acc / total_sum[:, None], mask=ok)
        tl.store(part_lse + number * splits + split, logs, mask=query_ok)
