"""The bases of the pages that new rows have filled. Triton.

One program has one page, as two halves of its columns, in the registers of one warp: no step waits for another warp.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE, place_of_page

LENGTHS = ("block_pages", "per_row", "blocks_sb", "mask_sb", "mask_sl", "kv_heads")


@triton.jit
def not_zero(x):
    return tl.where(x == 0.0, 1.0, x)


@triton.jit
def largest(gram, STEPS: tl.constexpr):
    """About the largest eigenvector of gram [16, 16], [16] in its first dimension: power steps from its heaviest column."""
    i, j = tl.arange(0, 16)[:, None], tl.arange(0, 16)[None, :]
    heaviest = tl.argmax(tl.sum(tl.where(i == j, gram, 0.0), 0), 0)
    v = tl.sum(tl.where(j == heaviest, gram, 0.0), 1)
    for _ in tl.static_range(STEPS):
        w = tl.sum(gram * (v / not_zero(tl.max(tl.abs(v), 0)))[:, None], 0)  # along the other dimension: the matrix is symmetric
        v = tl.sum(gram * (w / not_zero(tl.max(tl.abs(w), 0)))[None, :], 1)
    return v / not_zero(tl.max(tl.abs(v), 0))


@triton.jit
def load_centred(k, at, k_sd, d, real, n, D: tl.constexpr, ROUND: tl.constexpr):
    """Rows [16, BLOCK] of the columns d, less the mean of the real ones, as the page sums have it; others are 0."""
    tile = tl.load(k + at[:, None] + d[None, :] * k_sd, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(tile, 0)
    if ROUND:
        total = total.to(tl.bfloat16).to(tl.float32)
    return tl.where(real[:, None], tile - (total / n)[None, :], 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def append_basis_kernel(
    basis, coords, scales, k, blocks, start, begin, end, key_mask,
    k_sb, k_sh, k_sl, k_sd, basis_sb, basis_sh, coords_sb, coords_sh, scales_sb, scales_sh, blocks_sb, mask_sb, mask_sl,
    block_pages, per_row, kv_heads,
    D: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr, STEPS: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk, pages that may have been filled). A page is read from the cache when its last row is there.

    Args:
        basis, coords, scales: uint8 [N, Hk, pages, RANK, D / 2], int8 [N, Hk, pages, RANK, 16], bfloat16 [N, Hk, pages, RANK].
        begin, end: int32 [B], rows before and now. blocks, start, key_mask: may be None.
        HALF: power of two from D / 2 on. ROUND: the page sums are bfloat16.
    """
    b, kv_head = (tl.program_id(0) // kv_heads).to(tl.int64), (tl.program_id(0) % kv_heads).to(tl.int64)
    page = tl.load(begin + b) // PAGE + tl.program_id(1)
    if page >= tl.load(end + b) // PAGE:
        return
    i = tl.arange(0, 16)
    j = page * PAGE + i
    owner, place = place_of_page(page + tl.zeros_like(i), i >= 0, blocks, blocks_sb, block_pages, per_row, b)
    real = i >= 0
    if start is not None:
        real = real & (j >= tl.load(start + b))
    if key_mask is not None:
        real = real & tl.load(key_mask + b * mask_sb + j.to(tl.int64) * mask_sl).to(tl.int1)
    n = tl.maximum(tl.sum(real.to(tl.int32), 0), 1).to(tl.float32)
    at = owner.to(tl.int64) * k_sb + kv_head * k_sh + (place * PAGE + i).to(tl.int64) * k_sl
    half: tl.constexpr = D // 2
    d = tl.arange(0, HALF)
    low = load_centred(k, at, k_sd, d, real, n, half, ROUND)
    high = load_centred(k + half * k_sd, at, k_sd, d, real, n, half, ROUND)
    gram = tl.dot(low, tl.trans(low), input_precision="ieee") + tl.dot(high, tl.trans(high), input_precision="ieee")

    owner, place = tl.max(owner, 0).to(tl.int64), tl.max(place, 0).to(tl.int64)  # the same in all rows
    basis += owner * basis_sb + kv_head * basis_sh + place * (RANK * half)
    coords += owner * coords_sb + kv_head * coords_sh + place * (RANK * 16)
    scales += owner * scales_sb + kv_head * scales_sh + place * RANK
    for r in tl.range(0, RANK):
        v = largest(gram, STEPS)
        low_numbers, high_numbers = tl.sum(low * v[:, None], 0), tl.sum(high * v[:, None], 0)
        unit = not_zero(tl.maximum(tl.max(tl.abs(low_numbers), 0), tl.max(tl.abs(high_numbers), 0)))
        low_numbers, high_numbers = tl.floor(low_numbers / unit * 7.0 + 0.5), tl.floor(high_numbers / unit * 7.0 + 0.5)
        square = tl.sum(low_numbers * low_numbers, 0) + tl.sum(high_numbers * high_numbers, 0)
        along = tl.sum(low * low_numbers[None, :], 1) + tl.sum(high * high_numbers[None, :], 1)
        wanted = along / not_zero(square)
        scale = (tl.max(tl.abs(wanted), 0) / 127.0).to(tl.bfloat16).to(tl.float32)
        c = tl.minimum(tl.maximum(tl.floor(wanted / not_zero(scale) + 0.5), -127.0), 127.0)
        low -= scale * c[:, None] * low_numbers[None, :]
        high -= scale * c[:, None] * high_numbers[None, :]
        gram -= scale * (along[:, None] * c[None, :] + c[:, None] * along[None, :])
        gram += scale * scale * square * c[:, None] * c[None, :]
        packed = (low_numbers.to(tl.int32) + 8) | ((high_numbers.to(tl.int32) + 8) << 4)
        tl.store(basis + r * half + d, packed.to(tl.uint8), mask=d < half)
        tl.store(coords + r * 16 + i, tl.where(real, c, -128.0).to(tl.int8))
        tl.store(scales + r, scale.to(tl.bfloat16))
