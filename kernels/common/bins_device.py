"""Where a list of scores >= 0 is cut, without sorting: bins, then the scores of one bin. Triton.

As integers the float32 bits of such scores keep their order.
"""

import triton
import triton.language as tl

BINS = tl.constexpr(256)  # 8 an octave, from 2**-32 to 1
FIRST_OCTAVE = tl.constexpr(760)  # 8 * (127 - 32)
FEW = tl.constexpr(256)  # scores that are compared with each other
MORE = tl.constexpr(512)  # scores that the radix search takes at a time; a bin has seldom more


@triton.jit
def score_bin(bits):
    """The bin of a score >= 0, given as bits; a larger score has no lower bin."""
    return tl.minimum(tl.maximum((bits >> 20) - FIRST_OCTAVE, 0), BINS - 1)


@triton.jit
def load_bits(scores, i, ok):
    return tl.load(scores + i, mask=ok, other=0.0).to(tl.int32, bitcast=True)


@triton.jit
def from_top(count, n, k):
    """From the counts of the bins of n values: number of the bin with the k-th largest, how many of that bin are among the
    k largest, how many it has."""
    above = n - tl.cumsum(count, 0)  # how many in higher bins
    here = (above < k) & (above + count >= k)
    bin = tl.arange(0, BINS).to(tl.int64)
    found = tl.sum(tl.where(here, (bin << 48) + (above.to(tl.int64) << 24) + count, 0))  # of one bin; a row has fewer than 2**24
    return (found >> 48).to(tl.int32), k - ((found >> 24) & 0xFFFFFF).to(tl.int32), (found & 0xFFFFFF).to(tl.int32)


@triton.jit
def add_digits(count, values, end, prefix, shift, width):
    """Adds, of the values whose bits above `shift + width` are `prefix`, how many have each next digit of `width` bits."""
    for start in tl.range(0, end, MORE):
        i = start + tl.arange(0, MORE)
        upper = load_bits(values, i, i < end) >> shift
        digit = upper & ((1 << width) - 1)
        count += tl.histogram(digit, BINS, mask=(i < end) & ((upper >> width) == prefix))
    return count


@triton.jit
def kth_largest(values, n, k, cut, shift, complete):
    """(bits of the k-th largest of n values, how many equal to it are among the k largest): radix search, 8 bits at a time.

    `cut` are the bits from `shift` on, which all values share. `complete`: no other score has them; the search then ends at
    digits of which all values are among the k largest, with a cut just below those.
    """
    need, inside = k, n
    while (shift > 0) & ((need < inside) | (complete == 0)):
        width = tl.minimum(shift, 8)
        shift -= width
        count = add_digits(tl.zeros([BINS], tl.int32), values, n, cut, shift, width)
        digit, need, inside = from_top(count, inside, need)
        cut = (cut << width) | digit
    return tl.where(shift > 0, (cut << shift) - 1, cut), tl.where(shift > 0, 0, need)


@triton.jit
def kth_of_few(values, n, k):
    """(bits of the k-th largest of n values, at most FEW, how many equal to it are among the k largest)."""
    i, j = tl.arange(0, FEW)[:, None], tl.arange(0, FEW)[None, :]
    above = tl.sum((load_bits(values, j, j < n) > load_bits(values, i, i < n)).to(tl.int32), 1)
    i = tl.arange(0, FEW)
    chosen = (above < k) & (i < n)  # those with fewer than k above them; the least of them is the k-th
    least = tl.min(tl.where(chosen, (load_bits(values, i, i < n).to(tl.int64) << 32) + above, 0x7FFFFFFFFFFFFFFF))
    return (least >> 32).to(tl.int32), k - least.to(tl.int32)


@triton.jit
def kth_of_bin(gathered, found, at, k):
    """As `kth_largest`, of all scores of bin `at`."""
    if found <= FEW:
        cut, need = kth_of_few(gathered, found, k)
    else:
        inner = (at > 0) & (at < BINS - 1)  # the outermost bins hold more than their octave's eighth
        prefix, shift = tl.where(inner, at + FIRST_OCTAVE, 0), tl.where(inner, 20, 31)
        cut, need = kth_largest(gathered, found, k, prefix, shift, inner.to(tl.int32))
    return cut, need
