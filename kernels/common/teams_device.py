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
