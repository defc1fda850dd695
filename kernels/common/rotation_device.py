"""Rotary position embedding undone, as `rotation.py` has it. Triton.

A dim is read with the other one of its pair. Angles are rounded to float32, as models have them, and brought to an eighth of a
turn in float64: float32 sines of large numbers are not exact on every GPU, and those that are take much code.
"""

import triton
import triton.language as tl

QUARTER = tl.constexpr(1.5707963267948966)


@triton.jit
def partner_of(d, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Of dims `d`: the other dim of the pair (itself if not rotated), the pair's number; is it the first of the two; rotated?"""
    if INTERLEAVED:
        other, pair, first = d ^ 1, d // 2, d % 2 == 0
    else:
        other, pair, first = tl.where(d < PAIRS, d + PAIRS, d - PAIRS), d % PAIRS, d < PAIRS
    turned = d < 2 * PAIRS
    return tl.where(turned, other, d), tl.where(turned, pair, 0), first, turned


@triton.jit
def cosine_and_sine(angle):
    """Of float32 angles, to 1e-7; polynomials of the Cephes library."""
    quarters = tl.floor(angle.to(tl.float64) * (1.0 / QUARTER) + 0.5)
    x = (angle.to(tl.float64) - quarters * QUARTER).to(tl.float32)
    z = x * x
    sine = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    cosine = ((2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2) * z * z - 0.5 * z + 1.0
    turn = quarters.to(tl.int32) & 3
    odd = (turn & 1) > 0
    c, s = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((turn == 1) | (turn == 2), -c, c), tl.where(turn >= 2, -s, s)


@triton.jit
def turned_back(own, other, position, frequency, first, turned, factor):
    """Entries as they were before the rotation: `own` and their pair's `other` ones, float32, at `position` (broadcast alike)."""
    cosine, sine = cosine_and_sine(position.to(tl.float32) * frequency)
    back = (own * cosine + tl.where(first, other, -other) * sine) / factor
    return tl.where(turned, back, own)
