"""How many tokens a row keeps, on the GPU and without sorting: pooling, masses, and the exact coverage count. Triton.

Masses are fixed point (2**-52, int64), so sums are exact in any order and atomics change nothing. The first kernel adds them up
in bins that keep their order; the second gathers those of the one bin in which the threshold is reached and, in the program
that comes last, finds among them the mass at which it is reached: few by comparing all, many by bisection.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.grid_device import tile_and_row
from tsa_compile.kernels.common.ranks_device import row_extent

MASS_BINS = tl.constexpr(2048)  # 32 an octave
MASS_ROW = tl.constexpr(2052)  # a row of bins, then: tokens below the bin << 32 plus masses gathered; programs that are through
CANDIDATES = tl.constexpr(1024)  # at a time
FEW = tl.constexpr(128)  # candidates that are compared with each other,
AT_ONCE = tl.constexpr(16)  # with so many at a time, which is faster than with all (docs/measured/notebook.md)
TAPS = tl.constexpr(8)  # loads of the pooling in flight
MOST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
LENGTHS = ("heads", "q_len", "k_len", "last_queries", "pool", "min_tokens", "coverage_bits")


@triton.jit
def mass_bin(mass):
    """The bin of a mass >= 0; a larger mass has no lower bin."""
    bits = mass.to(tl.float32).to(tl.int32, bitcast=True)
    return tl.maximum((bits >> 18) - (127 << 5), 0)


@triton.jit
def bin_start(bin):
    """A mass that no mass of this bin or a higher one is below."""
    bits = (bin + (127 << 5)) << 18
    start = bits.to(tl.float32, bitcast=True).to(tl.float64) * (1 - 2.0**-22)  # a mass is binned after rounding
    return tl.where(bin > 0, start, 0.0).to(tl.int64)


@triton.jit(do_not_specialize=LENGTHS)
def pool_kernel(
    mean, scores, masses, mass_bins, ranks, heads, q_len, k_len, last_queries, pool,
    HEADS: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Pools mean [B, H, Lk] into scores [B, H, Lk]; adds the heads' masses, and bins them. HEADS heads at a time."""
    tile, b = tile_and_row(tl.cdiv(k_len, BLOCK))
    b = b.to(tl.int64)
    length, rows = row_extent(ranks, b, q_len, k_len, last_queries, PADDED)
    n = tl.where(rows > 0, length - last_queries, 0)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    if tile * BLOCK >= n:
        return
    mass = tl.zeros([BLOCK], tl.int64)
    for first in tl.range(0, heads, HEADS):
        h = first + tl.arange(0, HEADS)
        row = ((b * heads + h) * k_len)[:, None]
        ok = (h < heads)[:, None] & (i < n)[None, :]
        total = tl.zeros([HEADS, BLOCK], tl.float32)
        for first_tap in tl.range(0, pool, TAPS):
            for tap in tl.static_range(TAPS):
                j = i + first_tap + tap - pool // 2
                inside = (j >= 0) & (j < tl.where(first_tap + tap < pool, n, 0))
                total += tl.load(mean + row + j[None, :], mask=ok & inside[None, :], other=0.0)
        score = tl.div_rn(total, tl.full([HEADS, BLOCK], 1.0, tl.float32) * pool)
        score = tl.where((score >= 0.0) & (score <= 2.0), score, 0.0)  # not finite: counts for nothing
        tl.store(scores + row + i[None, :], score, mask=ok)
        mass += tl.sum((score.to(tl.float64) * 4503599627370496.0).to(tl.int64), 0)
    tl.store(masses + b * k_len + i, mass, mask=i < n)
    tl.atomic_add(mass_bins + b * MASS_ROW + mass_bin(mass), mass, mask=(i < n) & (mass > 0), sem="relaxed")


@triton.jit
def crossing(bins, coverage_bits):
    """(bin in which the running mass reaches the threshold, mass before it, threshold)."""
    b = tl.arange(0, MASS_BINS)
    mass = tl.load(bins + b)
    coverage = coverage_bits.to(tl.int64).to(tl.float64, bitcast=True)
    threshold = tl.ceil(tl.sum(mass).to(tl.float64) * coverage).to(tl.int64)
    at = tl.sum((tl.cumsum(mass, 0) < threshold).to(tl.int32))
    return at, tl.sum(tl.where(b < at, mass, 0)), threshold


@triton.jit
def gather(masses, n, at, candidates, tallies, tile, tiles, BLOCK: tl.constexpr):
    """Appends the masses of bin `at` in tile `tile` of a row's `tiles` to the candidates, in any order, and counts those of lower
    bins.

    Returns whether this program is the last, and then: how many candidates there are, how many masses are in lower bins.
    """
    i = tile * BLOCK + tl.arange(0, BLOCK)
    mass = tl.load(masses + i, mask=i < n, other=0)
    bin = mass_bin(mass)
    inside = ((bin == at) & (i < n)).to(tl.int32)
    tally = tl.sum(((bin < at) & (i < n)).to(tl.int64) * 4294967296 + inside)
    first = tl.zeros([], tl.int64)
    if tiles > 1:
        first = tl.atomic_add(tallies, tally, sem="relaxed") & 0xFFFFFFFF
    tl.store(candidates + first + tl.cumsum(inside, 0) - 1, mass, mask=inside > 0)
    tl.debug_barrier()  # all of this program's stores come before its sign that it is through
    last = tiles == 1
    if tiles > 1:
        last = tl.atomic_add(tallies + 1, 1, sem="acq_rel") + 1 == tiles
        tally = tl.atomic_add(tallies, 0)
    return last, tally & 0xFFFFFFFF, tally >> 32


@triton.jit
def split_at(candidates, found, middle, BLOCK: tl.constexpr):
    """(count and mass of the candidates up to `middle`, the greatest of them, the least of the others)."""
    count, total = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    greatest, least = tl.full([BLOCK], -1, tl.int64), tl.full([BLOCK], MOST, tl.int64)
    for start in tl.range(0, found, BLOCK):
        c = start + tl.arange(0, BLOCK)
        mass = tl.load(candidates + c, mask=c < found, other=MOST)
        low = mass <= middle
        count += low.to(tl.int64)
        total += tl.where(low, mass, 0)
        greatest = tl.maximum(greatest, tl.where(low, mass, -1))
        least = tl.minimum(least, tl.where(low, MOST, mass))
    return tl.sum(count), tl.sum(total), tl.max(greatest), tl.min(least)


@triton.jit
def candidates_below(candidates, found, low, high, threshold, BLOCK: tl.constexpr):
    """How many of the candidates, sorted, have a running mass below the threshold; all lie from `low` to `high`.

    Bisection, whose ends are actual masses after each step.
    """
    while low < high:
        middle = low + (high - low) // 2
        _, mass, greatest, least = split_at(candidates, found, middle, BLOCK)
        reached = (mass >= threshold) & (greatest >= 0)
        high = tl.where(reached, greatest, high)
        low = tl.where(reached, low, tl.minimum(least, high))
    before, mass, _, _ = split_at(candidates, found, low - 1, BLOCK)
    rest = threshold - mass
    return before + tl.where(rest > 0, (rest - 1) // tl.maximum(low, 1), 0)  # and some of those that equal `low`


@triton.jit
def few_below(candidates, found, threshold):
    """As `candidates_below`, of at most FEW: the running mass of each is that of all before it, equal ones by their place."""
    i = tl.arange(0, FEW)[:, None]
    mass = tl.load(candidates + i, mask=i < found, other=0)
    running = tl.zeros([FEW, AT_ONCE], tl.int64)
    for first in tl.range(0, found, AT_ONCE):
        j = first + tl.arange(0, AT_ONCE)[None, :]
        other = tl.load(candidates + j, mask=j < found, other=0)
        running += tl.where((other < mass) | ((other == mass) & (j <= i)), other, 0)
    return tl.sum(((tl.arange(0, FEW) < found) & (tl.sum(running, 1) < threshold)).to(tl.int64))


@triton.jit(do_not_specialize=LENGTHS)
def count_kernel(
    masses, candidates, mass_bins, counts, ranks, q_len, k_len, last_queries, min_tokens, coverage_bits,
    BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Kept tokens of one row, to counts [B]: docs/operators.md, `select_tokens`, steps 1, 4 and 5."""
    tiles = tl.cdiv(k_len, BLOCK)
    tile, b = tile_and_row(tiles)
    b = b.to(tl.int64)
    length, rows = row_extent(ranks, b, q_len, k_len, last_queries, PADDED)
    if (length <= min_tokens + last_queries) | (rows == 0):
        tl.store(counts + b, length)
        return
    n = length - last_queries
    masses += b * k_len
    candidates += b * k_len
    mass_bins += b * MASS_ROW
    tallies = mass_bins + MASS_BINS
    at, below_mass, threshold = crossing(mass_bins, coverage_bits)
    last, found, n_drop = gather(masses, n, at, candidates, tallies, tile, tiles, BLOCK)
    if not last:
        return
    rest = threshold - below_mass
    if found > FEW:
        n_drop += candidates_below(candidates, found, bin_start(at), 2 * bin_start(at + 1) + 2, rest, CANDIDATES)
    else:
        n_drop += few_below(candidates, found, rest)
    kept = tl.maximum(min_tokens, n - (n_drop + 1)) + last_queries
    tl.store(counts + b, tl.where(n_drop == 0, length, kept).to(tl.int32))
