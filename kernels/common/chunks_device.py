"""A list that several programs cut, each a chunk of its scores: what they bin, gather and write. Triton.

The places that a chunk writes to follow from the bins of the chunks before it. Scores are >= 0, or below 0 where they are none.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.bins_device import BINS, from_top, kth_of_bin, load_bits, score_bin
from tsa_compile.kernels.common.ranks_device import positions_of

CHUNKS = tl.constexpr(16)  # whose bins are read at a time


@triton.jit
def bin_scores(scores, first, end, BLOCK: tl.constexpr):
    """How many of the scores first..end-1 are in each bin."""
    count = tl.zeros([BINS], tl.int32)
    for start in tl.range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        count += tl.histogram(score_bin(load_bits(scores, i, i < end)), BINS, mask=i < end)
    return count


@triton.jit
def load_bins(bins, chunks, first):
    """Bins [CHUNKS, BINS] of the chunks from `first` on; zero from `chunks` on."""
    c = first + tl.arange(0, CHUNKS)[:, None]
    return tl.load(bins + c * BINS + tl.arange(0, BINS)[None, :], mask=c < chunks, other=0)


@triton.jit
def count_bins(bins, chunks):
    """The bins of all chunks together."""
    count = tl.zeros([BINS], tl.int32)
    for first in tl.range(0, chunks, CHUNKS):
        count += tl.sum(load_bins(bins, chunks, first), 0)
    return count


@triton.jit
def found_before(bins, chunk, at):
    """How many scores of bin `at` the chunks before this one have."""
    total = tl.zeros([], tl.int32)
    for first in tl.range(0, chunk, CHUNKS):
        c = first + tl.arange(0, CHUNKS)
        total += tl.sum(tl.load(bins + c * BINS + at, mask=c < chunk, other=0))
    return total


@triton.jit
def gather_bin(scores, first, end, at, to, BLOCK: tl.constexpr):
    """Those of the scores first..end-1 that are in bin `at`, to `to`, in their order."""
    found = tl.zeros([], tl.int32)
    for start in tl.range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        bits = load_bits(scores, i, i < end)
        inside = ((score_bin(bits) == at) & (bits >= 0) & (i < end)).to(tl.int32)
        tl.store(to + found + tl.cumsum(inside, 0) - 1, bits.to(tl.float32, bitcast=True), mask=inside > 0)
        if start + BLOCK < end:
            found += tl.sum(inside)


@triton.jit
def find_cut(
    scores, bins, gathered, cuts, chunk, chunks, count, n, k, end, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A chunk's part of finding the cut of a list, the k-th largest of `n` scores, whose bins are `count`. Of the scores 0..end-1
    those in the cut's bin go to `gathered`, in their order; the last program of the list writes the bin, the cut, and how many
    equal it are among the k largest, to cuts [4], whose last entry, zero before, counts the programs that are through."""
    at, need, _ = from_top(count, n, k)
    first = chunk * CHUNK
    gather_bin(scores, first, tl.minimum(first + CHUNK, end), at, gathered + found_before(bins, chunk, at), BLOCK)
    tl.debug_barrier()  # all of this program's stores come before its sign that it is through
    if tl.atomic_add(cuts + 3, 1, sem="acq_rel") + 1 == chunks:
        cut, need = kth_of_bin(gathered, found_before(bins, chunks, at), at, need)
        tl.store(cuts, at)
        tl.store(cuts + 1, cut)
        tl.store(cuts + 2, need)


@triton.jit
def count_before(gathered, bins, chunk, at, cut, BLOCK: tl.constexpr):
    """How many scores of the chunks before this one are above the cut, and how many equal it."""
    above, equal = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for first in tl.range(0, chunk, CHUNKS):
        higher = tl.arange(0, BINS)[None, :] > at
        above += tl.sum(tl.where(higher, load_bins(bins, chunk, first), 0))
    found = found_before(bins, chunk, at)
    for start in tl.range(0, found, BLOCK):
        i = start + tl.arange(0, BLOCK)
        bits = load_bits(gathered, i, i < found)
        above += tl.sum(((bits > cut) & (i < found)).to(tl.int32))
        equal += tl.sum(((bits == cut) & (i < found)).to(tl.int32))
    return above, equal


@triton.jit
def compact(
    scores, first, end, cut, need, above_seen, equal_seen, order, b, k_len, out, BLOCK: tl.constexpr, PADDED: tl.constexpr
):
    """Positions of the scores first..end-1 that are above the cut, or among the first `need` equal to it, to their places."""
    for start in tl.range(first, end, BLOCK):
        i = start + tl.arange(0, BLOCK)
        bits = load_bits(scores, i, i < end)
        above = ((bits > cut) & (i < end)).to(tl.int32)
        equal = ((bits == cut) & (i < end)).to(tl.int32)
        both = tl.cumsum((above << 16) + equal, 0)  # a block has fewer than 2**15
        number_above, number_equal = above_seen + (both >> 16), equal_seen + (both & 0xFFFF)
        take = (above > 0) | ((equal > 0) & (number_equal <= need))
        place = number_above + tl.minimum(number_equal, need) - 1
        tl.store(out + place, positions_of(order, b, i, i < end, k_len, PADDED).to(tl.int32), mask=take)
        if start + BLOCK < end:
            seen = tl.sum((above << 16) + equal)
            above_seen += seen >> 16
            equal_seen += seen & 0xFFFF
