"""Logits of listed pages by their bases. Triton.

Programs share a list by its entries; each also owns the chunks of pages around its own, copies what is not listed there, and sums
up its chunks at the end. The products with all directions of a tile's pages are one; what follows stays in a thread's registers.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.cache_device import LOG2_E
from tsa_compile.kernels.common.pages_device import PAGE, place_of_page
from tsa_compile.kernels.common.splits_device import LN_2

LENGTHS = (
    "group", "rows", "kv_heads", "tiles_m", "capacity", "pages", "chunks", "most", "splits", "block_pages", "per_row",
    "blocks_sb", "counts_sb",
)  # fmt: skip
RANK = tl.constexpr(8)  # directions of a page, as common/page_basis.py has it; `pieces` are so many


@triton.jit
def first_of_part(part, splits, indices, count, chunks, CHUNK: tl.constexpr):
    """(chunk, entry of the list) at which a part begins: the chunk of the entry that begins an equal share of the list.

    Parts end where the next begins, so that a part owns whole chunks, in all of them every chunk of the row has one owner.
    Without a list, parts share the chunks.
    """
    chunk, entry = part * chunks // splits, 0
    if indices is not None:
        entry = (part.to(tl.int64) * count // splits).to(tl.int32)
        page = tl.load(indices + entry, mask=entry < count, other=0)  # by a mask: behind a branch, Triton knows of no alignment
        chunk = tl.where(count > 0, tl.minimum(page // CHUNK, chunks), chunk)
    chunk = tl.where(part == 0, 0, tl.where(part == splits, chunks, chunk))
    if indices is not None:
        before = entry - 1 - tl.arange(0, CHUNK)  # a chunk has no more entries
        page = tl.load(indices + before, mask=before >= 0, other=-1)
        entry = entry - tl.sum((page >= chunk * CHUNK).to(tl.int32), 0)
    return chunk, entry


@triton.jit
def words_of(basis, d, WORDS: tl.constexpr):
    """Four numbers each, int16: pointers [N] to bytes or, where a direction has an even number of them, to such words."""
    if basis.dtype.element_ty == tl.int16:
        return tl.load(basis[:, None] + d[None, :], mask=(d < WORDS)[None, :], other=0)
    else:
        at = basis[:, None] + 2 * d[None, :]
        low = tl.load(at, mask=(2 * d < WORDS)[None, :], other=0).to(tl.int16)
        return low | (tl.load(at + 1, mask=(2 * d + 1 < WORDS)[None, :], other=0).to(tl.int16) << 8)


@triton.jit
def number_of(four_bits, dtype: tl.constexpr):
    """int16 from 0 to 15, less 8. In half precision as the lowest bits of a number whose last digit they are, 128 or 1024."""
    if dtype == tl.bfloat16:
        return (four_bits | 0x4300).to(tl.bfloat16, bitcast=True) - tl.full([], 136.0, tl.bfloat16)
    elif dtype == tl.float16:
        return (four_bits | 0x6400).to(tl.float16, bitcast=True) - tl.full([], 1032.0, tl.float16)
    else:
        return four_bits.to(dtype) - 8


@triton.jit
def quarters_of(q, q_sd, ok, d, D: tl.constexpr):
    """The numbers of queries [M] that meet the four of a word: [M, words] each, zeros behind the head dim."""
    even, odd = ok[:, None] & (2 * d < D // 2)[None, :], ok[:, None] & (2 * d + 1 < D // 2)[None, :]
    at = q[:, None] + 2 * d[None, :] * q_sd
    low, high = tl.load(at, mask=even, other=0.0), tl.load(at + D // 2 * q_sd, mask=even, other=0.0)
    at += q_sd
    return low, high, tl.load(at, mask=odd, other=0.0), tl.load(at + D // 2 * q_sd, mask=odd, other=0.0)


@triton.jit
def even_odd(x):
    """[T, R, Q] -> those of even and of odd r."""
    paired = tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2, x.shape[2]])
    return tl.split(tl.permute(paired, (0, 1, 3, 2)))


@triton.jit
def pieces(x):
    """[T, 8, Q] -> eight [T, 1, Q]."""
    even, odd = even_odd(x)
    r04, r26 = even_odd(even)
    r15, r37 = even_odd(odd)
    r0, r4 = even_odd(r04)
    r1, r5 = even_odd(r15)
    r2, r6 = even_odd(r26)
    r3, r7 = even_odd(r37)
    return r0, r1, r2, r3, r4, r5, r6, r7


@triton.jit
def masses(along, coords):
    """log2-sum-exp2 over real keys i of sum_r coords[r, i] * along[r]: along [T, 8, Q], pointers [T] -> [T, Q]."""
    i = tl.arange(0, 16)
    at = coords[:, None, None] + i[None, :, None]
    first = tl.load(at)
    of_rank = pieces(along)
    logits = first.to(tl.float32) * of_rank[0]
    for r in tl.static_range(1, 8):
        logits += tl.load(at + r * 16).to(tl.float32) * of_rank[r]
    logits = tl.where(first == -128, float("-inf"), logits)
    best = tl.max(logits, 1)
    safe = tl.where(best == float("-inf"), 0.0, best)
    return safe + tl.log2(tl.sum(tl.exp2(logits - safe[:, None, :]), 1))


@triton.jit
def copy_logits(logits, refined, first, last, ok, pages, STEP: tl.constexpr):
    """Of the pages from `first` to `last`; logits, refined: pointers [Q] to query rows."""
    for at in tl.range(first, last, STEP):
        page = at + tl.arange(0, STEP)
        there = ok[:, None] & (page < last)[None, :]
        to = tl.load(logits[:, None] + page[None, :], mask=there, other=float("-inf"))
        tl.store(refined[:, None] + page[None, :], to, mask=there)


@triton.jit
def sum_chunks(refined, parts, first, last, ok, CHUNK: tl.constexpr, STEP: tl.constexpr):
    """Log-sum-exps of the chunks from page `first`, a chunk's first, to `last`; refined, parts: pointers [Q] to query rows."""
    for at in tl.range(first, last, STEP):
        page = at + tl.arange(0, STEP)
        logit = tl.load(refined[:, None] + page[None, :], mask=ok[:, None] & (page < last)[None, :], other=float("-inf"))
        logit = tl.reshape(logit, [refined.shape[0], STEP // CHUNK, CHUNK])
        best = tl.max(logit, 2)
        safe = tl.where(best == float("-inf"), 0.0, best)
        total = tl.sum(tl.exp(logit - safe[:, :, None]), 2)
        part = tl.where(total > 0, safe + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
        chunk = at // CHUNK + tl.arange(0, STEP // CHUNK)
        tl.store(parts[:, None] + chunk[None, :], part, mask=ok[:, None] & (chunk * CHUNK < last)[None, :])


@triton.jit
def page_of(at, last, indices, whole):
    """(page of the entries `at`, is it there): page 0 where it is not."""
    there, page = at < last, at
    if indices is not None:
        page = tl.load(indices + at, mask=there, other=0)
    there = there & (page < whole)
    return tl.where(there, page, 0), there


@triton.jit(do_not_specialize=LENGTHS)
def refine_scores_kernel(
    q, logits, counts, basis, coords, scales, refined, parts, indices, list_counts, blocks, start, lengths,
    q_sb, q_sh, q_sl, q_sd, counts_sb, basis_sb, basis_sh, coords_sb, coords_sh, scales_sb, scales_sh, blocks_sb,
    block_pages, per_row, kv_heads, group, rows, tiles_m, capacity, pages, chunks, most, splits, scale,
    D: tl.constexpr, WORDS: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_M: tl.constexpr, Q: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, splits): a share of one KV head's list, for Q of its group * rows query rows.

    Args:
        logits, refined: float32 [B, H, rows, pages], by the mean keys, and what takes their place. parts: [B, H, rows, chunks].
        basis: uint8 [N, Hk, pages, RANK, D / 2] or, where that is even, the same as int16: WORDS numbers of a direction.
        coords, scales: int8 [N, Hk, pages, RANK, 16], bfloat16 [N, Hk, pages, RANK].
        indices, list_counts: int32 [B, Hk, most] ascending, [B, Hk]: pages that are ranked anew; None: all.
        blocks, start, lengths: KvView, each may be None.
    """
    tile_m, list_index, part = tl.program_id(0) % tiles_m, (tl.program_id(0) // tiles_m).to(tl.int64), tl.program_id(1)
    b, kv_head = list_index // kv_heads, list_index % kv_heads
    end = capacity
    if lengths is not None:
        begin = 0
        if start is not None:
            begin = tl.maximum(tl.load(start + b), 0)
        end = tl.minimum(begin + tl.load(lengths + b), end)
    whole, count = end // PAGE, 0
    if indices is not None:
        indices += list_index * most
        count = tl.load(list_counts + list_index)
    first_chunk, first = first_of_part(part, splits, indices, count, tl.cdiv(whole, CHUNK), CHUNK)
    last_chunk, last = first_of_part(part + 1, splits, indices, count, tl.cdiv(whole, CHUNK), CHUNK)
    if first_chunk >= last_chunk:
        return
    first_page, last_page = first_chunk * CHUNK, tl.minimum(last_chunk * CHUNK, whole)
    if indices is None:
        first, last = first_page, last_page
    own = tile_m * BLOCK_M + tl.arange(0, Q)
    own_ok = own < group * rows
    own = list_index * (group * rows) + own  # query rows among [B, H, rows]
    copy_logits(logits + own * pages, refined + own * pages, first_page, last_page, own_ok, pages, STEP)
    tl.debug_barrier()

    m, d = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_W)
    h, r = kv_head * group + tl.minimum(m // rows, group - 1), m % rows
    ok = (m < group * rows) & (tl.arange(0, BLOCK_M) < Q)
    q0, q1, q2, q3 = quarters_of(q + b * q_sb + h * q_sh + r * q_sl, q_sd, ok, d, D)
    of_direction, direction = tl.arange(0, TILE * RANK), tl.arange(0, RANK)
    for at in tl.range(first, last, TILE, num_stages=STAGES):
        page, there = page_of(at + of_direction // RANK, last, indices, whole)
        owner, place = place_of_page(page, there, blocks, blocks_sb, block_pages, per_row, b)
        entry = basis + owner.to(tl.int64) * basis_sb + kv_head * basis_sh + place.to(tl.int64) * (RANK * WORDS)
        words = words_of(entry + of_direction % RANK * WORDS, d, WORDS)
        along = tl.dot(number_of(words & 15, q0.dtype), tl.trans(q0), input_precision=PRECISION)
        along = tl.dot(number_of((words >> 4) & 15, q0.dtype), tl.trans(q1), along, input_precision=PRECISION)
        along = tl.dot(number_of((words >> 8) & 15, q0.dtype), tl.trans(q2), along, input_precision=PRECISION)
        along = tl.dot(number_of((words >> 12) & 15, q0.dtype), tl.trans(q3), along, input_precision=PRECISION)
        along = tl.sum(tl.reshape(along, [TILE * RANK, BLOCK_M // Q, Q]), 1)  # all but the first Q are zeros

        page, there = page_of(at + tl.arange(0, TILE), last, indices, whole)
        owner, place = place_of_page(page, there, blocks, blocks_sb, block_pages, per_row, b)
        owner, place = owner.to(tl.int64), place.to(tl.int64)
        scale_at = scales + owner * scales_sb + kv_head * scales_sh + place * RANK
        factor = tl.load(scale_at[:, None] + direction[None, :]).to(tl.float32) * (scale * LOG2_E)
        along = tl.reshape(along, [TILE, RANK, Q]) * factor[:, :, None]
        mass = masses(along, coords + owner * coords_sb + kv_head * coords_sh + place * (RANK * 16))
        n = tl.maximum(tl.load(counts + owner * counts_sb + place), 1).to(tl.float32)
        to = own[None, :] * pages + page[:, None]
        shown = there[:, None] & own_ok[None, :]
        old = tl.load(logits + to, mask=shown, other=float("-inf"))
        new = old + (mass - tl.log2(n)[:, None]) * LN_2
        finite = (new > float("-inf")) & (new < float("inf")) & (old > float("-inf"))
        tl.store(refined + to, tl.where(finite, new, float("-inf")), mask=shown)
    tl.debug_barrier()
    sum_chunks(refined + own * pages, parts + own * chunks, first_page, last_page, own_ok, CHUNK, STEP)
