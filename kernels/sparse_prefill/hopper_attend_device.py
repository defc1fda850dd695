"""The part of the Hopper prefill that computes, one warpgroup for 64 queries of each tile, in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from tsa_compile.kernels.gather_device import row_layout, row_pointers
from tsa_compile.kernels.lanes_device import HALF, by_lane, sum_in_lane
from tsa_compile.kernels.sparse_prefill.hopper_ring_device import BLOCK, WARPS, advance, read_info

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))


@gluon.jit
def row_maximum(scores):
    """By pairs first, which shortens the chain of maxima that wait for each other."""
    return gl.convert_layout(gl.max(gl.max(gl.max(by_lane(scores), 3), 1), 1), gl.SliceLayout(1, SCORES))


@gluon.jit
def mask_scores(scores, half: gl.constexpr):
    """The block on the diagonal: a query sees keys up to its own."""
    keys = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, SCORES))
    queries = half * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, SCORES))
    return gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(queries, 1), scores, float("-inf"))


@gluon.jit
def attend(
    half: gl.constexpr, q_tile, k_tiles, v_tiles, full, empty, blocks, stage, parity, scale_log2, dtype: gl.constexpr,
    D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Online softmax of 64 rows over `blocks` key blocks, the log-sum-exp in base 2, and the ring's last stage, which has no keys
    and is not yet given back.

    The first product of a block runs together with the second product of the block before, and the softmax under them.
    """
    out_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, out_mma, 2)
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
    p = gl.convert_layout(weights.to(dtype), p_layout)
    stage, parity = advance(stage, parity, STAGES)
    mbarrier.wait(full.index(stage), parity)

    for _ in range(1, blocks):
        scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
        acc = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
        scores = warpgroup_mma_wait(1, deps=[scores])
        new_max = gl.maximum(row_max, row_maximum(scores) * scale_log2)
        shrink = gl.exp2(row_max - new_max)
        weights = gl.exp2(scores * scale_log2 - gl.expand_dims(new_max, 1))
        lane_shrink = gl.convert_layout(shrink, gl.SliceLayout(1, lane_sum.type.layout))
        lane_sum = lane_sum * gl.expand_dims(lane_shrink, 1) + sum_in_lane(by_lane(weights))
        row_max = new_max
        new_p = gl.convert_layout(weights.to(dtype), p_layout)
        # The wait for the next step stands here because it is a branch: ptxas would otherwise wait for the product first
        # and only then compute the softmax that is to hide it.
        next_stage, next_parity = advance(stage, parity, STAGES)
        mbarrier.wait(full.index(next_stage), next_parity)
        acc, p, new_p = warpgroup_mma_wait(0, deps=[acc, p, new_p])
        mbarrier.arrive(empty.index(stage))
        acc = acc * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, out_mma)), 1)
        p = new_p
        stage, parity = next_stage, next_parity

    acc = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
    row_sum = gl.convert_layout(gl.sum(lane_sum, 1), gl.SliceLayout(1, SCORES))
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    acc = acc * gl.expand_dims(gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, out_mma)), 1)
    return acc, row_max + gl.log2(row_sum), stage, parity


@gluon.jit
def attend_tiles(
    half: gl.constexpr, out, lse, o_sb, o_sh, o_sl, heads, q_len, scale_log2, info, rows, q_tile, k_tiles, v_tiles, barriers,
    D: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr,
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
        mbarrier.wait(q_full, served & 1)
        acc, log2_sum, stage, parity = attend(
            half,
            q_tile.slice(half * HALF, HALF),
            k_tiles,
            v_tiles,
            full,
            empty,
            blocks,
            stage,
            parity,
            scale_log2,
            dtype,
            D,
            STAGES,
        )
        # Through shared memory, so that whole rows are stored.
        staged = k_tiles.index(stage).slice(half * HALF, HALF)
        staged.store(acc.to(dtype))
        b, h = read_info(info.index(turn), 1).to(gl.int64), read_info(info.index(turn), 2).to(gl.int64)
        own = rows.index(turn).slice(half * HALF, HALF)
        row = own.load(gl.SliceLayout(1, layout))
        if STRIP:
            ln2: gl.constexpr = 0.6931471805599453
            lse_row = own.load(log2_sum.type.layout)
            gl.store(lse + (b * heads + h) * q_len + lse_row, log2_sum * ln2, mask=lse_row >= 0)
        else:
            mbarrier.wait(zeroed.index(turn), turn_parity)
        o_at = row_pointers(out + b * o_sb + h * o_sh, row, o_sl, D, WARPS)
        gl.store(o_at, staged.load(layout), mask=gl.expand_dims(row >= 0, 1))
        mbarrier.arrive(empty.index(stage))
        mbarrier.arrive(done.index(turn))
        stage, parity = advance(stage, parity, STAGES)
        served += 1
        mbarrier.wait(announced.index(served % 2), (served // 2) & 1)
        blocks = read_info(info.index(served % 2), 0)
