"""The two passes of the Hopper score kernel, as one warpgroup runs its half of them, in Gluon.

As in FlashAttention-3 (arXiv 2407.08608), the next product is on the tensor cores while exponentials are computed. The second
pass multiplies the other way round, keys by queries, so that the sum over queries stays within the four lanes of a row.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from tsa_compile.kernels.common.gather_device import barrier
from tsa_compile.kernels.common.lanes_device import HALF, by_lane, sum_in_lane
from tsa_compile.kernels.score.last_queries.hopper_ring_device import BLOCK, WARPS, wait_tile

MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))


@gluon.jit
def replace(values, i: gl.constexpr, value, N: gl.constexpr):
    """The tuple with its i-th entry replaced."""
    result = ()
    for n in gl.static_range(N):
        result = result + ((value if n == i else values[n]),)  # noqa: RUF005 - Triton has no unpacking
    return result


@gluon.jit
def add_keys(lane_max, lane_sum, scores, scale_log2):
    """One step of an online log-sum-exp, in base 2, of each lane's part of the rows."""
    scores = by_lane(scores)
    new_max = gl.maximum(lane_max, gl.max(gl.max(scores, 3), 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(gl.expand_dims(new_max, 1), 3))
    return new_max, lane_sum * gl.exp2(lane_max - new_max) + sum_in_lane(weights)


@gluon.jit
def first_product(left, right, full, empty, t, stop, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """The first product of a pass, of tile number t. Tiles end at `stop`."""
    scores = warpgroup_mma(left, right, gl.zeros([HALF, BLOCK], gl.float32, layout=MMA), use_acc=False)
    if HEADS == 1:
        mbarrier.arrive(empty.index(t % STAGES))
        wait_tile(full, t + 1, t + 1 < stop, STAGES)
    return scores


@gluon.jit
def next_product(coming, full, empty, t, stop, i: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """Waits for the product in flight: the next head's, or after the last head the next tile's first. Tiles end at `stop`, where
    that product is of no tile, and not used.

    The wait for the tile of the product after it stands first because it is a branch: ptxas would otherwise wait for the
    product first and only then compute the exponentials that it is to hide.
    """
    after = t + (i + 2) // HEADS
    if (i + 2) % HEADS == 0:
        wait_tile(full, after, after < stop, STAGES)
    scores = warpgroup_mma_wait(0, deps=[coming])
    if (i + 2) % HEADS == 0:  # it was the last of its tile
        mbarrier.arrive(empty.index((after - 1) % STAGES), pred=after - 1 < stop)
    return scores


@gluon.jit
def lse_pass(
    half: gl.constexpr, q_tiles, k_tiles, full, empty, part_max, part_sum, base, splits, start, tiles, length, rows, last_queries,
    stop, scale_log2, HEADS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Running maximum and sum (base 2) of the heads' scoring queries over keys start..stop-1, to [B, H, splits, last_queries]."""
    zeros = gl.zeros([HALF, BLOCK], gl.float32, layout=MMA)
    none = sum_in_lane(by_lane(zeros))
    lane_max, lane_sum = (), ()
    for _ in gl.static_range(HEADS):
        lane_max = lane_max + (none - 1.0e30,)  # noqa: RUF005
        lane_sum = lane_sum + (none,)  # noqa: RUF005

    open_tiles = gl.maximum(gl.minimum(stop, length - rows + 1) - start, 0) // BLOCK  # all queries see all of their keys
    wait_tile(full, 0, tiles > 0, STAGES)
    r = half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, MMA))
    queries, keys = q_tiles.index(0).slice(half * HALF, HALF), k_tiles.index(0).permute((1, 0))
    scores = first_product(queries, keys, full, empty, 0, tiles, HEADS, STAGES)
    for masked in gl.static_range(2):
        for t in range(open_tiles if masked else 0, tiles if masked else open_tiles):
            for i in gl.static_range(HEADS):
                keys = k_tiles.index((t + (i + 1) // HEADS) % STAGES).permute((1, 0))
                queries = q_tiles.index((i + 1) % HEADS).slice(half * HALF, HALF)
                coming = warpgroup_mma(queries, keys, zeros, use_acc=False, is_async=True)
                if masked:
                    j = start + t * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, MMA))
                    seen = (gl.expand_dims(j, 0) <= gl.expand_dims(length - rows + r, 1)) & gl.expand_dims(j < stop, 0)
                    scores = gl.where(seen, scores, float("-inf"))
                new_max, new_sum = add_keys(lane_max[i], lane_sum[i], scores, scale_log2)
                lane_max, lane_sum = replace(lane_max, i, new_max, HEADS), replace(lane_sum, i, new_sum, HEADS)
                scores = next_product(coming, full, empty, t, tiles, i, HEADS, STAGES)

    for i in gl.static_range(HEADS):
        row_max = gl.max(lane_max[i], 1)
        row_sum = gl.sum(lane_sum[i] * gl.exp2(lane_max[i] - gl.expand_dims(row_max, 1)), 1)
        r = half * HALF + gl.arange(0, HALF, layout=row_max.type.layout)
        at = ((base + i) * splits + gl.program_id(1)) * last_queries + r
        gl.store(part_max + at, row_max, mask=r < rows)
        gl.store(part_sum + at, row_sum, mask=r < rows)


@gluon.jit
def merged_lse(part_max, part_sum, first, splits, last_queries, rows, SPLITS: gl.constexpr):
    """The log-sum-exp (base 2) of a head's scoring queries over all spans, whose first is at `first`; infinite without a query.

    SPLITS: a power of two, at least `splits`.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    s = gl.expand_dims(gl.arange(0, SPLITS, layout=gl.SliceLayout(1, layout)), 1)
    r = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    at = first + s * last_queries + gl.expand_dims(r, 0)
    there = (s < splits) & gl.expand_dims(r < rows, 0)
    top = gl.load(part_max + at, mask=there, other=-1.0e30)
    total = gl.load(part_sum + at, mask=there, other=0.0)
    highest = gl.max(top, 0)
    total = gl.sum(total * gl.exp2(top - gl.expand_dims(highest, 0)), 0)
    return gl.where(r < rows, highest + gl.log2(total), float("inf"))


@gluon.jit
def store_mean(mean, lane_sum, first, start, stop, share):
    """Means of the keys from rank `first` on, of the program's start..stop-1: under the exponentials of the product after theirs,
    since lanes wait for each other here."""
    total = gl.sum(lane_sum, 1)
    j = first + gl.arange(0, HALF, layout=total.type.layout)
    gl.store(mean + j, total * share, mask=(j >= start) & (j < stop))


@gluon.jit
def mean_pass(
    half: gl.constexpr, q_tiles, k_tiles, lse_tiles, full, empty, part_max, part_sum, mean, base, splits, start, begin, end, stop,
    rows, last_queries, k_len, scale_log2, HEADS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """Mean attention of the scoring queries to each of the keys start..stop-1, to mean [B, H, Lk] by rank. Their tiles are the
    ring's numbers begin..end-1.

    These keys come before every scoring query, so nothing is masked.
    """
    for head in gl.static_range(HEADS):
        first = (base + head) * splits * last_queries
        lse_tiles.index(half * HEADS + head).store(merged_lse(part_max, part_sum, first, splits, last_queries, rows, SPLITS))
    barrier()
    zeros = gl.zeros([HALF, BLOCK], gl.float32, layout=MMA)
    wait_tile(full, begin, True, STAGES)
    keys = k_tiles.index(begin % STAGES).slice(half * HALF, HALF)
    scores = first_product(keys, q_tiles.index(0).permute((1, 0)), full, empty, begin, end, HEADS, STAGES)
    lane_sum = sum_in_lane(by_lane(zeros))
    share = 1.0 / rows
    first = start + half * HALF
    for t in range(begin, end):
        for i in gl.static_range(HEADS):
            keys = k_tiles.index((t + (i + 1) // HEADS) % STAGES).slice(half * HALF, HALF)
            queries = q_tiles.index((i + 1) % HEADS).permute((1, 0))
            coming = warpgroup_mma(keys, queries, zeros, use_acc=False, is_async=True)
            before = first if i > 0 else first - BLOCK
            store_mean(mean + (base + (i + HEADS - 1) % HEADS) * k_len, lane_sum, before, start, stop, share)
            row_lse = lse_tiles.index(half * HEADS + i).load(gl.SliceLayout(0, MMA))
            lane_sum = sum_in_lane(by_lane(gl.exp2(scores * scale_log2 - gl.expand_dims(row_lse, 0))))
            scores = next_product(coming, full, empty, t, end, i, HEADS, STAGES)
        first += BLOCK
    store_mean(mean + (base + HEADS - 1) * k_len, lane_sum, first - BLOCK, start, stop, share)
