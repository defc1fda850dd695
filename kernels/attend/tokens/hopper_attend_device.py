"""The part of the Hopper prefill that computes, one warpgroup for 64 queries of each tile, in Gluon.

In bfloat16, whose exponents are float32's, the maximum of a row's first block (the diagonal's) serves all its blocks: weights may
grow above 1, and neither maxima nor rescaling stand between the products, which is a third of the instructions. Where a row's sum
passes SUM_LIMIT or is not a number, the tile is announced a second time, with a running maximum. (FlashDecoding++, arXiv
2311.01282, section 3: a maximum for all, and recomputation where it does not fit.)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from tsa_compile.kernels.attend.tokens.hopper_ring_device import read_info
from tsa_compile.kernels.common.gather_device import row_layout, row_pointers
from tsa_compile.kernels.common.hopper_device import BLOCK, SCORES, SUM_LIMIT, WARPS, advance, row_maximum
from tsa_compile.kernels.common.lanes_device import HALF, by_lane, sum_in_lane


@gluon.jit
def mask_scores(scores, half: gl.constexpr):
    """The block on the diagonal: a query sees keys up to its own."""
    keys = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SCORES))
    queries = half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    return gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(queries, 1), scores, float("-inf"))


@gluon.jit
def attend_block(
    q_tile, k_tiles, v_tiles, full, empty, stage, parity, acc, p, row_max, lane_sum, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """One key block of `attend`: its softmax runs under the second product of the block before.

    ONLINE: `row_max` rises with the scores, and what was summed so far is scaled to it. Else it stays.
    """
    out_mma: gl.constexpr = acc.type.layout
    no_scores = gl.zeros([HALF, BLOCK], gl.float32, layout=SCORES)
    scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if ONLINE:
        new_max = gl.maximum(row_max, row_maximum(scores) * scale_log2)
        shrink = gl.exp2(row_max - new_max)
        row_max = new_max
        lane_sum *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, lane_sum.type.layout)), 1)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(row_max, 1))
    lane_sum += sum_in_lane(by_lane(weights))
    new_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    # The wait for the next step stands here because it is a branch: ptxas would otherwise wait for the product first
    # and only then compute the softmax that is to hide it.
    next_stage, next_parity = advance(stage, parity, STAGES)
    mbarrier.wait(full.index(next_stage), next_parity)
    acc, p, new_p = warpgroup_mma_wait(0, deps=[acc, p, new_p])
    mbarrier.arrive(empty.index(stage))
    if ONLINE:
        acc *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, out_mma)), 1)
    return acc, new_p, row_max, lane_sum, next_stage, next_parity


@gluon.jit
def attend(
    half: gl.constexpr, q_tile, k_tiles, v_tiles, full, empty, blocks, quick, stage, parity, scale_log2, dtype: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Softmax of 64 rows over `blocks` key blocks, online but for the first `quick`, at least one; the rows' maxima and sums; and
    the ring's last stage, which has no keys and is not yet given back."""
    out_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    no_scores = gl.zeros([HALF, BLOCK], gl.float32, layout=SCORES)
    acc = gl.zeros([HALF, D], gl.float32, layout=out_mma)

    mbarrier.wait(full.index(stage), parity)
    scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    mbarrier.arrive(empty.index(stage))
    scores = mask_scores(scores, half)
    row_max = row_maximum(scores) * scale_log2
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(row_max, 1))
    lane_sum = sum_in_lane(by_lane(weights))
    p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, out_mma, 2))
    stage, parity = advance(stage, parity, STAGES)
    mbarrier.wait(full.index(stage), parity)

    for _ in range(1, quick):
        acc, p, row_max, lane_sum, stage, parity = attend_block(
            q_tile, k_tiles, v_tiles, full, empty, stage, parity, acc, p, row_max, lane_sum, scale_log2, D, STAGES, False
        )  # fmt: skip
    for _ in range(quick, blocks):
        acc, p, row_max, lane_sum, stage, parity = attend_block(
            q_tile, k_tiles, v_tiles, full, empty, stage, parity, acc, p, row_max, lane_sum, scale_log2, D, STAGES, True
        )  # fmt: skip

    acc = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
    row_sum = gl.convert_layout(gl.sum(lane_sum, 1), gl.SliceLayout(1, SCORES))
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, out_mma)), 1)
    return acc, row_max, row_sum, stage, parity


@gluon.jit
def attend_tiles(
    half: gl.constexpr, out, lse, o_sb, o_sh, o_sl, heads, q_len, scale_log2, info, rows, q_tile, k_tiles, v_tiles, barriers,
    D: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr, QUICK: gl.constexpr,
):  # fmt: skip
    """One half of the queries of each tile, until a tile without key blocks is announced."""
    q_full, full, empty, announced, done, zeroed = barriers
    dtype: gl.constexpr = out.dtype.element_ty
    layout: gl.constexpr = row_layout(D, WARPS)
    stage, parity = 0, 0
    served = 0
    mbarrier.wait(announced.index(0), 0)
    blocks = read_info(info.index(0), 0)
    while blocks > 0:
        turn, turn_parity = served % 2, (served // 2) & 1
        quick = read_info(info.index(turn), 3)
        mbarrier.wait(q_full, served & 1)
        acc, row_max, row_sum, stage, parity = attend(
            half, q_tile.slice(half * HALF, HALF), k_tiles, v_tiles, full, empty, blocks, quick, stage, parity, scale_log2, dtype,
            D, STAGES,
        )  # fmt: skip
        # Through shared memory, so that whole rows are stored.
        staged = k_tiles.index(stage).slice(half * HALF, HALF)
        staged.store(acc.to(dtype))
        b, h = read_info(info.index(turn), 1).to(gl.int64), read_info(info.index(turn), 2).to(gl.int64)
        own = rows.index(turn).slice(half * HALF, HALF)
        row = own.load(gl.SliceLayout(1, layout))
        if STRIP:
            ln2: gl.constexpr = 0.6931471805599453
            lse_row = own.load(row_sum.type.layout)
            gl.store(lse + (b * heads + h) * q_len + lse_row, (row_max + gl.log2(row_sum)) * ln2, mask=lse_row >= 0)
        else:
            mbarrier.wait(zeroed.index(turn), turn_parity)
        o_at = row_pointers(out + b * o_sb + h * o_sh, row, o_sl, D, WARPS)
        gl.store(o_at, staged.load(layout), mask=gl.expand_dims(row >= 0, 1))
        if QUICK:
            own.store(gl.where(row_sum < SUM_LIMIT, 0, 1))  # not below it, or not a number: the tile is to be done again
        mbarrier.arrive(empty.index(stage))
        mbarrier.arrive(done.index(turn))
        stage, parity = advance(stage, parity, STAGES)
        served += 1
        mbarrier.wait(announced.index(served % 2), (served // 2) & 1)
        blocks = read_info(info.index(served % 2), 0)
