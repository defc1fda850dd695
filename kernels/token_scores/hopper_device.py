"""Window scores for Hopper, in Gluon (Triton's explicit dialect): the heads of a program from one read of K a pass.

The scoring queries of HEADS heads stay in shared memory, key tiles pass through a ring (hopper_ring_device.py). As in
FlashAttention-3 (arXiv 2407.08608), products run on the tensor cores while exponentials of others are computed. The second
pass multiplies the other way round, keys by queries, so that the sum over queries stays within a thread.
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

from tsa_compile.kernels.gather_device import barrier
from tsa_compile.kernels.token_scores.hopper_ring_device import (
    BLOCK,
    WARPS,
    all_arrived,
    allocate_barriers,
    allocate_tiles,
    begin_keys,
    copy_keys,
    program_rows,
    take_queries,
)

LENGTHS = ("heads", "kv_heads", "q_len", "k_len", "window", "splits", "span")
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [8, 1], [16, 128, 16]))


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
def wait_product(coming, full, t, i: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr):
    """Waits for the product in flight, and for the next key tile where the product after it takes that.

    The wait for the tile stands first because it is a branch: ptxas would otherwise wait for the product first and only then
    compute the exponentials that it is to hide.
    """
    if (i + 2) % HEADS == 0:
        after = t + (i + 2) // HEADS
        mbarrier.wait(full.index(after % STAGES), (after // STAGES) & 1)
        fence_async_shared()
    return warpgroup_mma_wait(0, deps=[coming])


@gluon.jit
def lse_pass(
    q_tiles, k_tiles, full, k, k_sl, order, part_max, part_sum, base, splits, start, stop, length, rows, window, scale_log2,
    D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """Running maximum and sum (base 2) of the heads' scoring queries over keys start..stop-1, to [B, H, splits, window]."""
    zeros = gl.zeros([BLOCK, BLOCK], gl.float32, layout=MMA)
    row_max, row_sum = (), ()
    for _ in gl.static_range(HEADS):
        row_max = row_max + (gl.full([BLOCK], -1.0e30, gl.float32, layout=gl.SliceLayout(1, MMA)),)  # noqa: RUF005
        row_sum = row_sum + (gl.zeros([BLOCK], gl.float32, layout=gl.SliceLayout(1, MMA)),)  # noqa: RUF005

    open_tiles = gl.maximum(gl.minimum(stop, length - rows + 1) - start, 0) // BLOCK  # all queries see all of their keys
    scores = warpgroup_mma(q_tiles.index(0), k_tiles.index(0).permute((1, 0)), zeros, use_acc=False)
    tiles = gl.cdiv(gl.maximum(stop - start, 0), BLOCK)
    rank = length - rows + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, MMA))
    for masked in gl.static_range(2):
        for t in range(open_tiles if masked else 0, tiles if masked else open_tiles):
            barrier()  # the tile before this one has been read
            copy_keys(k_tiles, full, t + STAGES - 1, k, k_sl, order, start, length, D, STAGES, PADDED)
            for i in gl.static_range(HEADS):
                keys = k_tiles.index((t + (i + 1) // HEADS) % STAGES).permute((1, 0))
                coming = warpgroup_mma(q_tiles.index((i + 1) % HEADS), keys, zeros, use_acc=False, is_async=True)
                if masked:
                    j = start + t * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, MMA))
                    seen = (gl.expand_dims(j, 0) <= gl.expand_dims(rank, 1)) & gl.expand_dims(j < stop, 0)
                    scores = gl.where(seen, scores, float("-inf"))
                new_max, new_sum = add_keys(row_max[i], row_sum[i], scores, scale_log2)
                row_max, row_sum = replace(row_max, i, new_max, HEADS), replace(row_sum, i, new_sum, HEADS)
                scores = wait_product(coming, full, t, i, HEADS, STAGES)
    all_arrived()

    r = gl.arange(0, BLOCK, layout=gl.SliceLayout(1, MMA))
    for i in gl.static_range(HEADS):
        at = ((base + i) * splits + gl.program_id(1)) * window + r
        gl.store(part_max + at, row_max[i], mask=r < rows)
        gl.store(part_sum + at, row_sum[i], mask=r < rows)


@gluon.jit
def merged_lse(part_max, part_sum, first, splits, window, rows, SPLITS: gl.constexpr):
    """The log-sum-exp (base 2) of a head's scoring queries over all spans, whose first is at `first`; infinite without a query.

    SPLITS: a power of two, at least `splits`.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [WARPS, 1], [1, 0])
    s = gl.expand_dims(gl.arange(0, SPLITS, layout=gl.SliceLayout(1, layout)), 1)
    r = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, layout))
    at = first + s * window + gl.expand_dims(r, 0)
    there = (s < splits) & gl.expand_dims(r < rows, 0)
    top = gl.load(part_max + at, mask=there, other=-1.0e30)
    total = gl.load(part_sum + at, mask=there, other=0.0)
    highest = gl.max(top, 0)
    total = gl.sum(total * gl.exp2(top - gl.expand_dims(highest, 0)), 0)
    return gl.where(r < rows, highest + gl.log2(total), float("inf"))


@gluon.jit
def mean_pass(
    q_tiles, k_tiles, full, k, k_sl, order, part_max, part_sum, mean, base, splits, start, stop, length, rows, window, k_len,
    scale_log2, D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """Mean attention of the scoring queries to each of the keys start..stop-1, to mean [B, H, Lk] by rank.

    These keys come before every scoring query, so nothing is masked.
    """
    lse_tiles = gl.allocate_shared_memory(gl.float32, [HEADS, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for head in gl.static_range(HEADS):
        first = (base + head) * splits * window
        lse_tiles.index(head).store(merged_lse(part_max, part_sum, first, splits, window, rows, SPLITS))
    all_arrived()
    zeros = gl.zeros([BLOCK, BLOCK], gl.float32, layout=MMA)
    scores = warpgroup_mma(k_tiles.index(0), q_tiles.index(0).permute((1, 0)), zeros, use_acc=False)
    for t in range(0, gl.cdiv(stop - start, BLOCK)):
        barrier()  # the tile before this one has been read
        copy_keys(k_tiles, full, t + STAGES - 1, k, k_sl, order, start, length, D, STAGES, PADDED)
        j = start + t * BLOCK + gl.arange(0, BLOCK, layout=gl.SliceLayout(1, MMA))
        for i in gl.static_range(HEADS):
            keys, queries = k_tiles.index((t + (i + 1) // HEADS) % STAGES), q_tiles.index((i + 1) % HEADS)
            coming = warpgroup_mma(keys, queries.permute((1, 0)), zeros, use_acc=False, is_async=True)
            row_lse = lse_tiles.index(i).load(gl.SliceLayout(0, MMA))
            weights = gl.exp2(scores * scale_log2 - gl.expand_dims(row_lse, 0))
            gl.store(mean + (base + i) * k_len + j, gl.sum(weights, 1) / rows, mask=j < stop)
            scores = wait_product(coming, full, t, i, HEADS, STAGES)
    async_copy.wait_group(0)


@gluon.jit(do_not_specialize=LENGTHS)
def score_lse_hopper_kernel(
    q, k, part_max, part_sum, order, ranks, q_sb, q_sh, q_sl, k_sb, k_sh, k_sl,
    heads, kv_heads, q_len, k_len, window, splits, span, scale_log2,
    D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """Grid (B * H / HEADS, splits): `lse_pass` of one span of keys."""
    b, h, length, rows = program_rows(ranks, heads, q_len, k_len, window, HEADS, PADDED)
    if rows == 0:
        return
    q_tiles, k_tiles = allocate_tiles(q.dtype.element_ty, D, HEADS, STAGES)
    full = allocate_barriers(STAGES)
    k += b * k_sb + (h * kv_heads // heads) * k_sh
    order += b * k_len
    start = gl.program_id(1) * span
    take_queries(q_tiles, q + b * q_sb + h * q_sh, q_sh, q_sl, order, length, rows, k_len - q_len, D, HEADS, PADDED)
    begin_keys(k_tiles, full, k, k_sl, order, start, length, D, STAGES, PADDED)
    all_arrived()
    lse_pass(
        q_tiles, k_tiles, full, k, k_sl, order, part_max, part_sum, b * heads + h, splits, start,
        gl.minimum(start + span, length), length, rows, window, scale_log2, D, HEADS, STAGES, PADDED,
    )  # fmt: skip


@gluon.jit(do_not_specialize=LENGTHS)
def score_mean_hopper_kernel(
    q, k, part_max, part_sum, mean, order, ranks, q_sb, q_sh, q_sl, k_sb, k_sh, k_sl,
    heads, kv_heads, q_len, k_len, window, splits, span, scale_log2,
    D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """Grid (B * H / HEADS, splits): `mean_pass` of one span of keys."""
    b, h, length, rows = program_rows(ranks, heads, q_len, k_len, window, HEADS, PADDED)
    start = gl.program_id(1) * span
    stop = gl.minimum(start + span, length - window)
    if (rows == 0) | (stop <= start):
        return
    q_tiles, k_tiles = allocate_tiles(q.dtype.element_ty, D, HEADS, STAGES)
    full = allocate_barriers(STAGES)
    k += b * k_sb + (h * kv_heads // heads) * k_sh
    order += b * k_len
    take_queries(q_tiles, q + b * q_sb + h * q_sh, q_sh, q_sl, order, length, rows, k_len - q_len, D, HEADS, PADDED)
    begin_keys(k_tiles, full, k, k_sl, order, start, length, D, STAGES, PADDED)
    mean_pass(
        q_tiles, k_tiles, full, k, k_sl, order, part_max, part_sum, mean, b * heads + h, splits, start, stop, length, rows,
        window, k_len, scale_log2, D, HEADS, STAGES, SPLITS, PADDED,
    )  # fmt: skip


@gluon.jit(do_not_specialize=LENGTHS)
def score_hopper_kernel(
    q, k, part_max, part_sum, through, mean, order, ranks, q_sb, q_sh, q_sl, k_sb, k_sh, k_sl,
    heads, kv_heads, q_len, k_len, window, splits, span, scale_log2,
    D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, PADDED: gl.constexpr,
):  # fmt: skip
    """Both passes in one launch, the queries loaded once. A cooperative grid: the programs of the same heads wait for each other.

    through: int32, zero, one for each program_id(0): how many of them are through with the first pass.
    """
    b, h, length, rows = program_rows(ranks, heads, q_len, k_len, window, HEADS, PADDED)
    if rows == 0:
        return
    q_tiles, k_tiles = allocate_tiles(q.dtype.element_ty, D, HEADS, STAGES)
    full, full_again = allocate_barriers(STAGES), allocate_barriers(STAGES)
    k += b * k_sb + (h * kv_heads // heads) * k_sh
    order += b * k_len
    start, base = gl.program_id(1) * span, b * heads + h
    take_queries(q_tiles, q + b * q_sb + h * q_sh, q_sh, q_sl, order, length, rows, k_len - q_len, D, HEADS, PADDED)
    begin_keys(k_tiles, full, k, k_sl, order, start, length, D, STAGES, PADDED)
    all_arrived()
    lse_pass(
        q_tiles, k_tiles, full, k, k_sl, order, part_max, part_sum, base, splits, start,
        gl.minimum(start + span, length), length, rows, window, scale_log2, D, HEADS, STAGES, PADDED,
    )  # fmt: skip
    begin_keys(k_tiles, full_again, k, k_sl, order, start, length, D, STAGES, PADDED)
    barrier()  # all of this program's stores come before its sign that it is through
    through += gl.program_id(0)
    seen = gl.atomic_add(through, 1, sem="acq_rel") + 1
    stop = gl.minimum(start + span, length - window)
    if stop > start:
        while seen < splits:
            seen = gl.atomic_add(through, 0, sem="acquire")
        barrier()
        mean_pass(
            q_tiles, k_tiles, full_again, k, k_sl, order, part_max, part_sum, mean, base, splits, start, stop, length, rows,
            window, k_len, scale_log2, D, HEADS, STAGES, SPLITS, PADDED,
        )  # fmt: skip
    async_copy.wait_group(0)
