"""Shared memory of the Hopper score kernels, in Gluon: the scoring queries of some heads, and a ring of key tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier

from tsa_compile.kernels.gather_device import barrier, gather_rows, row_layout

BLOCK = gl.constexpr(128)  # scoring queries, and keys of a tile
WARPS = gl.constexpr(8)


@gluon.jit
def row_extent(ranks, b, q_len, k_len, window, PADDED: gl.constexpr):
    """As in device.py."""
    if PADDED:
        length = gl.load(ranks + b * k_len + k_len - 1)
        before = gl.load(ranks + b * k_len + k_len - q_len - 1, mask=k_len > q_len, other=0)
        queries = length - before
    else:
        length, queries = k_len, q_len
    return length, gl.minimum(queries, window)


@gluon.jit
def copy_rows(tile, x, stride_l, order, first, last, skipped, D: gl.constexpr, PADDED: gl.constexpr):
    """Starts copies of BLOCK rows of x, from rank `first` on, to a shared tile; ranks stop at `last`, which is repeated."""
    at = gl.minimum(first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, row_layout(D, WARPS))), last)
    if PADDED:
        at = gl.load(order + at)
    gather_rows(tile, x, at - skipped, stride_l, D, WARPS)
    async_copy.commit_group()


@gluon.jit
def copy_keys(k_tiles, full, t, k, k_sl, order, start, length, D: gl.constexpr, STAGES: gl.constexpr, PADDED: gl.constexpr):
    """Starts the copy of key tile t to its place in the ring, whose barrier passes when it has arrived."""
    copy_rows(k_tiles.index(t % STAGES), k, k_sl, order, start + t * BLOCK, length - 1, 0, D, PADDED)
    async_copy.mbarrier_arrive(full.index(t % STAGES), increment_count=False)


@gluon.jit
def all_arrived():
    """Waits until all copies are in shared memory, for the tensor cores to read."""
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()


@gluon.jit
def allocate_tiles(dtype: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """Shared tiles of the queries [HEADS, BLOCK, D] and of the keys [STAGES, BLOCK, D]."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tiles = gl.allocate_shared_memory(dtype, [HEADS, BLOCK, D], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], layout)
    return q_tiles, k_tiles


@gluon.jit
def allocate_barriers(STAGES: gl.constexpr):
    """One barrier for each tile of keys, which passes when the copies of all threads have arrived."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 32 * WARPS)
    fence_async_shared()
    barrier()
    return full


@gluon.jit
def program_rows(ranks, heads, q_len, k_len, window, HEADS: gl.constexpr, PADDED: gl.constexpr):
    """A program's batch row and first head, and the row's real tokens and scoring queries."""
    programs = heads // HEADS
    b, h = (gl.program_id(0) // programs).to(gl.int64), (gl.program_id(0) % programs * HEADS).to(gl.int64)
    length, rows = row_extent(ranks, b, q_len, k_len, window, PADDED)
    return b, h, length, rows


@gluon.jit
def take_queries(
    q_tiles, q, q_sh, q_sl, order, length, rows, skipped, D: gl.constexpr, HEADS: gl.constexpr, PADDED: gl.constexpr
):
    """Starts copies of the scoring queries of HEADS heads: of the last `rows` real tokens."""
    for i in gl.static_range(HEADS):
        copy_rows(q_tiles.index(i), q + i * q_sh, q_sl, order, length - rows, length - 1, skipped, D, PADDED)


@gluon.jit
def begin_keys(k_tiles, full, k, k_sl, order, start, length, D: gl.constexpr, STAGES: gl.constexpr, PADDED: gl.constexpr):
    """Starts copies of the first STAGES - 1 tiles of keys."""
    for t in gl.static_range(STAGES - 1):
        copy_keys(k_tiles, full, t, k, k_sl, order, start, length, D, STAGES, PADDED)
