"""The keys that the two scored rows of a verify step weigh most, list by list: weights, bins, cut, compaction. Triton.

A list is one KV head's, of its query heads, or one for all heads of a layer. Its keys are divided among programs, each of a
chunk of them: the first launch weighs and bins, the second finds the cut, the third writes (`common/chunks_device.py`).
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.bins_device import BINS, score_bin
from tsa_compile.kernels.common.chunks_device import compact, count_before, count_bins, find_cut

ONE = tl.constexpr(1073741824)  # a share of 1, in the units of the budget
NONE = tl.constexpr(-1.0)  # of a key that is none
LENGTHS = ("length", "rows", "group", "lists", "keys", "share", "most")


@triton.jit(do_not_specialize=("lists",))
def crop_kernel(since, begin, counts, at, lists, BLOCK: tl.constexpr):
    """Grid (B): rows from `at` on are others now, int32 [B]; a list that was chosen among them is dropped."""
    b = tl.program_id(0)
    new, g = tl.load(at + b), tl.arange(0, BLOCK)
    dropped = new < tl.load(since + b)
    tl.store(begin + b, new)
    tl.store(since + b, 0, mask=dropped)
    tl.store(counts + b * lists + g, 0, mask=dropped & (g < lists))


@triton.jit
def chunk_of(length, CHUNK: tl.constexpr):
    """Of a program in a grid of chunks * lists: its chunk, its list, how many chunks there are."""
    chunks = tl.cdiv(length, CHUNK)
    return tl.program_id(0) % chunks, (tl.program_id(0) // chunks).to(tl.int64), chunks


@triton.jit
def wanted(number, keys, share, most):
    """How many of `number` keys a list has: max(keys, ceil(share * number)), if there are so many, and room."""
    by_share = ((number.to(tl.int64) * share + ONE - 1) // ONE).to(tl.int32)
    return tl.minimum(tl.minimum(tl.maximum(by_share, keys), number), most)


@triton.jit(do_not_specialize=LENGTHS)
def weigh_kernel(
    scores, lse, begin, rank, bins, cuts, length, rows, group, lists,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks * B * G): the mean weight of a chunk's keys, NONE where they are hidden or not before `begin`.

    Args:
        scores: float16 or float32 [B, H, 2, length], of the first and the last row; lse: float32 [B, H, rows].
        begin: int32 [B]. group: query heads of a list, of which there are `lists`; ROWS: twice as many, or more.
        rank: float32 [B, G, length]; bins: int32 [B, G, chunks, BINS]; cuts: int32 [B, G, 4]. Written; the last with 0.
    """
    chunk, number, chunks = chunk_of(length, CHUNK)
    before = tl.minimum(tl.load(begin + number // lists), length)
    n = tl.arange(0, ROWS)
    row, ok = number * (2 * group) + n, n < 2 * group  # of all [B, H, 2]
    sums = tl.load(lse + row // 2 * rows + row % 2 * (rows - 1), mask=ok, other=0.0)
    count = tl.zeros([BINS], tl.int32)
    for first in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length), BLOCK):
        j = first + tl.arange(0, BLOCK)
        there = ok[:, None] & (j < before)[None, :]
        score = tl.load(scores + row[:, None] * length + j[None, :], mask=there, other=float("-inf")).to(tl.float32)
        weight = tl.exp(score - sums[:, None])
        total = tl.sum(tl.where((weight >= 0.0) & (weight <= 3e38), weight, 0.0), 0)  # what is not finite weighs nothing
        seen = tl.max((score > float("-inf")).to(tl.int32), 0) > 0
        mean = tl.where(seen, total / (2 * group), NONE)
        tl.store(rank + number * length + j, mean, mask=j < length)
        count += tl.histogram(score_bin(mean.to(tl.int32, bitcast=True)), BINS, mask=seen)
    tl.store(bins + (number * chunks + chunk) * BINS + tl.arange(0, BINS), count)
    tl.store(cuts + number * 4 + tl.arange(0, 4), tl.zeros([4], tl.int32), mask=(tl.arange(0, 4) < 4) & (chunk == 0))


@triton.jit(do_not_specialize=LENGTHS)
def cut_kernel(
    rank, bins, gathered, cuts, length, keys, share, most, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid as of `weigh_kernel`: `find_cut` of each list, to cuts, and gathered float32 [B, G, length], scratch."""
    chunk, number, chunks = chunk_of(length, CHUNK)
    rank += number * length
    bins += number * chunks * BINS
    gathered += number * length
    cuts += number * 4
    count = count_bins(bins, chunks)
    total = tl.sum(count)
    k = wanted(total, keys, share, most)
    if (k <= 0) | (k >= total):
        return
    find_cut(rank, bins, gathered, cuts, chunk, chunks, count, total, k, length, CHUNK, BLOCK)


@triton.jit(do_not_specialize=LENGTHS)
def write_kernel(
    rank, bins, gathered, cuts, begin, since, counts, indices, length, lists, keys, share, most,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid as of `weigh_kernel`: a chunk's part of indices int32 [B, G, most], ascending; of the first chunk counts int32 [B, G],
    and, of a row's first list, since int32 [B], which becomes `begin`."""
    chunk, number, chunks = chunk_of(length, CHUNK)
    bins += number * chunks * BINS
    total = tl.sum(count_bins(bins, chunks))
    k = wanted(total, keys, share, most)
    if chunk == 0:
        tl.store(counts + number, k)
        tl.store(since + number // lists, tl.load(begin + number // lists), mask=number % lists == 0)
    if k <= 0:
        return
    cut, need = tl.full([], -1, tl.int32), tl.zeros([], tl.int32)  # all
    above, equal = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    gathered += number * length
    if k >= total:
        above = tl.sum(count_bins(bins, chunk))
    else:
        cuts += number * 4
        at, cut, need = tl.load(cuts), tl.load(cuts + 1), tl.load(cuts + 2)
        above, equal = count_before(gathered, bins, chunk, at, cut, BLOCK)
    first = chunk * CHUNK
    out, end = indices + number * most, tl.minimum(first + CHUNK, length)
    compact(rank + number * length, first, end, cut, need, above, equal, begin, 0, length, out, BLOCK, PADDED=False)
