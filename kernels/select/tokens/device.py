"""Which tokens a head keeps, on the GPU and without sorting: bins, radix search, stable compaction. Triton.

A list is cut at the score of its last token. Scores are binned, those of the bin that has the cut are gathered, and the cut
is found among them: few by comparing all, many by radix search. Up to CHUNK scores, one program does that and writes the
list. Of longer rows, programs over chunks bin and gather, the last of them finds the cut, and all write their parts, whose
places follow from the bins of the chunks before. Scores are >= 0, so that their float32 bits, as integers, keep their order.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.bins_device import BINS, from_top, kth_of_bin
from tsa_compile.kernels.common.chunks_device import bin_scores, compact, count_before, count_bins, find_cut, gather_bin
from tsa_compile.kernels.common.ranks_device import positions_of, row_extent

LENGTHS = ("heads", "q_len", "k_len", "last_queries", "heavy")


@triton.jit
def list_of(counts, indices, heavy_indices, which, head_index, b, length, k_len, last_queries, heavy):
    """Of list `which` (0: kept, 1: heaviest): where it is, capacity, entries, how many by score, first rank after those."""
    count = tl.load(counts + b)
    n = length - last_queries
    everything = count == length
    is_kept = which == 0
    by_score = tl.where(everything, 0, tl.where(is_kept, count - last_queries, tl.minimum(heavy, n)))
    size = tl.where(is_kept, count, by_score)
    out = tl.where(is_kept, indices + head_index * k_len, heavy_indices + head_index * heavy)
    rest = tl.where(is_kept & everything, 0, tl.where(is_kept, n, length))  # ranks from here on follow, whatever their score
    return out, tl.where(is_kept, k_len, heavy), size, by_score, rest


@triton.jit
def write_rest(
    first, length, rest, order, b, k_len, out, capacity, size, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr
):
    """A chunk's part of what follows the chosen by score: the ranks from `rest` on, and -1 in the entries behind the last."""
    for start in tl.range(tl.maximum(first, rest), tl.minimum(first + CHUNK, length), BLOCK):
        r = start + tl.arange(0, BLOCK)
        ok = r < tl.minimum(first + CHUNK, length)
        tl.store(out + r - length + size, positions_of(order, b, r, ok, k_len, PADDED).to(tl.int32), mask=ok)
    for start in tl.range(tl.maximum(first, size), tl.minimum(first + CHUNK, capacity), BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(out + i, -1, mask=i < tl.minimum(first + CHUNK, capacity))


@triton.jit
def place(k_len, heavy, CHUNK: tl.constexpr):
    """Of a program in a grid of chunks * kinds * rows, where a row is a list of one batch row and head: its chunk, the kind of
    its list (0: kept, 1: heaviest, if any are asked for), its row; and the numbers of chunks and rows."""
    chunks, kinds = tl.cdiv(k_len, CHUNK), tl.where(heavy > 0, 2, 1)
    pid = tl.program_id(0)
    row = (pid // (chunks * kinds)).to(tl.int64)
    return pid % chunks, pid // chunks % kinds, row, chunks, tl.num_programs(0) // (chunks * kinds)


@triton.jit(do_not_specialize=LENGTHS)
def select_kernel(
    scores, gathered, counts, indices, heavy_indices, order, ranks, heads, q_len, k_len, last_queries, heavy,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid as in `place`, for rows of up to CHUNK scores, or any that keep everything: positions to indices [B, H, Lk] and
    heavy_indices [B, H, heavy], ascending, then -1. `gathered` [kinds, B * H, Lk]: scores of the bins that have the cuts."""
    chunk, which, head_index, _, total = place(k_len, heavy, CHUNK)
    b = head_index // heads
    length, _ = row_extent(ranks, b, q_len, k_len, last_queries, PADDED)
    n = length - last_queries
    out, capacity, size, by_score, rest = list_of(
        counts, indices, heavy_indices, which, head_index, b, length, k_len, last_queries, heavy
    )
    scores += head_index * k_len
    if by_score > 0:
        gathered += (which * total + head_index) * k_len
        at, need, found = from_top(bin_scores(scores, 0, n, BLOCK), n, by_score)
        gather_bin(scores, 0, n, at, gathered, BLOCK)
        tl.debug_barrier()  # what other threads have gathered is read
        cut, need = kth_of_bin(gathered, found, at, need)
        none = tl.zeros([], tl.int32)
        compact(scores, 0, n, cut, need, none, none, order, b, k_len, out, BLOCK, PADDED)
    write_rest(chunk * CHUNK, length, rest, order, b, k_len, out, capacity, size, CHUNK, BLOCK, PADDED)


@triton.jit(do_not_specialize=LENGTHS)
def bin_kernel(
    scores, bins, ranks, heads, q_len, k_len, last_queries,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (chunks * B * H). Bins of each chunk's scores, to bins [B * H, chunks, BINS]."""
    chunk, _, head_index, chunks, _ = place(k_len, 0, CHUNK)
    length, _ = row_extent(ranks, head_index // heads, q_len, k_len, last_queries, PADDED)
    end = tl.minimum(chunk * CHUNK + CHUNK, length - last_queries)
    count = bin_scores(scores + head_index * k_len, chunk * CHUNK, end, BLOCK)
    tl.store(bins + (head_index * chunks + chunk) * BINS + tl.arange(0, BINS), count)


@triton.jit(do_not_specialize=LENGTHS)
def cut_kernel(
    scores, bins, gathered, cuts, counts, ranks, heads, q_len, k_len, last_queries, heavy,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid as in `place`: `find_cut` of each list, to cuts [B * H, 2, 4], zero before, and gathered [kinds, B * H, Lk]."""
    chunk, which, head_index, chunks, total = place(k_len, heavy, CHUNK)
    b = head_index // heads
    length, _ = row_extent(ranks, b, q_len, k_len, last_queries, PADDED)
    n = length - last_queries
    _, _, _, k, _ = list_of(counts, cuts, cuts, which, head_index, b, length, k_len, last_queries, heavy)
    if k <= 0:
        return
    scores += head_index * k_len
    bins += head_index * chunks * BINS
    gathered += (which * total + head_index) * k_len
    cuts += (head_index * 2 + which) * 4
    find_cut(scores, bins, gathered, cuts, chunk, chunks, count_bins(bins, chunks), n, k, n, CHUNK, BLOCK)


@triton.jit(do_not_specialize=LENGTHS)
def write_kernel(
    scores, bins, gathered, cuts, counts, indices, heavy_indices, order, ranks, heads, q_len, k_len, last_queries, heavy,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid as in `place`: as `select_kernel`, by the cuts of `cut_kernel`."""
    chunk, which, head_index, chunks, total = place(k_len, heavy, CHUNK)
    b = head_index // heads
    length, _ = row_extent(ranks, b, q_len, k_len, last_queries, PADDED)
    out, capacity, size, by_score, rest = list_of(
        counts, indices, heavy_indices, which, head_index, b, length, k_len, last_queries, heavy
    )
    first = chunk * CHUNK
    if by_score > 0:
        bins += head_index * chunks * BINS
        gathered += (which * total + head_index) * k_len
        cuts += (head_index * 2 + which) * 4
        at, cut, need = tl.load(cuts), tl.load(cuts + 1), tl.load(cuts + 2)
        above, equal = count_before(gathered, bins, chunk, at, cut, BLOCK)
        scores += head_index * k_len
        end = tl.minimum(first + CHUNK, length - last_queries)
        compact(scores, first, end, cut, need, above, equal, order, b, k_len, out, BLOCK, PADDED)
    write_rest(first, length, rest, order, b, k_len, out, capacity, size, CHUNK, BLOCK, PADDED)
