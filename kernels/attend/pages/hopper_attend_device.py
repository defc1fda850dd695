"""The part of the Hopper kernel that computes, one warpgroup for 64 rows of each tile, in Gluon.

As in the prefill over kept tokens (attend/tokens/hopper_attend_device.py), the maximum of a row's first steps serves all its
steps, and a tile whose sums grow too large for it is announced a second time, with a running maximum. The first steps are the
row's own keys and those of the first kept block, where sinks lie; float16, which ends at 65504, adds headroom of SHIFT digits.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from tsa_compile.kernels.attend.pages.hopper_info_device import read_info
from tsa_compile.kernels.common.gather_device import row_layout, row_pointers
from tsa_compile.kernels.common.hopper_device import BLOCK, SCORES, SUM_LIMIT, WARPS, advance, row_maximum
from tsa_compile.kernels.common.lanes_device import HALF, by_lane, sum_in_lane

SHIFT = gl.constexpr(4.0)  # binary digits that float16 weights lie below 1
HALF_LIMIT = gl.constexpr(2.0**15)  # of a row's sum, and so of each weight, in float16
LOWEST = gl.constexpr(-1.0e30)  # a maximum of no scores: finite


@gluon.jit
def hide(scores, real):
    """Scores [HALF, N] of the step's keys that are real, int8 [N] in shared memory; -inf of others."""
    seen = real.load(gl.SliceLayout(0, scores.type.layout)) != 0
    return gl.where(gl.expand_dims(seen, 0), scores, float("-inf"))


@gluon.jit
def hide_future(scores, half: gl.constexpr, ahead):
    """Scores of own keys, the first of which lies `ahead` positions before the tile's first row: a row sees up to itself."""
    keys = gl.arange(0, scores.shape[1], layout=gl.SliceLayout(0, scores.type.layout))
    rows = half * HALF + ahead + gl.arange(0, HALF, layout=gl.SliceLayout(1, scores.type.layout))
    return gl.where(gl.expand_dims(keys, 0) <= gl.expand_dims(rows, 1), scores, float("-inf"))


@gluon.jit
def attend_step(
    q_tile, k_tiles, v_tiles, real, full, empty, stage, parity, acc, p, row_max, lane_sum, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """One step of `attend`: its softmax runs under the second product of the step before.

    ONLINE: `row_max` rises with the scores, and what was summed so far is scaled to it. Else it stays.
    """
    out_mma: gl.constexpr = acc.type.layout
    no_scores = gl.zeros([HALF, BLOCK], gl.float32, layout=SCORES)
    scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        scores = hide(scores, real.index(stage))
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
    half: gl.constexpr, q_tile, k_tiles, v_tiles, real, q_empty, full, empty, blocks, masked, online, ahead, stage, parity,
    scale_log2, dtype: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Softmax of 64 rows over `blocks` steps, of which the first `masked` are masked, and the first `online` raise the maximum;
    1 <= masked <= online <= blocks. Results, the rows' maxima and sums; and the ring's last stage, which has no keys and is not
    yet given back."""
    out_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    no_scores = gl.zeros([HALF, BLOCK], gl.float32, layout=SCORES)
    acc = gl.zeros([HALF, D], gl.float32, layout=out_mma)
    shift: gl.constexpr = SHIFT if dtype == gl.float16 else 0.0

    mbarrier.wait(full.index(stage), parity)
    scores = warpgroup_mma(q_tile, k_tiles.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    scores = hide_future(hide(scores, real.index(stage)), half, ahead)
    mbarrier.arrive(empty.index(stage))
    row_max = gl.maximum(row_maximum(scores) * scale_log2 + shift, LOWEST)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(row_max, 1))
    lane_sum = sum_in_lane(by_lane(weights))
    p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, out_mma, 2))
    stage, parity = advance(stage, parity, STAGES)
    mbarrier.wait(full.index(stage), parity)

    for _ in range(1, masked):
        acc, p, row_max, lane_sum, stage, parity = attend_step(
            q_tile, k_tiles, v_tiles, real, full, empty, stage, parity, acc, p, row_max, lane_sum, scale_log2,
            D, STAGES, True, True,
        )  # fmt: skip
    for _ in range(masked, online):
        acc, p, row_max, lane_sum, stage, parity = attend_step(
            q_tile, k_tiles, v_tiles, real, full, empty, stage, parity, acc, p, row_max, lane_sum, scale_log2,
            D, STAGES, False, True,
        )  # fmt: skip
    for _ in range(online, blocks):
        acc, p, row_max, lane_sum, stage, parity = attend_step(
            q_tile, k_tiles, v_tiles, real, full, empty, stage, parity, acc, p, row_max, lane_sum, scale_log2,
            D, STAGES, False, False,
        )  # fmt: skip

    mbarrier.arrive(q_empty)
    acc = warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
    row_sum = gl.convert_layout(gl.sum(lane_sum, 1), gl.SliceLayout(1, SCORES))
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    inverse = gl.where(row_sum > 0, 1.0 / row_sum, 0.0)  # a row without keys is zero
    acc = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, out_mma)), 1)
    return acc, row_max, row_sum, stage, parity


@gluon.jit
def store_tile(
    half: gl.constexpr, acc, row_max, row_sum, staged, over, told, out, lse, o_sb, o_sh, o_sl, heads, q_len,
    D: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """A tile's results `acc`, and log-sum-exps if LSE, to where `told` says; to `over`, whether a row is to be done again.

    staged: shared memory [HALF, D] that nothing else uses, so that whole rows are stored.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    layout: gl.constexpr = row_layout(D, WARPS)
    limit: gl.constexpr = HALF_LIMIT if dtype == gl.float16 else SUM_LIMIT
    staged.store(acc.to(dtype))
    b, h = read_info(told, 3).to(gl.int64), read_info(told, 4).to(gl.int64)
    first_row = read_info(told, 5) + half * HALF
    if LSE:
        ln2: gl.constexpr = 0.6931471805599453
        lse_row = first_row + gl.arange(0, HALF, layout=row_sum.type.layout)
        value = (row_max + gl.log2(row_sum)) * ln2
        gl.store(lse + (b * heads + h) * q_len + lse_row, value, mask=(lse_row >= 0) & (lse_row < q_len))
    row = first_row + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    o_at = row_pointers(out + b * o_sb + h * o_sh, row, o_sl, D, WARPS)
    gl.store(o_at, staged.load(layout), mask=gl.expand_dims((row >= 0) & (row < q_len), 1))
    # not below it, or not a number: the tile is to be done again
    over.slice(half * HALF, HALF).store(gl.where(row_sum < limit, 0, 1).to(gl.int8))


@gluon.jit
def attend_tiles(
    half: gl.constexpr, out, lse, o_sb, o_sh, o_sl, heads, q_len, scale_log2, info, over, real, q_tile, k_tiles, v_tiles,
    barriers, D: gl.constexpr, STAGES: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """One half of the rows of each tile, until a tile without steps is announced."""
    q_full, q_empty, full, empty, announced, done = barriers
    dtype: gl.constexpr = out.dtype.element_ty
    stage, parity = 0, 0
    served = 0
    mbarrier.wait(announced.index(0), 0)
    blocks = read_info(info.index(0), 0)
    while blocks > 0:
        turn = served % 2
        told = info.index(turn)
        mbarrier.wait(q_full, served & 1)
        acc, row_max, row_sum, stage, parity = attend(
            half, q_tile.slice(half * HALF, HALF), k_tiles, v_tiles, real, q_empty, full, empty, blocks, read_info(told, 1),
            read_info(told, 2), read_info(told, 6), stage, parity, scale_log2, dtype, D, STAGES,
        )  # fmt: skip
        store_tile(
            half, acc, row_max, row_sum, k_tiles.index(stage).slice(half * HALF, HALF), over.index(turn), told, out, lse,
            o_sb, o_sh, o_sl, heads, q_len, D, LSE,
        )  # fmt: skip
        mbarrier.arrive(empty.index(stage))
        mbarrier.arrive(done.index(turn))
        stage, parity = advance(stage, parity, STAGES)
        served += 1
        mbarrier.wait(announced.index(served % 2), (served // 2) & 1)
        blocks = read_info(info.index(served % 2), 0)
