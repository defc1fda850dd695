"""The prefill over kept tokens for Hopper: persistent and warp-specialised, in Gluon (Triton's explicit dialect).

As in FlashAttention-3 (arXiv 2407.08608), one warpgroup loads and two compute, 64 rows each; the first product of a key
block runs together with the second product of the block before, and the softmax under them. Here the producer gathers:
cp.async takes each kept row of K and V to its place in a swizzled tile and signals an mbarrier when it has arrived.
Key blocks run from the diagonal down to the first, so that only those on the diagonal are masked.
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

from tsa_compile.kernels.gather_device import gather_rows, row_layout

WARPS = gl.constexpr(4)  # of each of the three parts
LENGTHS = ("heads", "kv_heads", "lists", "q_len", "k_len", "total", "tiles", "section", "i_sb", "i_sg")
PRODUCER_REGISTERS = gl.constexpr(40)
CONSUMER_REGISTERS = gl.constexpr(232)


@gluon.jit
def snake(round, programs):
    """The tile of this program's `round`: 0..P-1, then P-1..0, and so on, which evens out tiles of falling length."""
    pid = gl.program_id(0)
    return round * programs + gl.where(round % 2 == 0, pid, programs - 1 - pid)


@gluon.jit
def find_tile(
    t, indices, counts, i_sb, i_sg, heads, lists, tiles, section, skipped, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr
):
    """Tile number -> batch, head, kept list and count, tile, tiles of the head, key blocks (0: no query to compute).

    `section` heads advance together, longest tiles first, so that the keys and values they share stay in L2.
    """
    rest = t % (section * tiles)
    head_index = t // (section * tiles) * section + rest % section
    b, h = (head_index // heads).to(gl.int64), (head_index % heads).to(gl.int64)
    kept = indices + b * i_sb + h * lists // heads * i_sg
    n = gl.load(counts + b)
    n_tiles = gl.maximum(gl.cdiv(n, BLOCK_M), 1)
    tile = n_tiles - 1 - rest // section
    end = gl.minimum((tile + 1) * BLOCK_M, n)
    last = gl.load(kept + end - 1, mask=(tile >= 0) & (end > 0), other=-1)
    blocks = gl.where(last >= skipped, gl.cdiv(end, BLOCK_N), 0)
    return b, h, kept, n, tile, n_tiles, last, blocks


@gluon.jit
def zero_rows(out, stride_l, first, last, D: gl.constexpr):
    layout: gl.constexpr = row_layout(D, WARPS)
    ROWS: gl.constexpr = 32
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    for start in range(first, last, ROWS):
        rows = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        zeros = gl.zeros([ROWS, D], out.dtype.element_ty, layout=layout)
        at = out + gl.expand_dims(rows.to(gl.int64), 1) * stride_l + gl.expand_dims(d, 0)
        gl.store(at, zeros, mask=gl.expand_dims(rows < last, 1))


@gluon.jit
def produce(
    k, v, out, indices, counts, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, o_sb, o_sh, o_sl, i_sb, i_sg,
    heads, kv_heads, lists, q_len, skipped, total, tiles, section, programs,
    positions, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, zeroed, seen,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr,
):  # fmt: skip
    """Gathers K and V blocks, ahead of the consumers; zeroes the rows between the kept ones of each tile."""
    lane = gl.arange(0, BLOCK_N, layout=gl.BlockedLayout([1], [32], [4], [0]))
    filled = 0  # key blocks, over all tiles
    served = 0  # tiles with a query
    for round in range(0, gl.cdiv(total, programs)):
        t = snake(round, programs)
        if t < total:
            b, h, kept, n, tile, n_tiles, last, blocks = find_tile(
                t, indices, counts, i_sb, i_sg, heads, lists, tiles, section, skipped, BLOCK_M, BLOCK_N
            )
            kv_head = h * kv_heads // heads
            k_head = k + b * k_sb + kv_head * k_sh
            v_head = v + b * v_sb + kv_head * v_sh
            slots = (blocks - 1) * BLOCK_N + lane
            at = gl.load(kept + slots, mask=(slots >= 0) & (slots < n), other=0)
            for _ in range(0, blocks):
                stage = filled % STAGES
                free = ((filled // STAGES) & 1) ^ 1
                positions.store(at)
                rows = positions.load(gl.SliceLayout(1, row_layout(D, WARPS)))
                slots -= BLOCK_N
                at = gl.load(kept + slots, mask=slots >= 0, other=0)  # for the next block, long before it is needed
                mbarrier.wait(k_empty.index(stage), free)
                gather_rows(k_tiles.index(stage), k_head, rows, k_sl, D, WARPS)
                async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
                mbarrier.wait(v_empty.index(stage), free)
                gather_rows(v_tiles.index(stage), v_head, rows, v_sl, D, WARPS)
                async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
                filled += 1
            if not STRIP:
                if tile >= 0:
                    before = gl.load(kept + tile * BLOCK_M - 1, mask=tile > 0, other=-1) - skipped
                    end = gl.where(tile == n_tiles - 1, q_len, last - skipped + 1)
                    zero_rows(out + b * o_sb + h * o_sh, o_sl, gl.maximum(before + 1, 0), end, D)
                if blocks > 0:
                    mbarrier.wait(seen, (served & 1) ^ 1)  # a barrier holds one arrival that was not waited for, not two
                    mbarrier.arrive(zeroed)
                    served += 1


@gluon.jit
def mask_scores(scores, first_key, first, BLOCK_N: gl.constexpr, mma: gl.constexpr):
    keys = first_key + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, mma))
    slots = first + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    return gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(slots, 1), scores, float("-inf"))


@gluon.jit
def attend(
    q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, first, blocks, used, scale_log2, dtype: gl.constexpr,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Online softmax of 64 rows over `blocks` key blocks, the first of which is number `used` in the ring."""
    score_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_mma, 2)
    no_scores = gl.zeros([64, BLOCK_N], gl.float32, layout=score_mma)
    acc = gl.zeros([64, D], gl.float32, layout=out_mma)

    stage = used % STAGES
    mbarrier.wait(k_full.index(stage), (used // STAGES) & 1)
    scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(stage))
    scores = mask_scores(scores, (blocks - 1) * BLOCK_N, first, BLOCK_N, score_mma)
    row_max = gl.max(scores, 1) * scale_log2
    if BLOCK_N < BLOCK_M:
        row_max = gl.maximum(row_max, -1e30)  # a row may have no key in this block
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(row_max, 1))
    row_sum = gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(dtype), p_layout)
    mbarrier.wait(k_full.index((used + 1) % STAGES), ((used + 1) // STAGES) & 1, pred=blocks > 1)

    for i in range(used + 1, used + blocks):
        stage = i % STAGES
        before = (i - 1) % STAGES
        scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(stage))
        if BLOCK_N < BLOCK_M:
            scores = mask_scores(scores, (used + blocks - 1 - i) * BLOCK_N, first, BLOCK_N, score_mma)
        new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
        shrink = gl.exp2(row_max - new_max)
        weights = gl.exp2(scores * scale_log2 - gl.expand_dims(new_max, 1))
        row_sum = row_sum * shrink + gl.sum(weights, 1)
        row_max = new_max
        new_p = gl.convert_layout(weights.to(dtype), p_layout)
        # The wait for the next keys stands here because it is a branch: ptxas would otherwise wait for the product first
        # and only then compute the softmax that is to hide it.
        mbarrier.wait(k_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1, pred=i + 1 < used + blocks)
        acc, p, new_p = warpgroup_mma_wait(0, deps=[acc, p, new_p])
        mbarrier.arrive(v_empty.index(before))
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, out_mma)), 1)
        p = new_p

    final = used + blocks - 1
    mbarrier.wait(v_full.index(final % STAGES), (final // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(final % STAGES), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(final % STAGES))
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, out_mma)), 1)
    return acc, row_max + gl.log2(row_sum)


@gluon.jit
def consume(
    offset, q, out, lse, indices, counts, q_sb, q_sh, q_sl, o_sb, o_sh, o_sl, i_sb, i_sg,
    heads, lists, q_len, skipped, total, tiles, section, programs, scale_log2,
    q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, zeroed, seen,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr,
):  # fmt: skip
    """Attention of 64 kept queries of each tile, from slot `offset` of the tile on: one warpgroup."""
    dtype: gl.constexpr = q.dtype.element_ty
    layout: gl.constexpr = row_layout(D, WARPS)
    d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, layout)), 0)
    used = 0  # key blocks, over all tiles
    served = 0  # tiles with a query
    for round in range(0, gl.cdiv(total, programs)):
        t = snake(round, programs)
        if t < total:
            b, h, kept, n, tile, _n_tiles, _last, blocks = find_tile(
                t, indices, counts, i_sb, i_sg, heads, lists, tiles, section, skipped, BLOCK_M, BLOCK_N
            )
            if blocks > 0:
                first = tile * BLOCK_M + offset
                slots = first + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
                rows = gl.load(kept + slots, mask=slots < n, other=-1) - skipped
                row_ok = gl.expand_dims(rows >= 0, 1)
                row_at = gl.expand_dims(rows.to(gl.int64), 1)
                q_at = q + b * q_sb + h * q_sh + row_at * q_sl + d
                q_tile.store(gl.load(q_at, mask=row_ok, other=0.0))
                fence_async_shared()
                acc, log2_sum = attend(
                    q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, first, blocks, used, scale_log2, dtype,
                    D, BLOCK_M, BLOCK_N, STAGES,
                )  # fmt: skip
                used += blocks
                q_tile.store(acc.to(dtype))  # through shared memory, so that whole rows are stored
                if not STRIP:
                    mbarrier.wait(zeroed, served & 1)
                    mbarrier.arrive(seen)
                o_at = out + b * o_sb + h * o_sh + row_at * o_sl + d
                gl.store(o_at, q_tile.load(layout), mask=row_ok)
                if STRIP:
                    ln2: gl.constexpr = 0.6931471805599453
                    own = first + gl.arange(0, 64, layout=log2_sum.type.layout)
                    own = gl.load(kept + own, mask=own < n, other=-1) - skipped
                    gl.store(lse + (b * heads + h) * q_len + own, log2_sum * ln2, mask=own >= 0)
                served += 1


@gluon.jit(do_not_specialize=LENGTHS)
def sparse_prefill_hopper_kernel(
    q, k, v, out, lse, indices, counts,
    q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, o_sb, o_sh, o_sl, i_sb, i_sg,
    heads, kv_heads, lists, q_len, k_len, total, tiles, section, scale_log2,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr,
):  # fmt: skip
    """`sparse_prefill_kernel` (device.py) by one program a multiprocessor; rows contiguous and 16-byte aligned."""
    gl.static_assert(BLOCK_M == 128 and BLOCK_M % BLOCK_N == 0)
    dtype: gl.constexpr = q.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], tile_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], tile_layout)
    positions = gl.allocate_shared_memory(gl.int32, [BLOCK_N], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    zeroed = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    seen = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), 128)  # the threads of the producer, each when its copies have arrived
        mbarrier.init(v_full.index(i), 128)
        mbarrier.init(k_empty.index(i), 2)  # the two consumers
        mbarrier.init(v_empty.index(i), 2)
    mbarrier.init(zeroed, 1)
    mbarrier.init(seen, 2)
    fence_async_shared()

    skipped, programs = k_len - q_len, gl.num_programs(0)
    gl.warp_specialize(
        [
            (consume, (
                0, q, out, lse, indices, counts, q_sb, q_sh, q_sl, o_sb, o_sh, o_sl, i_sb, i_sg,
                heads, lists, q_len, skipped, total, tiles, section, programs, scale_log2,
                q_tiles.index(0), k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, zeroed, seen,
                D, BLOCK_M, BLOCK_N, STAGES, STRIP,
            )),
            (consume, (
                64, q, out, lse, indices, counts, q_sb, q_sh, q_sl, o_sb, o_sh, o_sl, i_sb, i_sg,
                heads, lists, q_len, skipped, total, tiles, section, programs, scale_log2,
                q_tiles.index(1), k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, zeroed, seen,
                D, BLOCK_M, BLOCK_N, STAGES, STRIP,
            )),
            (produce, (
                k, v, out, indices, counts, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, o_sb, o_sh, o_sl, i_sb, i_sg,
                heads, kv_heads, lists, q_len, skipped, total, tiles, section, programs,
                positions, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, zeroed, seen,
                D, BLOCK_M, BLOCK_N, STAGES, STRIP,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
