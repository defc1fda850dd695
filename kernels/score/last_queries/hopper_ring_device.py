"""Shared memory of the Hopper score kernel, in Gluon: the scoring queries of some heads, and a ring of key tiles that one part of
the program fills ahead of the two that compute."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from tsa_compile.kernels.common.gather_device import gather_rows, row_layout

BLOCK = gl.constexpr(128)  # scoring queries, and keys of a tile
WARPS = gl.constexpr(4)  # of each of the three parts


@gluon.jit
def row_extent(ranks, b, q_len, k_len, last_queries, PADDED: gl.constexpr):
    """As in device.py."""
    if PADDED:
        length = gl.load(ranks + b * k_len + k_len - 1)
        before = gl.load(ranks + b * k_len + k_len - q_len - 1, mask=k_len > q_len, other=0)
        queries = length - before
    else:
        length, queries = k_len, q_len
    return length, gl.minimum(queries, last_queries)


@gluon.jit
def allocate_tiles(dtype: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """Shared tiles of the queries [HEADS, BLOCK, D] and of the keys [STAGES, BLOCK, D]."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tiles = gl.allocate_shared_memory(dtype, [HEADS, BLOCK, D], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], layout)
    return q_tiles, k_tiles


@gluon.jit
def allocate_barriers(STAGES: gl.constexpr):
    """(the queries are there; each key tile is there; each key tile has been read)."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    mbarrier.init(q_full, 32 * WARPS)  # the threads that copy, each when its copies have arrived
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 32 * WARPS)
        mbarrier.init(empty.index(i), 2)  # the parts that compute
    fence_async_shared()
    return q_full, full, empty


@gluon.jit
def copy_rows(tile, x, stride_l, order, first, last, skipped, D: gl.constexpr, PADDED: gl.constexpr):
    """Starts copies of BLOCK rows of x, from rank `first` on, to a shared tile; ranks stop at `last`, which is repeated."""
    at = gl.minimum(first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, row_layout(D, WARPS))), last)
    if PADDED:
        at = gl.load(order + at)
    gather_rows(tile, x, at - skipped, stride_l, D, WARPS)


@gluon.jit
def copy_tiles(
    q, q_sh, q_sl, k, k_sl, order, start, tiles, tiles_again, length, rows, skipped,
    q_tiles, k_tiles, q_full, full, empty,
    D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """The part that copies: the last `rows` queries of HEADS heads; `tiles` key tiles from rank `start` on, for the first pass,
    then the first `tiles_again` of them once more, for the second."""
    if tiles + tiles_again > 0:
        for i in gl.static_range(HEADS):
            copy_rows(q_tiles.index(i), q + i * q_sh, q_sl, order, length - rows, length - 1, skipped, D, PADDED)
        async_copy.mbarrier_arrive(q_full, increment_count=False)
    for t in range(0, tiles + tiles_again):
        stage = t % STAGES
        mbarrier.wait(empty.index(stage), ((t // STAGES) & 1) ^ 1)
        first = start + gl.where(t < tiles, t, t - tiles) * BLOCK
        copy_rows(k_tiles.index(stage), k, k_sl, order, first, length - 1, 0, D, PADDED)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)


@gluon.jit
def wait_tile(full, t, there, STAGES: gl.constexpr):
    """Waits for the ring's tile number t, if it is `there` at all, for the tensor cores to read."""
    mbarrier.wait(full.index(t % STAGES), (t // STAGES) & 1, pred=there)
    fence_async_shared()
