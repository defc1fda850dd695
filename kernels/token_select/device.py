"""Token selection on the GPU without sorting: exact coverage count, radix select, stable compaction. Triton.

Masses are fixed point (2**-52, int64), so sums are exact in any order and atomics change nothing. A mass is binned by the bits of
its float32 rounding, which keeps the order; what shares one float32 is resolved exactly at the end.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.token_scores.device import positions_of, row_extent

BINS = tl.constexpr(2048)
LENGTHS = ("heads", "q_len", "k_len", "window", "pool", "min_tokens", "heavy", "coverage_bits")


@triton.jit
def bin_of(mass, LEVEL: tl.constexpr):
    """The mass's bin at a level: bits 30-20, 19-9 or 8-0 of its float32 rounding."""
    bits = mass.to(tl.float32).to(tl.int32, bitcast=True)
    if LEVEL == 0:
        return bits >> 20
    if LEVEL == 1:
        return (bits >> 9) & 0x7FF
    return bits & 0x1FF


@triton.jit
def threshold_of(histogram, coverage_bits):
    """ceil(coverage * total mass) in units of mass; `histogram` is the first level's."""
    total = tl.sum(tl.load(histogram + BINS + tl.arange(0, BINS)))
    coverage = coverage_bits.to(tl.int64).to(tl.float64, bitcast=True)
    return tl.ceil(total.to(tl.float64) * coverage).to(tl.int64)


@triton.jit
def crossing(histogram, below_count, below_mass, threshold):
    """(bin in which the running mass reaches the threshold, tokens before that bin, their mass)."""
    b = tl.arange(0, BINS)
    count, mass = tl.load(histogram + b), tl.load(histogram + BINS + b)
    reached = tl.cumsum(mass, 0) + below_mass
    at = tl.minimum(tl.sum((reached < threshold).to(tl.int32)), BINS - 1)
    before = b < at
    return at, below_count + tl.sum(tl.where(before, count, 0)), below_mass + tl.sum(tl.where(before, mass, 0))


@triton.jit
def crossing_prefix(histograms, coverage_bits, LEVELS: tl.constexpr):
    """(leading bits of the float32 in which the threshold is reached, tokens before, their mass, threshold)."""
    threshold = threshold_of(histograms, coverage_bits)
    prefix = tl.zeros([], tl.int32)
    count, mass = tl.zeros([], tl.int64), tl.zeros([], tl.int64)
    for level in tl.static_range(LEVELS):
        at, count, mass = crossing(histograms + level * 2 * BINS, count, mass, threshold)
        prefix = (prefix << (9 if level == 2 else 11)) | at
    return prefix, count, mass, threshold


@triton.jit
def add_to_histogram(histogram, mass, ok, LEVEL: tl.constexpr):
    at = bin_of(mass, LEVEL)
    tl.atomic_add(histogram + LEVEL * 2 * BINS + at, tl.full(mass.shape, 1, tl.int64), mask=ok, sem="relaxed")
    tl.atomic_add(histogram + LEVEL * 2 * BINS + BINS + at, mass, mask=ok, sem="relaxed")


@triton.jit(do_not_specialize=LENGTHS)
def pool_kernel(
    mean, scores, masses, histograms, ranks, heads, q_len, k_len, window, pool,
    BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Pools mean [B, H, Lk] into scores [B, H, Lk]; adds the heads' masses, and bins them at the first level."""
    b = tl.program_id(1).to(tl.int64)
    length, rows = row_extent(ranks, b, q_len, k_len, window, PADDED)
    n = tl.where(rows > 0, length - window, 0)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mass = tl.zeros([BLOCK], tl.int64)
    for h in tl.range(0, heads):
        row = (b * heads + h) * k_len
        total = tl.zeros([BLOCK], tl.float32)
        for t in tl.range(0, pool):
            j = i + t - pool // 2
            total += tl.load(mean + row + j, mask=(j >= 0) & (j < n) & (i < n), other=0.0)
        score = total / pool
        score = tl.where((score >= 0.0) & (score <= 2.0), score, 0.0)  # not finite: counts for nothing
        tl.store(scores + row + i, score, mask=i < n)
        mass += (score.to(tl.float64) * 4503599627370496.0).to(tl.int64)
    tl.store(masses + b * k_len + i, mass, mask=i < n)
    add_to_histogram(histograms + b * 6 * BINS, mass, i < n, 0)


@triton.jit(do_not_specialize=LENGTHS)
def mass_level_kernel(
    masses, histograms, ranks, q_len, k_len, window, min_tokens, coverage_bits,
    LEVEL: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Bins, at `LEVEL`, the masses that share all earlier levels' bits with the crossing."""
    b = tl.program_id(1).to(tl.int64)
    length, rows = row_extent(ranks, b, q_len, k_len, window, PADDED)
    n = length - window
    if (tl.program_id(0) * BLOCK >= n) | (length <= min_tokens + window) | (rows == 0):
        return
    histograms += b * 6 * BINS
    prefix, _, _, _ = crossing_prefix(histograms, coverage_bits, LEVEL)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mass = tl.load(masses + b * k_len + i, mask=i < n, other=0)
    bits = mass.to(tl.float32).to(tl.int32, bitcast=True)
    same = (bits >> (20 if LEVEL == 1 else 9)) == prefix
    add_to_histogram(histograms, mass, (i < n) & same, LEVEL)


@triton.jit
def count_below(masses, n, bits_wanted, limit, BLOCK: tl.constexpr):
    """(count, mass) of the masses with these float32 bits that are at most `limit`."""
    count, total = tl.zeros([BLOCK], tl.int64), tl.zeros([BLOCK], tl.int64)
    for start in tl.range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        mass = tl.load(masses + i, mask=i < n, other=-1)
        bits = mass.to(tl.float32).to(tl.int32, bitcast=True)
        inside = (bits == bits_wanted) & (i < n) & (mass <= limit)
        count += inside.to(tl.int64)
        total += tl.where(inside, mass, 0)
    return tl.sum(count), tl.sum(total)


@triton.jit(do_not_specialize=LENGTHS)
def count_kernel(
    masses, histograms, counts, ranks, q_len, k_len, window, min_tokens, coverage_bits,
    BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Kept tokens of one row, to counts [B]: docs/operators.md, `select_tokens`, steps 1, 4 and 5."""
    b = tl.program_id(0).to(tl.int64)
    length, rows = row_extent(ranks, b, q_len, k_len, window, PADDED)
    n = length - window
    if (length <= min_tokens + window) | (rows == 0):
        tl.store(counts + b, length)
        return
    bits, below, mass, threshold = crossing_prefix(histograms + b * 6 * BINS, coverage_bits, 3)
    masses += b * k_len
    # The least mass v of these float32 bits with (mass of all up to v) >= threshold, by bisection; at once if one value.
    low, high = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64), tl.full([], -1, tl.int64)
    for start in tl.range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        m = tl.load(masses + i, mask=i < n, other=-1)
        inside = (m.to(tl.float32).to(tl.int32, bitcast=True) == bits) & (i < n)
        low = tl.minimum(low, tl.min(tl.where(inside, m, 0x7FFFFFFFFFFFFFFF)))
        high = tl.maximum(high, tl.max(tl.where(inside, m, -1)))
    while low < high:
        middle = low + (high - low) // 2
        _, inside_mass = count_below(masses, n, bits, middle, BLOCK)
        reached = mass + inside_mass >= threshold
        high = tl.where(reached, middle, high)
        low = tl.where(reached, low, middle + 1)
    before, before_mass = count_below(masses, n, bits, low - 1, BLOCK)
    rest = threshold - mass - before_mass
    equal = tl.where(rest > 0, (rest - 1) // tl.maximum(low, 1), 0)  # further tokens of mass `low` that stay below
    n_drop = below + before + equal
    kept = tl.maximum(min_tokens, n - (n_drop + 1)) + window
    tl.store(counts + b, tl.where(n_drop == 0, length, kept).to(tl.int32))


@triton.jit
def count_digits(scores, n, prefix, shift, BLOCK: tl.constexpr):
    """Of the scores whose bits above `shift + 4` are `prefix`: how many have each next digit of four bits, int32 [16].

    Each lane counts for itself, in fields of 16 bits: no atomics, which the few exponents of attention scores would serialise.
    """
    column = tl.arange(0, 4)
    fields = tl.zeros([BLOCK, 4], tl.int64)  # digits 4c..4c+3 in column c
    for start in tl.range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        bits = tl.load(scores + i, mask=i < n, other=0.0).to(tl.int32, bitcast=True)
        upper = bits >> shift
        inside = (i < n) & ((upper >> 4) == prefix)
        one = inside.to(tl.int64) << ((upper & 3) * 16).to(tl.int64)
        fields += tl.where(((upper >> 2) & 3)[:, None] == column[None, :], one[:, None], 0)
    pair = 0x0000FFFF0000FFFF
    even, odd = tl.sum(fields & pair, 0), tl.sum((fields >> 16) & pair, 0)
    low, high = tl.join(even & 0xFFFFFFFF, odd & 0xFFFFFFFF), tl.join(even >> 32, odd >> 32)  # digits (0, 1) and (2, 3)
    return tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), [16]).to(tl.int32)


@triton.jit
def kth_largest(scores, n, k, BLOCK: tl.constexpr):
    """(bits of the k-th largest of n scores >= 0, how many equal to it are among the k largest): a radix search."""
    threshold, need = tl.zeros([], tl.int32), k
    for level in tl.range(0, 8):
        count = count_digits(scores, n, threshold, 28 - 4 * level, BLOCK)
        from_here = tl.sum(count) - tl.cumsum(count, 0) + count  # how many with this digit or a higher one
        at = tl.sum((from_here >= need).to(tl.int32)) - 1
        need -= tl.sum(tl.where(tl.arange(0, 16) == at, from_here - count, 0))
        threshold = (threshold << 4) | at
    return threshold, need


@triton.jit
def compact(scores, n, threshold, need, order, b, k_len, out, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Positions of the scores above the threshold, and of the first `need` equal to it, ascending, to `out`."""
    kept, equal_seen = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start in tl.range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        bits = tl.load(scores + i, mask=i < n, other=0.0).to(tl.int32, bitcast=True)
        equal = ((bits == threshold) & (i < n)).to(tl.int32)
        take = ((bits > threshold) & (i < n)) | ((equal > 0) & (equal_seen + tl.cumsum(equal, 0) <= need))
        number = take.to(tl.int32)
        place = kept + tl.cumsum(number, 0) - 1
        tl.store(out + place, positions_of(order, b, i, i < n, k_len, PADDED).to(tl.int32), mask=take)
        kept += tl.sum(number)
        equal_seen += tl.sum(equal)


@triton.jit
def fill_tail(out, first, size, BLOCK: tl.constexpr):
    for start in tl.range(first, size, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(out + i, -1, mask=i < size)


@triton.jit
def write_largest(scores, n, k, order, b, k_len, out, BLOCK: tl.constexpr, PADDED: tl.constexpr):
    """Positions of the k largest of n scores, ascending."""
    if k > 0:
        threshold, need = kth_largest(scores, n, k, BLOCK)
        compact(scores, n, threshold, need, order, b, k_len, out, BLOCK, PADDED)


@triton.jit(do_not_specialize=LENGTHS)
def select_kernel(
    scores, counts, indices, heavy_indices, order, ranks, heads, q_len, k_len, window, min_tokens, heavy,
    BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """One head's kept positions to indices [B, H, Lk], ascending, then -1; by a second program, its heaviest to
    heavy_indices [B, H, heavy]."""
    head_index = tl.program_id(0).to(tl.int64)
    b = head_index // heads
    length, _ = row_extent(ranks, b, q_len, k_len, window, PADDED)
    count, n = tl.load(counts + b), length - window
    scores += head_index * k_len
    indices += head_index * k_len
    everything = count == length
    if tl.program_id(1) == 1:
        n_heavy = tl.where(everything, 0, tl.minimum(heavy, n))
        heavy_indices += head_index * heavy
        write_largest(scores, n, n_heavy, order, b, k_len, heavy_indices, BLOCK, PADDED)
        fill_tail(heavy_indices, n_heavy, heavy, BLOCK)
        return
    first = tl.where(everything, 0, n)  # ranks from here on follow, whatever their score
    write_largest(scores, n, tl.where(everything, 0, count - window), order, b, k_len, indices, BLOCK, PADDED)
    for start in tl.range(first, length, BLOCK):
        r = start + tl.arange(0, BLOCK)
        at = positions_of(order, b, r, r < length, k_len, PADDED)
        tl.store(indices + r - length + count, at.to(tl.int32), mask=r < length)
    fill_tail(indices, count, k_len, BLOCK)
