"""Teams of a page in 64 bits, as teams.py has them. Triton."""

import triton
import triton.language as tl

SLOTS = tl.constexpr(4)  # teams of a page
REPRESENTATIVES = tl.constexpr(32)
NUMBER = tl.constexpr(48)


@triton.jit
def team_of_row(code, row):
    """The team of row `row` of the page whose bits are `code`, int32."""
    return ((code >> (2 * row).to(tl.int64)) & 3).to(tl.int32)


@triton.jit
def representative(code, slot):
    """The row that represents team `slot`, int32."""
    return ((code >> ((4 * slot).to(tl.int64) + REPRESENTATIVES)) & 15).to(tl.int32)


@triton.jit
def number_of_teams(code):
    return ((code >> NUMBER) & 7).to(tl.int32)


@triton.jit
def rows_of_team(code, slot, first, end):
    """How many of the rows from `first` to `end`, the last one excluded, are of team `slot`: int32."""
    other = (code & 0xFFFFFFFF) ^ (slot.to(tl.int64) * 0x55555555)
    low = tl.minimum(tl.maximum(first, 0), 16)
    high = tl.maximum(tl.minimum(end, 16), low)
    one = code * 0 + 1
    same = ~(other | (other >> 1)) & 0x55555555  # a bit for each row, of two
    same &= (one << (2 * high).to(tl.int64)) - (one << (2 * low).to(tl.int64))
    same = (same & 0x33333333) + ((same >> 2) & 0x33333333)
    same = (same + (same >> 4)) & 0x0F0F0F0F
    return (((same * 0x01010101) >> 24) & 0xFF).to(tl.int32)
