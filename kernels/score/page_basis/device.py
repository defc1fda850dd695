"""Logits of listed pages by their bases. Triton.

A chunk of pages is one program's: it finds the part of the list that lies there, and its products run on that part alone.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE, part_of_list, place_of_page

LENGTHS = (
    "group", "rows", "kv_heads", "tiles_m", "capacity", "pages", "chunks", "most", "block_pages", "per_row", "blocks_sb",
    "counts_sb",
)  # fmt: skip


@triton.jit
def masses(
    q_low, q_high, basis, coords, scales, ok, scale,
    HALF_D: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp over the keys of scale * q . (key - mean), of TILE pages and BLOCK_M queries: [TILE, BLOCK_M].

    Args:
        q_low, q_high: [BLOCK_M, HALF], the halves of the queries. basis, coords, scales: pointers [TILE] to the pages' entries.
    """
    d, i = tl.arange(0, HALF), tl.arange(0, 16)
    logits = tl.zeros([TILE, 16, BLOCK_M], tl.float32)
    here = ok[:, None] & (d < HALF_D)[None, :]
    for r in tl.range(0, RANK):
        packed = tl.load(basis[:, None] + r * HALF_D + d[None, :], mask=here, other=136).to(tl.int32)  # 8 + 16 * 8: two zeros
        along = tl.dot(((packed & 15) - 8).to(tl.float32).to(q_low.dtype), tl.trans(q_low), input_precision=PRECISION)
        along += tl.dot(((packed >> 4) - 8).to(tl.float32).to(q_low.dtype), tl.trans(q_high), input_precision=PRECISION)
        along *= (scale * tl.load(scales + r, mask=ok, other=0.0).to(tl.float32))[:, None]
        c = tl.load(coords[:, None] + r * 16 + i[None, :], mask=ok[:, None], other=0)
        logits += c.to(tl.float32)[:, :, None] * along[:, None, :]
    c = tl.load(coords[:, None] + i[None, :], mask=ok[:, None], other=0)
    logits = tl.where((c == -128)[:, :, None], float("-inf"), logits)
    best = tl.max(logits, 1)
    safe = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.exp(logits - safe[:, None, :]), 1)
    return safe + tl.log(total)


@triton.jit(do_not_specialize=LENGTHS)
def refine_scores_kernel(
    q, logits, counts, basis, coords, scales, refined, parts, indices, list_counts, blocks, start, lengths,
    q_sb, q_sh, q_sl, q_sd, counts_sb, basis_sb, basis_sh, coords_sb, coords_sh, scales_sb, scales_sh, blocks_sb,
    block_pages, per_row, kv_heads, group, rows, tiles_m, capacity, pages, chunks, most, scale,
    D: tl.constexpr, HALF: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk * tiles_m, chunks): CHUNK pages of one KV head, for BLOCK_M of its group * rows query rows.

    Args:
        logits, refined: float32 [B, H, rows, pages], by the mean keys, and what takes their place. parts: [B, H, rows, chunks].
        basis, coords, scales: uint8 [N, Hk, pages, RANK, D / 2], int8 [N, Hk, pages, RANK, 16], bfloat16 [N, Hk, pages, RANK].
        indices, list_counts: int32 [B, Hk, most] ascending, [B, Hk]: pages that are ranked anew; None: all.
        blocks, start, lengths: KvView, each may be None.
    """
    tile_m, list_index, chunk = tl.program_id(0) % tiles_m, (tl.program_id(0) // tiles_m).to(tl.int64), tl.program_id(1)
    b, kv_head = list_index // kv_heads, list_index % kv_heads
    end = capacity
    if lengths is not None:
        begin = 0
        if start is not None:
            begin = tl.maximum(tl.load(start + b), 0)
        end = tl.minimum(begin + tl.load(lengths + b), end)
    whole = end // PAGE
    if chunk * CHUNK >= whole:
        return
    half: tl.constexpr = D // 2
    m, d = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, HALF)
    query_ok = m < group * rows
    h, r = kv_head * group + tl.minimum(m // rows, group - 1), m % rows
    q_at = q + b * q_sb + (h * q_sh + r * q_sl)[:, None] + d[None, :] * q_sd
    inside = query_ok[:, None] & (d < half)[None, :]
    q_low, q_high = tl.load(q_at, mask=inside, other=0.0), tl.load(q_at + half * q_sd, mask=inside, other=0.0)
    number = list_index * (group * rows) + m  # of the query row among [B, H, rows]

    page = chunk * CHUNK + tl.arange(0, CHUNK)
    own_ok = query_ok[:, None] & (page < whole)[None, :]
    own = number[:, None] * pages + page[None, :]
    tl.store(refined + own, tl.load(logits + own, mask=own_ok, other=float("-inf")), mask=own_ok)
    tl.debug_barrier()
    first, last = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, whole)
    if indices is not None:
        indices += list_index * most
        first, last = part_of_list(indices, tl.load(list_counts + list_index), chunk * CHUNK, CHUNK)
    for at in tl.range(first, last, TILE):
        listed = at + tl.arange(0, TILE)
        there = listed < last
        if indices is not None:
            listed = tl.load(indices + listed, mask=there, other=0)
            there = there & (listed < whole)
        owner, place = place_of_page(listed, there, blocks, blocks_sb, block_pages, per_row, b)
        owner, place = owner.to(tl.int64), place.to(tl.int64)
        n = tl.load(counts + owner * counts_sb + place, mask=there, other=1)
        mass = masses(
            q_low, q_high, basis + owner * basis_sb + kv_head * basis_sh + place * (RANK * half),
            coords + owner * coords_sb + kv_head * coords_sh + place * (RANK * 16),
            scales + owner * scales_sb + kv_head * scales_sh + place * RANK, there, scale,
            half, HALF, RANK, TILE, BLOCK_M, PRECISION,
        )  # fmt: skip
        to = number[None, :] * pages + listed[:, None]
        ok = there[:, None] & query_ok[None, :]
        old = tl.load(logits + to, mask=ok, other=float("-inf"))
        new = old - tl.log(tl.maximum(n, 1).to(tl.float32))[:, None] + mass
        finite = (new > float("-inf")) & (new < float("inf")) & (old > float("-inf"))
        tl.store(refined + to, tl.where(finite, new, float("-inf")), mask=ok)
    tl.debug_barrier()
    logit = tl.load(refined + own, mask=own_ok, other=float("-inf"))
    best = tl.max(logit, 1)
    safe = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.exp(logit - safe[:, None]), 1)
    part = tl.where(total > 0, safe + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(parts + number * chunks + chunk, part, mask=query_ok)
