"""Systematic sampling of keys in whole numbers, as draw.py has it. Triton."""

import triton
import triton.language as tl

from tsa_compile.kernels.common.cache_device import LOG2_E, add_bias, capped

TILE = tl.constexpr(64)  # keys
MASS_ONE = tl.constexpr(16777216.0)  # 2**24, the mass of exp2(exponent)


@triton.jit
def visible_logits(logits, bias, at_query, bias_sl, query_ok, j, there, softcap, CAPPED: tl.constexpr):
    """Scaled scores [M, TILE] as logits in base 2, -inf where a key is hidden or a score not finite."""
    if CAPPED:
        logits = capped(logits, softcap)
    visible = there[None, :] & query_ok[:, None]
    if bias is not None:
        logits, shown = add_bias(logits, bias, bias_sl, at_query, query_ok, j, there, False)
        visible = visible & shown
    logits *= LOG2_E
    return tl.where(visible & (tl.abs(logits) < float("inf")), logits, float("-inf"))


@triton.jit
def exponents_of(logits):
    """Whole numbers [M, tiles] not below the largest logit of each tile of [M, tiles, TILE]; 0 if there is none."""
    top = tl.ceil(tl.max(logits, 2))
    return tl.where(top > float("-inf"), top, 0.0)


@triton.jit
def masses_of_keys(logits, exponent):
    """int32 [M, tiles, TILE], 0 to 2**24: round(2**24 exp2(logits - exponent))."""
    return (tl.exp2(logits - exponent[:, :, None]) * MASS_ONE + 0.5).to(tl.int32)


@triton.jit
def tile_mass(total, exponent, top, spare):
    """A tile's mass in the row's unit, int64: `total`, raised by `spare` bits in tiles of the row's largest exponent `top`."""
    lower = tl.minimum(tl.maximum(top - exponent, 0.0), 62.0).to(tl.int32) - spare
    wide = total.to(tl.int64)
    down, up = tl.maximum(lower, 0).to(tl.int64), tl.maximum(-lower, 0).to(tl.int64)
    half = tl.full([], 1, tl.int64) << tl.maximum(down - 1, 0)
    return tl.where(lower > 0, (wide + half) >> down, wide << up)


@triton.jit
def position_word(seed, tile, head, row, position):
    """The first word of Philox-4x32-10 at (tile, head, row of the batch, position), as int64; seed: a pointer."""
    zero = head * 0
    words = tl.philox(tl.load(seed), (zero + tile).to(tl.uint32), head.to(tl.uint32), (zero + row).to(tl.uint32),
                      (zero + position).to(tl.uint32), 10)  # fmt: skip
    return words[0].to(tl.int64)


@triton.jit
def offset_of(word, total):
    """floor(word * total / 2**32)."""
    return (word * (total >> 20) + (word * (total & 0xFFFFF) >> 20)) >> 12


@triton.jit
def passed(prefix, total, samples, offset):
    """floor((offset + samples * prefix) / total), int32: by float32, off by at most one, then put right.

    prefix, total, offset: int64, below 2**50; samples: up to 4,096; the answer is at most `samples`.
    """
    a = offset + samples * prefix
    quotient = (a.to(tl.float32) / total.to(tl.float32)).to(tl.int32)
    rest = a - quotient.to(tl.int64) * total
    return quotient + (rest >= total).to(tl.int32) - (rest < 0).to(tl.int32)


@triton.jit
def whole_of_row(totals, exponents, low, high, spare, BLOCK_T: tl.constexpr):
    """Of the tiles from `low` to `high`: the largest exponent of one with keys, 0 without; the sum of their masses, int64."""
    t = tl.arange(0, BLOCK_T)
    top = tl.full([BLOCK_T], float("-inf"), tl.float32)
    for at in tl.range(low, high, BLOCK_T):
        total = tl.load(totals + at + t, mask=at + t < high, other=0)
        exponent = tl.load(exponents + at + t, mask=at + t < high, other=0.0)
        top = tl.maximum(top, tl.where(total > 0, exponent, float("-inf")))
    highest = tl.max(top, 0)
    highest = tl.where(highest > float("-inf"), highest, 0.0)
    whole = tl.zeros([BLOCK_T], tl.int64)
    for at in tl.range(low, high, BLOCK_T):
        total = tl.load(totals + at + t, mask=at + t < high, other=0)
        exponent = tl.load(exponents + at + t, mask=at + t < high, other=0.0)
        whole += tile_mass(total, exponent, highest, spare)
    return highest, tl.sum(whole, 0)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def smaller(a, b):
    return tl.minimum(a, b)


@triton.jit
def tile_of_sample(
    totals, exponents, low, high, spare, top, whole, samples, offset, first, BLOCK_T: tl.constexpr, CHUNK: tl.constexpr
):
    """Of the row's samples from `first` on: (tile, number within the tile's samples, how many these are), int32 [CHUNK].

    Tile t ends at sample `passed(X_t)`; so sample i lies in the tile behind those that end at or before i.
    """
    t, i = tl.arange(0, BLOCK_T), first + tl.arange(0, CHUNK)
    ending, behind = tl.zeros([CHUNK], tl.int32), tl.zeros([CHUNK], tl.int32)  # tiles that end at i, at i + 1
    seen, before = tl.zeros([], tl.int64), tl.zeros([], tl.int32)
    begin, after = tl.zeros([], tl.int32), tl.zeros([], tl.int32) + samples
    for at in tl.range(low, high, BLOCK_T):
        there = at + t < high
        total = tl.load(totals + at + t, mask=there, other=0)
        exponent = tl.load(exponents + at + t, mask=there, other=0.0)
        mass = tile_mass(total, exponent, top, spare)
        ends = passed(seen + tl.cumsum(mass, 0), whole, samples, offset)
        seen += tl.sum(mass, 0)
        early = there & (ends <= first)
        before += tl.sum(early.to(tl.int32), 0)
        begin = tl.maximum(begin, tl.max(tl.where(early, ends, 0), 0))
        ending += tl.histogram(tl.maximum(ends - first, 0), CHUNK, mask=there & (ends > first) & (ends < first + CHUNK))
        behind += tl.histogram(tl.maximum(ends - first - 1, 0), CHUNK, mask=there & (ends > first) & (ends <= first + CHUNK))
        after = tl.minimum(after, tl.min(tl.where(there & (ends > first + CHUNK), ends, samples), 0))
    tile = low + before + tl.cumsum(ending, 0)
    begins = tl.maximum(tl.associative_scan(tl.where(ending > 0, i, 0), 0, larger), begin)
    next_begins = tl.associative_scan(tl.where(behind > 0, i + 1, after), 0, smaller, reverse=True)
    return tl.minimum(tile, high - 1), i - begins, next_begins - begins


@triton.jit
def key_of_sample(masses, tile, rank, drawn, total, offset, live):
    """The key within its tile, int32 [N], that sample number `rank` of a tile's `drawn` samples is.

    Those before it have been passed by at most `rank` samples: `floor((offset + drawn * X) / total) <= rank`.
    """
    n = tl.arange(0, TILE)
    mass = tl.load(masses + (tile * TILE)[:, None] + n[None, :], mask=live[:, None], other=0)
    limit = (rank + 1).to(tl.int64) * total - offset
    return tl.sum((tl.cumsum(mass, 1).to(tl.int64) * drawn[:, None] < limit[:, None]).to(tl.int32), 1)
