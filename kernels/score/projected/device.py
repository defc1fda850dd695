"""Logits of pages by a learned projection of queries and keys. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE
from tsa_compile.kernels.common.rotation_device import partner_of, turned_back

LENGTHS = ("lists", "capacity", "pages", "chunks", "index_sb", "index_sh", "positions_sb", "mask_sb", "mask_sl")


@triton.jit
def projected_query(
    q, q_sd, query, frequencies, number, position, factor,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """float32 [BLOCK_R]: the row at `q`, its rotation undone, by the weights of list `number`."""
    d, r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R)
    other_d, pair, is_first, turned = partner_of(d, PAIRS, INTERLEAVED)
    own = tl.load(q + d * q_sd, mask=d < D, other=0.0).to(tl.float32)
    other = tl.load(q + other_d * q_sd, mask=d < D, other=0.0).to(tl.float32)
    frequency = tl.load(frequencies + pair, mask=turned, other=0.0)
    before = turned_back(own, other, position, frequency, is_first, turned, factor)
    at = query + (number.to(tl.int64) * R + r)[:, None] * D + d[None, :]
    weight = tl.load(at, mask=(r < R)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    return tl.sum(weight * before[None, :], 1)


@triton.jit(do_not_specialize=LENGTHS)
def projected_scores_kernel(
    q, index, positions, query, frequencies, logits, parts, start, lengths, key_mask, heads,
    q_sb, q_sh, q_sd, index_sb, index_sh, positions_sb, mask_sb, mask_sl, lists, capacity, pages, chunks, factor,
    D: tl.constexpr, R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Grid (B * lists, chunks): CHUNK pages of one list, AT_ONCE at a time.

    Args:
        q: [B, H, 1, D]; index: [B, lists, L, R]; positions: int32 [B, 1, L]; query: [lists, R, D], contiguous.
        frequencies: float32 [PAIRS]; heads: int32 [lists], the query head of each list.
        logits, parts: float32 [B, lists, 1, pages], [B, lists, 1, chunks]: written up to the row's last whole page.
        start, lengths, key_mask: each may be None.
    """
    b, number, chunk = (tl.program_id(0) // lists).to(tl.int64), tl.program_id(0) % lists, tl.program_id(1)
    begin, end = 0, capacity
    if start is not None:
        begin = tl.maximum(tl.load(start + b), 0)
    if lengths is not None:
        end = tl.minimum(begin + tl.load(lengths + b), end)
    whole = end // PAGE
    if chunk * CHUNK >= whole:
        return
    position = tl.load(positions + b * positions_sb + end - 1)
    q_at = q + b * q_sb + tl.load(heads + number).to(tl.int64) * q_sh
    projected = projected_query(
        q_at, q_sd, query, frequencies, number, position, factor, D, R, BLOCK_D, BLOCK_R, PAIRS, INTERLEAVED
    )
    r = tl.arange(0, BLOCK_R)
    index += b * index_sb + number.to(tl.int64) * index_sh
    out = logits + (b * lists + number) * pages
    best = tl.full([], float("-inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for page in tl.range(chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, whole), AT_ONCE):
        row = page * PAGE + tl.arange(0, AT_ONCE * PAGE)
        there = (row >= begin) & (row < whole * PAGE)
        if key_mask is not None:
            there = there & tl.load(key_mask + b * mask_sb + row.to(tl.int64) * mask_sl, mask=there, other=0).to(tl.int1)
        at = index + row.to(tl.int64)[:, None] * R + r[None, :]
        tile = tl.load(at, mask=there[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)
        logit = tl.sum(tile * projected[None, :], 1)
        finite = (logit > float("-inf")) & (logit < float("inf"))  # neither holds of NaN
        logit = tl.reshape(tl.where(there & finite, logit, float("-inf")), [AT_ONCE, PAGE])
        top = tl.max(logit, 1)
        safe = tl.where(top == float("-inf"), 0.0, top)
        mass = tl.sum(tl.exp(logit - safe[:, None]), 1)
        of_page = tl.where(mass > 0, safe + tl.log(tl.where(mass > 0, mass, 1.0)), float("-inf"))
        p = page + tl.arange(0, AT_ONCE)
        tl.store(out + p, of_page, mask=p < whole)
        highest = tl.maximum(best, tl.max(of_page, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        total = total * tl.exp(best - base) + tl.sum(tl.exp(of_page - base), 0)
        best = highest
    part = tl.where(total > 0, best + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
    tl.store(parts + (b * lists + number) * chunks + chunk, part)
