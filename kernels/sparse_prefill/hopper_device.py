"""The prefill over kept tokens for Hopper: warp-specialised, in Gluon (Triton's explicit dialect).

As FlashAttention-3 (arXiv 2407.08608) does, one warpgroup loads and two compute, each its own 64 rows; the first product
of a key block runs together with the second product of the block before, under the softmax. Here the producer gathers:
cp.async takes each kept row of K and V to its place in a swizzled tile, and signals an mbarrier when it has arrived.
Key blocks run from the diagonal down to the first, so that only the first of them masks.
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

LENGTHS = ("heads", "kv_heads", "lists", "q_len", "k_len", "tiles", "section", "i_sb", "i_sg")
PRODUCER_REGISTERS = gl.constexpr(40)
CONSUMER_REGISTERS = gl.constexpr(232)


@gluon.constexpr_function
def row_layout(dim):
    """16 bytes a thread, whole rows of `dim` half-precision numbers, four warps."""
    return gl.BlockedLayout([1, 8], [32 * 8 // dim, dim // 8], [4, 1], [1, 0])


@gluon.jit
def gather_rows(tile, x, kept, start, n, stride_l, D: gl.constexpr, BLOCK_N: gl.constexpr):
    """Starts copies of the kept rows start..start+BLOCK_N-1 of x into a shared tile; beyond the n-th: token 0."""
    layout: gl.constexpr = row_layout(D)
    ROWS: gl.constexpr = 32
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    for i in gl.static_range(BLOCK_N // ROWS):
        slots = start + i * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        at = gl.load(kept + slots, mask=slots < n, other=0).to(gl.int64)
        async_copy.async_copy_global_to_shared(
            tile.slice(i * ROWS, ROWS), x + gl.expand_dims(at, 1) * stride_l + gl.expand_dims(d, 0)
        )


@gluon.jit
def zero_rows(out, stride_l, first, last, D: gl.constexpr):
    layout: gl.constexpr = row_layout(D)
    ROWS: gl.constexpr = 32
    d = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    for start in range(first, last, ROWS):
        rows = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
        zeros = gl.zeros([ROWS, D], out.dtype.element_ty, layout=layout)
        at = out + gl.expand_dims(rows.to(gl.int64), 1) * stride_l + gl.expand_dims(d, 0)
        gl.store(at, zeros, mask=gl.expand_dims(rows < last, 1))


@gluon.jit
def produce(
    k, v, out, kept, n, blocks, zero_first, zero_last, k_sl, v_sl, o_sl,
    k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, zeroed,
    D: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr,
):  # fmt: skip
    """Gathers K and V blocks from the diagonal down, then zeroes the rows between the kept ones."""
    for i in range(0, blocks):
        stage = i % STAGES
        free = ((i // STAGES) & 1) ^ 1
        start = (blocks - 1 - i) * BLOCK_N
        mbarrier.wait(k_empty.index(stage), free)
        gather_rows(k_tiles.index(stage), k, kept, start, n, k_sl, D, BLOCK_N)
        async_copy.mbarrier_arrive(k_full.index(stage), increment_count=False)
        mbarrier.wait(v_empty.index(stage), free)
        gather_rows(v_tiles.index(stage), v, kept, start, n, v_sl, D, BLOCK_N)
        async_copy.mbarrier_arrive(v_full.index(stage), increment_count=False)
    if not STRIP:
        zero_rows(out, o_sl, zero_first, zero_last, D)
        mbarrier.arrive(zeroed)


@gluon.jit
def mask_scores(scores, start, first, BLOCK_N: gl.constexpr, mma: gl.constexpr):
    keys = start + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, mma))
    slots = first + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    return gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(slots, 1), scores, float("-inf"))


@gluon.jit
def consume(
    q, out, lse, kept, n, first, blocks, skipped, q_sl, o_sl, scale_log2,
    q_tile, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, zeroed,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr,
):  # fmt: skip
    """Attention of the 64 kept queries from slot `first` on, one warpgroup."""
    dtype: gl.constexpr = q.dtype.element_ty
    rows_layout: gl.constexpr = row_layout(D)
    score_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_mma, 2)
    row_of_score: gl.constexpr = gl.SliceLayout(1, score_mma)
    row_of_out: gl.constexpr = gl.SliceLayout(1, out_mma)

    slots = first + gl.arange(0, 64, layout=gl.SliceLayout(1, rows_layout))
    rows = gl.load(kept + slots, mask=slots < n, other=-1) - skipped
    row_ok = gl.expand_dims(rows >= 0, 1)
    d = gl.expand_dims(gl.arange(0, D, layout=gl.SliceLayout(0, rows_layout)), 0)
    row_at = gl.expand_dims(rows.to(gl.int64), 1)
    q_tile.store(gl.load(q + row_at * q_sl + d, mask=row_ok, other=0.0))
    fence_async_shared()

    no_scores = gl.zeros([64, BLOCK_N], gl.float32, layout=score_mma)
    acc = gl.zeros([64, D], gl.float32, layout=out_mma)
    mbarrier.wait(k_full.index(0), 0)
    scores = warpgroup_mma(q_tile, k_tiles.index(0).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(k_empty.index(0))
    scores = mask_scores(scores, (blocks - 1) * BLOCK_N, first, BLOCK_N, score_mma)
    row_max = gl.max(scores, 1) * scale_log2
    if BLOCK_N < BLOCK_M:
        row_max = gl.maximum(row_max, -1e30)  # a row may have no key in this block
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(row_max, 1))
    row_sum = gl.sum(weights, 1)
    p = gl.convert_layout(weights.to(dtype), p_layout)

    for i in range(1, blocks):
        stage = i % STAGES
        before = (i - 1) % STAGES
        mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
        scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
        acc = warpgroup_mma(p, v_tiles.index(before), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        mbarrier.arrive(k_empty.index(stage))
        if BLOCK_N < BLOCK_M:
            scores = mask_scores(scores, (blocks - 1 - i) * BLOCK_N, first, BLOCK_N, score_mma)
        new_max = gl.maximum(row_max, gl.max(scores, 1) * scale_log2)
        shrink = gl.exp2(row_max - new_max)
        weights = gl.exp2(scores * scale_log2 - gl.expand_dims(new_max, 1))
        row_sum = row_sum * shrink + gl.sum(weights, 1)
        row_max = new_max
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])
        mbarrier.arrive(v_empty.index(before))
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, row_of_out), 1)
        p = gl.convert_layout(weights.to(dtype), p_layout)

    last = (blocks - 1) % STAGES
    mbarrier.wait(v_full.index(last), ((blocks - 1) // STAGES) & 1)
    acc = warpgroup_mma(p, v_tiles.index(last), acc, is_async=True)
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / row_sum, row_of_out), 1)
    q_tile.store(acc.to(dtype))  # through shared memory, so that whole rows are stored
    if not STRIP:
        mbarrier.wait(zeroed, 0)
    gl.store(out + row_at * o_sl + d, q_tile.load(rows_layout), mask=row_ok)
    if STRIP:
        ln2: gl.constexpr = 0.6931471805599453
        own = first + gl.arange(0, 64, layout=row_of_score)
        own = gl.load(kept + own, mask=own < n, other=-1) - skipped
        gl.store(lse + own, (row_max + gl.log2(row_sum)) * ln2, mask=own >= 0)


@gluon.jit(do_not_specialize=LENGTHS)
def sparse_prefill_hopper_kernel(
    q, k, v, out, lse, indices, counts,
    q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, o_sb, o_sh, o_sl, i_sb, i_sg,
    heads, kv_heads, lists, q_len, k_len, tiles, section, scale_log2,
    D: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr,
):  # fmt: skip
    """`sparse_prefill_kernel` (device.py), same arguments; rows of q, k and v contiguous and 16-byte aligned."""
    gl.static_assert(BLOCK_M == 128 and BLOCK_M % BLOCK_N == 0)
    pid = gl.program_id(0)
    rest = pid % (section * tiles)
    head_index = pid // (section * tiles) * section + rest % section
    b, h = (head_index // heads).to(gl.int64), (head_index % heads).to(gl.int64)
    n = gl.load(counts + b)
    n_tiles = gl.maximum(gl.cdiv(n, BLOCK_M), 1)
    tile = n_tiles - 1 - rest // section
    if tile < 0:
        return
    kept = indices + b * i_sb + h * lists // heads * i_sg
    first = tile * BLOCK_M
    end = gl.minimum(first + BLOCK_M, n)
    skipped = k_len - q_len
    last_row = gl.load(kept + end - 1, mask=end > 0, other=-1) - skipped
    zero_first = gl.maximum(gl.load(kept + first - 1, mask=first > 0, other=-1) + 1 - skipped, 0)
    zero_last = gl.where(tile == n_tiles - 1, q_len, last_row + 1)
    kv_head = h * kv_heads // heads
    q += b * q_sb + h * q_sh
    k += b * k_sb + kv_head * k_sh
    v += b * v_sb + kv_head * v_sh
    out += b * o_sb + h * o_sh
    lse += head_index.to(gl.int64) * q_len
    if last_row < 0:
        if not STRIP:
            zero_rows(out, o_sl, zero_first, zero_last, D)
        return
    blocks = gl.cdiv(end, BLOCK_N)

    dtype: gl.constexpr = q.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    barrier_layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_tiles = gl.allocate_shared_memory(dtype, [2, 64, D], tile_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], tile_layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier_layout)
    zeroed = gl.allocate_shared_memory(gl.int64, [1], barrier_layout)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), 128)  # the threads of the producer, each when its copies have arrived
        mbarrier.init(v_full.index(i), 128)
        mbarrier.init(k_empty.index(i), 2)  # the two consumers
        mbarrier.init(v_empty.index(i), 2)
    mbarrier.init(zeroed, 1)
    fence_async_shared()

    gl.warp_specialize(
        [
            (consume, (
                q, out, lse, kept, n, first, blocks, skipped, q_sl, o_sl, scale_log2,
                q_tiles.index(0), k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, zeroed,
                D, BLOCK_M, BLOCK_N, STAGES, STRIP,
            )),
            (consume, (
                q, out, lse, kept, n, first + 64, blocks, skipped, q_sl, o_sl, scale_log2,
                q_tiles.index(1), k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, zeroed,
                D, BLOCK_M, BLOCK_N, STAGES, STRIP,
            )),
            (produce, (
                k, v, out, kept, n, blocks, zero_first, zero_last, k_sl, v_sl, o_sl,
                k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, zeroed,
                D, BLOCK_N, STAGES, STRIP,
            )),
        ],
        [4, 4],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
