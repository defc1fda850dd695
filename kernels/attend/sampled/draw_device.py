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
def exponent_of(logits):
    """A whole number [M] not below the largest logit of a tile [M, TILE]; 0 if there is none."""
    top = tl.ceil(tl.max(logits, 1))
    return tl.where(top > float("-inf"), top, 0.0)


@triton.jit
def tile_masses(logits, exponent):
    """int32 [M, TILE], 0 to 2**24: round(2**24 exp2(logits - exponent))."""
    return (tl.exp2(logits - exponent[:, None]) * MASS_ONE + 0.5).to(tl.int32)


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
    """floor((offset + samples * prefix) / total), all below 2**43: by float32, off by at most one, then put right."""
    a = offset + samples.to(tl.int64) * prefix.to(tl.int64)
    quotient = (a.to(tl.float32) / total.to(tl.float32)).to(tl.int32)
    rest = a - quotient.to(tl.int64) * total
    return quotient + (rest >= total).to(tl.int32) - (rest < 0).to(tl.int32)


@triton.jit
def systematic(mass, total, samples, offset):
    """How often each key is drawn: int32 [M, TILE].

    Args:
        mass: int32 [M, TILE]; total: int32 [M], its sums.
        samples: int32 [M]; offset: int64 [M], in [0, total).
    """
    ends, divisor = tl.cumsum(mass, 1), tl.maximum(total, 1).to(tl.int64)[:, None]
    times = passed(ends, divisor, samples[:, None], offset[:, None]) - passed(
        ends - mass, divisor, samples[:, None], offset[:, None]
    )
    return tl.where((total > 0)[:, None], times, 0)
