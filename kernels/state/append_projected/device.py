"""Keys of new rows, their rotation undone, projected. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE
from tsa_compile.kernels.common.rotation_device import partner_of, turned_back

LENGTHS = ("lists", "mask_sb", "mask_sl", "placed_sb", "counts_sb", "positions_sb", "index_sb", "index_sh")


@triton.jit(do_not_specialize=LENGTHS)
def append_projected_kernel(
    index, positions, counts, key, frequencies, k, placed, begin, end, key_mask, heads,
    k_sb, k_sh, k_sl, k_sd, index_sb, index_sh, positions_sb, counts_sb, placed_sb, mask_sb, mask_sl, lists, factor,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * lists, blocks of ROWS rows from the one of `begin` on): the rows from begin to end - 1 of one list.

    Args:
        index: [B, lists, L, R]; positions: int32 [B, 1, L]; counts: int32 [B, 1, pages].
        key: [lists, R, D], contiguous; frequencies: float32 [PAIRS]; heads: int32 [lists], the KV head of each list.
        placed: int64 or int32 [B or 1, new], the positions of the new rows.
    """
    b, number = (tl.program_id(0) // lists).to(tl.int64), tl.program_id(0) % lists
    old, last = tl.load(begin + b), tl.load(end + b)
    first = (old // ROWS + tl.program_id(1)) * ROWS
    if first >= last:
        return
    row = first + tl.arange(0, ROWS)
    fresh = (row >= old) & (row < last)
    place = tl.load(placed + b * placed_sb + (row - old), mask=fresh, other=0).to(tl.int32)
    tl.store(positions + b * positions_sb + row, place, mask=fresh & (number == 0))
    d = tl.arange(0, BLOCK_D)
    other_d, pair, is_first, turned = partner_of(d, PAIRS, INTERLEAVED)
    ok = fresh[:, None] & (d < D)[None, :]
    rows = k + b * k_sb + tl.load(heads + number).to(tl.int64) * k_sh + row.to(tl.int64)[:, None] * k_sl
    own = tl.load(rows + d[None, :] * k_sd, mask=ok, other=0.0).to(tl.float32)
    other = tl.load(rows + other_d[None, :] * k_sd, mask=ok, other=0.0).to(tl.float32)
    frequency = tl.load(frequencies + pair, mask=turned, other=0.0)
    before = turned_back(own, other, place[:, None], frequency[None, :], is_first[None, :], turned[None, :], factor)
    r = tl.arange(0, BLOCK_R)
    weight_at = key + (number.to(tl.int64) * R + r)[None, :] * D + d[:, None]
    weight = tl.load(weight_at, mask=(r < R)[None, :] & (d < D)[:, None], other=0.0)
    projected = tl.dot(before.to(k.dtype.element_ty), weight.to(k.dtype.element_ty), input_precision=PRECISION)
    to = index + b * index_sb + number.to(tl.int64) * index_sh + row.to(tl.int64)[:, None] * R + r[None, :]
    tl.store(to, projected.to(index.dtype.element_ty), mask=fresh[:, None] & (r < R)[None, :])
    if number == 0:
        real = row < last
        if key_mask is not None:
            real = real & tl.load(key_mask + b * mask_sb + row.to(tl.int64) * mask_sl, mask=real, other=0).to(tl.int1)
        page = first // PAGE + tl.arange(0, ROWS // PAGE)
        full = (page >= old // PAGE) & (page < last // PAGE)
        there = tl.sum(tl.reshape(real.to(tl.int32), [ROWS // PAGE, PAGE]), 1)
        tl.store(counts + b * counts_sb + page, there, mask=full)
