"""Window scores for Hopper, in Gluon (Triton's explicit dialect): all heads of a group from one read of K.

The scoring queries of HEADS heads stay in shared memory, key tiles pass through a ring. As in FlashAttention-3 (arXiv
2407.08608), each product runs on the tensor cores while the exponentials of the product before it are computed. The second pass
multiplies the other way round, keys by queries, so that the sum over queries stays within a thread.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # renamed in Triton 3.7
LENGTHS = ("heads", "kv_heads", "q_len", "k_len", "window", "splits", "span")
BLOCK = gl.constexpr(128)  # scoring queries, and keys of a tile
WARPS = gl.constexpr(8)
MAX_SPLITS = gl.constexpr(32)
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16]))


@gluon.constexpr_function
def row_layout(dim):
    """16 bytes a thread, whole rows of `dim` half-precision numbers."""
    return gl.BlockedLayout([1, 8], [32 * 8 // dim, dim // 8], [8, 1], [1, 0])


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
def copy_rows(tile, full, x, stride_l, order, first, last, skipped, D: gl.constexpr, PADDED: gl.constexpr):
    """Starts copies of BLOCK rows of x, from rank `first` on, to a shared tile; ranks stop at `last`, which is repeated.

    The barrier `full` passes when the rows of all threads have arrived.
    """
    layout: gl.constexpr = row_layout(D)
    at = gl.minimum(first + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, layout)), last)
    if PADDED:
        at = gl.load(order + at)
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    rows = x + gl.expand_dims((at - skipped).to(gl.int64), 1) * stride_l + gl.expand_dims(d, 0)
    async_copy.async_copy_global_to_shared(tile, rows)
    async_copy.mbarrier_arrive(full, increment_count=False)
    async_copy.commit_group()


@gluon.jit
def all_arrived():
    """Waits until all copies are in shared memory, for the tensor cores to read."""
    async_copy.wait_group(0)
    fence_async_shared()
    barrier()


@gluon.jit
def replace(values, i: gl.constexpr, value, N: gl.constexpr):
    """The tuple with its i-th entry replaced."""
    result = ()
    for n in gl.static_range(N):
        result = result + ((value if n == i else values[n]),)  # noqa: RUF005 - Triton has no unpacking
    return result


@gluon.jit
def add_keys(row_max, row_sum, scores, scale_log2):
    """One step of an online log-sum-exp, in base 2."""
    new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(new_max, 1))
    return new_max, row_sum * gl.exp2(row_max - new_max) + gl.sum(weights, 1)


@gluon.jit
def allocate(dtype: gl.constexpr, D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """Shared tiles of the queries and keys, and a barrier for each tile of keys and one for the queries."""
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    q_tiles = gl.allocate_shared_memory(dtype, [HEADS, BLOCK, D], layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES + 1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 32 * WARPS)
    mbarrier.init(full.index(STAGES), 32 * WARPS * HEADS)
    fence_async_shared()
    barrier()
    return q_tiles, k_tiles, full


@gluon.jit
def program_rows(ranks, heads, q_len, k_len, window, HEADS: gl.constexpr, PADDED: gl.constexpr):
    """A program's batch row and first head, and the row's real tokens and scoring queries."""
    programs = heads // HEADS
    b, h = (gl.program_id(0) // programs).to(gl.int64), (gl.program_id(0) % programs * HEADS).to(gl.int64)
    length, rows = row_extent(ranks, b, q_len, k_len, window, PADDED)
    return b, h, length, rows


@gluon.jit
def begin(
    q, k, q_tiles, k_tiles, full, order, q_sh, q_sl, k_sl, start, length, rows, skipped,
    D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """Starts copies of the queries of HEADS heads and the first STAGES - 1 tiles of keys."""
    for i in gl.static_range(HEADS):
        queries = full.index(STAGES)
        copy_rows(q_tiles.index(i), queries, q + i * q_sh, q_sl, order, length - rows, length - 1, skipped, D, PADDED)
    for t in gl.static_range(STAGES - 1):
        copy_rows(k_tiles.index(t), full.index(t), k, k_sl, order, start + t * BLOCK, length - 1, 0, D, PADDED)


@gluon.jit(do_not_specialize=LENGTHS)
def score_lse_hopper_kernel(
    q, k, part_max, part_sum, order, ranks, q_sb, q_sh, q_sl, k_sb, k_sh, k_sl,
    heads, kv_heads, q_len, k_len, window, splits, span, scale_log2,
    D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """Running maximum and sum (base 2) of the scoring queries of HEADS heads over one span of keys, to [B, H, splits, window]."""
    b, h, length, rows = program_rows(ranks, heads, q_len, k_len, window, HEADS, PADDED)
    if rows == 0:
        return
    q_tiles, k_tiles, full = allocate(q.dtype.element_ty, D, HEADS, STAGES)
    q += b * q_sb + h * q_sh
    k += b * k_sb + (h * kv_heads // heads) * k_sh
    order += b * k_len
    start = gl.program_id(1) * span
    stop = gl.minimum(start + span, length)
    open_tiles = gl.maximum(gl.minimum(stop, length - rows + 1) - start, 0) // BLOCK  # all queries see all of their keys
    begin(q, k, q_tiles, k_tiles, full, order, q_sh, q_sl, k_sl, start, length, rows, k_len - q_len, D, HEADS, STAGES, PADDED)
    all_arrived()
    zeros = gl.zeros([BLOCK, BLOCK], gl.float32, layout=MMA)
    row_max, row_sum = (), ()
    for _ in gl.static_range(HEADS):
        row_max = row_max + (gl.full([BLOCK], -1.0e30, gl.float32, layout=gl.SliceLayout(1, MMA)),)  # noqa: RUF005
        row_sum = row_sum + (gl.zeros([BLOCK], gl.float32, layout=gl.SliceLayout(1, MMA)),)  # noqa: RUF005

    scores = warpgroup_mma(q_tiles.index(0), k_tiles.index(0).permute((1, 0)), zeros, use_acc=False)
    for t in range(0, open_tiles):
        barrier()  # the tile before this one has been read
        ahead = t + STAGES - 1
        tile, tile_full = k_tiles.index(ahead % STAGES), full.index(ahead % STAGES)
        copy_rows(tile, tile_full, k, k_sl, order, start + ahead * BLOCK, length - 1, 0, D, PADDED)
        for i in gl.static_range(HEADS):
            keys = k_tiles.index((t + (i + 1) // HEADS) % STAGES).permute((1, 0))
            coming = warpgroup_mma(q_tiles.index((i + 1) % HEADS), keys, zeros, use_acc=False, is_async=True)
            mbarrier.wait(full.index(STAGES), 0)  # has passed; as a branch it keeps the product whole and in front
            new_max, new_sum = add_keys(row_max[i], row_sum[i], scores, scale_log2)
            row_max, row_sum = replace(row_max, i, new_max, HEADS), replace(row_sum, i, new_sum, HEADS)
            # The keys of the product after next. The wait stands here because it is a branch: ptxas would otherwise wait
            # for the product first and only then compute the exponentials that it is to hide.
            after = t + (i + 2) // HEADS
            mbarrier.wait(full.index(after % STAGES), (after // STAGES) & 1)
            fence_async_shared()
            scores = warpgroup_mma_wait(0, deps=[coming])
    all_arrived()

    rank = length - rows + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, MMA))
    for t in range(open_tiles, gl.cdiv(gl.maximum(stop - start, 0), BLOCK)):
        copy_rows(k_tiles.index(0), full.index(0), k, k_sl, order, start + t * BLOCK, length - 1, 0, D, PADDED)
        all_arrived()
        j = start + t * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, MMA))
        seen = (gl.expand_dims(j, 0) <= gl.expand_dims(rank, 1)) & gl.expand_dims(j < stop, 0)
        for i in gl.static_range(HEADS):
            scores = warpgroup_mma(q_tiles.index(i), k_tiles.index(0).permute((1, 0)), zeros, use_acc=False)
            scores = gl.where(seen, scores, float("-inf"))
            new_max, new_sum = add_keys(row_max[i], row_sum[i], scores, scale_log2)
            row_max, row_sum = replace(row_max, i, new_max, HEADS), replace(row_sum, i, new_sum, HEADS)
        barrier()

    r = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, MMA))
    for i in gl.static_range(HEADS):
        at = ((b * heads + h + i) * splits + gl.program_id(1)) * window + r
        gl.store(part_max + at, row_max[i], mask=r < rows)
        gl.store(part_sum + at, row_sum[i], mask=r < rows)


@gluon.jit
def merged_lse(part_max, part_sum, base, splits, window, rows):
    """The log-sum-exp (base 2) of a head's scoring queries over all spans; infinite where there is no query."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    s = gl.expand_dims(gl.arange(0, MAX_SPLITS, layout=gl.SliceLayout(1, layout)), 1)
    r = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    at = (base + s) * window + gl.expand_dims(r, 0)
    there = (s < splits) & gl.expand_dims(r < rows, 0)
    top = gl.load(part_max + at, mask=there, other=-1.0e30)
    total = gl.load(part_sum + at, mask=there, other=0.0)
    highest = gl.max(top, 0)
    total = gl.sum(total * gl.exp2(top - gl.expand_dims(highest, 0)), 0)
    return gl.where(r < rows, highest + gl.log2(total), float("inf"))


@gluon.jit(do_not_specialize=LENGTHS)
def score_mean_hopper_kernel(
    q, k, part_max, part_sum, mean, order, ranks, q_sb, q_sh, q_sl, k_sb, k_sh, k_sl,
    heads, kv_heads, q_len, k_len, window, splits, span, scale_log2,
    D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """Mean attention of the scoring queries to each key of one span, to mean [B, H, Lk] by rank; keys before the window.

    These keys come before every scoring query, so nothing is masked.
    """
    b, h, length, rows = program_rows(ranks, heads, q_len, k_len, window, HEADS, PADDED)
    start = gl.program_id(1) * span
    stop = gl.minimum(start + span, length - window)
    if (rows == 0) | (stop <= start):
        return
    q_tiles, k_tiles, full = allocate(q.dtype.element_ty, D, HEADS, STAGES)
    lse_tile = gl.allocate_shared_memory(gl.float32, [HEADS * BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q += b * q_sb + h * q_sh
    k += b * k_sb + (h * kv_heads // heads) * k_sh
    order += b * k_len
    begin(q, k, q_tiles, k_tiles, full, order, q_sh, q_sl, k_sl, start, length, rows, k_len - q_len, D, HEADS, STAGES, PADDED)
    for i in gl.static_range(HEADS):
        lse = merged_lse(part_max, part_sum, (b * heads + h + i) * splits, splits, window, rows)
        lse_tile.slice(i * BLOCK, BLOCK).store(lse)
    all_arrived()
    zeros = gl.zeros([BLOCK, BLOCK], gl.float32, layout=MMA)

    scores = warpgroup_mma(k_tiles.index(0), q_tiles.index(0).permute((1, 0)), zeros, use_acc=False)
    for t in range(0, gl.cdiv(stop - start, BLOCK)):
        barrier()  # the tile before this one has been read
        ahead = t + STAGES - 1
        tile, tile_full = k_tiles.index(ahead % STAGES), full.index(ahead % STAGES)
        copy_rows(tile, tile_full, k, k_sl, order, start + ahead * BLOCK, length - 1, 0, D, PADDED)
        j = start + t * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, MMA))
        for i in gl.static_range(HEADS):
            keys, queries = k_tiles.index((t + (i + 1) // HEADS) % STAGES), q_tiles.index((i + 1) % HEADS)
            coming = warpgroup_mma(keys, queries.permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.wait(full.index(STAGES), 0)  # as in the first pass
            row_lse = lse_tile.slice(i * BLOCK, BLOCK).load(gl.SliceLayout(0, MMA))
            weights = gl.exp2(scores * scale_log2 - gl.expand_dims(row_lse, 0))
            gl.store(mean + (b * heads + h + i) * k_len + j, gl.sum(weights, 1) / rows, mask=j < stop)
            after = t + (i + 2) // HEADS  # as in the first pass
            mbarrier.wait(full.index(after % STAGES), (after // STAGES) & 1)
            fence_async_shared()
            scores = warpgroup_mma_wait(0, deps=[coming])
    async_copy.wait_group(0)
