"""The part of the wide Hopper kernel that computes, one warpgroup for 64 rows of each tile, in Gluon.

As hopper_attend_device.py, whose maxima, masks and second turns it shares, for heads of 256: a step has one key block of 64, so
that the 128 registers of a thread's results, its scores and its weights fit; the own keys are two steps. A step's keys are given
back before its product with values ends, as half of the shared memory for them is all there is.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from tsa_compile.kernels.attend.pages.hopper_attend_device import LOWEST, SHIFT, hide, hide_future, store_tile
from tsa_compile.kernels.attend.pages.hopper_info_device import read_info
from tsa_compile.kernels.common.hopper_device import advance, row_maximum
from tsa_compile.kernels.common.lanes_device import HALF, by_lane, sum_in_lane

KEYS = gl.constexpr(64)  # of a step
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))


@gluon.jit
def attend_step(
    half: gl.constexpr, q_tile, k_tiles, v_tiles, real, k_full, k_empty, v_full, v_empty, k_stage, k_parity, v_stage, v_parity,
    acc, p, row_max, lane_sum, more, ahead, scale_log2,
    K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, OWN: gl.constexpr, MASKED: gl.constexpr, ONLINE: gl.constexpr,
):  # fmt: skip
    """One step of `attend`: its softmax runs under the product of the step before with values.

    more: another step follows. OWN: the keys are own ones, the first `ahead` positions before the tile's first row. ONLINE:
    `row_max` rises with the scores, and what was summed so far is scaled to it. Else it stays.
    """
    no_scores = gl.zeros([HALF, KEYS], gl.float32, layout=SCORES)
    scores = warpgroup_mma(q_tile, k_tiles.index(k_stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_tiles.index(v_stage), acc, use_acc=not OWN, is_async=True)
    scores = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        scores = hide(scores, real.index(k_stage))
    if OWN:
        scores = hide_future(scores, half, ahead)
    if ONLINE:
        new_max = gl.maximum(row_max, row_maximum(scores) * scale_log2)
        shrink = gl.exp2(row_max - new_max)
        row_max = new_max
        lane_sum *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, lane_sum.type.layout)), 1)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(row_max, 1))
    lane_sum += sum_in_lane(by_lane(weights))
    new_p = gl.convert_layout(weights.to(p.dtype), p.type.layout)
    mbarrier.arrive(k_empty.index(k_stage))
    # The waits for the next step stand here because they are branches: see hopper_attend_device.py.
    k_stage, k_parity = advance(k_stage, k_parity, K_STAGES)
    next_stage, next_parity = advance(v_stage, v_parity, V_STAGES)
    mbarrier.wait(k_full.index(k_stage), k_parity, pred=more)
    mbarrier.wait(v_full.index(next_stage), next_parity)
    acc, p, new_p = warpgroup_mma_wait(0, deps=[acc, p, new_p])
    mbarrier.arrive(v_empty.index(v_stage))
    if ONLINE:
        acc *= gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout)), 1)
    return acc, new_p, row_max, lane_sum, k_stage, k_parity, next_stage, next_parity


@gluon.jit
def attend(
    half: gl.constexpr, q_tile, k_tiles, v_tiles, real, k_full, k_empty, v_full, v_empty, blocks, masked, online, ahead,
    k_stage, k_parity, v_stage, v_parity, scale_log2,
    dtype: gl.constexpr, D: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
):  # fmt: skip
    """Softmax of 64 rows over `blocks` steps, of which the first `masked` are masked, and the first `online` raise the maximum;
    2 <= masked <= online <= blocks. Results, the rows' maxima and sums, and both rings' next stages."""
    out_mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    no_scores = gl.zeros([HALF, KEYS], gl.float32, layout=SCORES)
    acc = gl.zeros([HALF, D], gl.float32, layout=out_mma)
    shift: gl.constexpr = SHIFT if dtype == gl.float16 else 0.0

    mbarrier.wait(k_full.index(k_stage), k_parity)
    scores = warpgroup_mma(q_tile, k_tiles.index(k_stage).permute((1, 0)), no_scores, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[scores])
    scores = hide_future(hide(scores, real.index(k_stage)), half, ahead)
    mbarrier.arrive(k_empty.index(k_stage))
    row_max = gl.maximum(row_maximum(scores) * scale_log2 + shift, LOWEST)
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(row_max, 1))
    lane_sum = sum_in_lane(by_lane(weights))
    p = gl.convert_layout(weights.to(dtype), gl.DotOperandLayout(0, out_mma, 2))
    k_stage, k_parity = advance(k_stage, k_parity, K_STAGES)
    mbarrier.wait(k_full.index(k_stage), k_parity)
    mbarrier.wait(v_full.index(v_stage), v_parity)

    acc, p, row_max, lane_sum, k_stage, k_parity, v_stage, v_parity = attend_step(
        half, q_tile, k_tiles, v_tiles, real, k_full, k_empty, v_full, v_empty, k_stage, k_parity, v_stage, v_parity,
        acc, p, row_max, lane_sum, blocks > 2, ahead - KEYS, scale_log2, K_STAGES, V_STAGES, True, True, True,
    )  # fmt: skip
    for i in range(2, masked):
        acc, p, row_max, lane_sum, k_stage, k_parity, v_stage, v_parity = attend_step(
            half, q_tile, k_tiles, v_tiles, real, k_full, k_empty, v_full, v_empty, k_stage, k_parity, v_stage, v_parity,
            acc, p, row_max, lane_sum, i + 1 < blocks, 0, scale_log2, K_STAGES, V_STAGES, False, True, True,
        )  # fmt: skip
    for i in range(masked, online):
        acc, p, row_max, lane_sum, k_stage, k_parity, v_stage, v_parity = attend_step(
            half, q_tile, k_tiles, v_tiles, real, k_full, k_empty, v_full, v_empty, k_stage, k_parity, v_stage, v_parity,
            acc, p, row_max, lane_sum, i + 1 < blocks, 0, scale_log2, K_STAGES, V_STAGES, False, False, True,
        )  # fmt: skip
    for i in range(online, blocks):
        acc, p, row_max, lane_sum, k_stage, k_parity, v_stage, v_parity = attend_step(
            half, q_tile, k_tiles, v_tiles, real, k_full, k_empty, v_full, v_empty, k_stage, k_parity, v_stage, v_parity,
            acc, p, row_max, lane_sum, i + 1 < blocks, 0, scale_log2, K_STAGES, V_STAGES, False, False, False,
        )  # fmt: skip

    acc = warpgroup_mma(p, v_tiles.index(v_stage), acc, is_async=True)
    row_sum = gl.convert_layout(gl.sum(lane_sum, 1), gl.SliceLayout(1, SCORES))
    acc, p = warpgroup_mma_wait(0, deps=[acc, p])
    mbarrier.arrive(v_empty.index(v_stage))
    v_stage, v_parity = advance(v_stage, v_parity, V_STAGES)
    inverse = gl.where(row_sum > 0, 1.0 / row_sum, 0.0)  # a row without keys is zero
    acc = acc * gl.expand_dims(gl.convert_layout(inverse, gl.SliceLayout(1, out_mma)), 1)
    return acc, row_max, row_sum, k_stage, k_parity, v_stage, v_parity


@gluon.jit
def attend_tiles(
    half: gl.constexpr, out, lse, o_sb, o_sh, o_sl, heads, q_len, scale_log2, info, over, real, q_tile, k_tiles, v_tiles,
    barriers, D: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, LSE: gl.constexpr,
):  # fmt: skip
    """One half of the rows of each tile, until a tile without steps is announced. Its queries' place takes its results."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, announced, done = barriers
    dtype: gl.constexpr = out.dtype.element_ty
    k_stage, k_parity, v_stage, v_parity = 0, 0, 0, 0
    served = 0
    own_rows = q_tile.slice(half * HALF, HALF)
    mbarrier.wait(announced.index(0), 0)
    blocks = read_info(info.index(0), 0)
    while blocks > 0:
        turn = served % 2
        told = info.index(turn)
        mbarrier.wait(q_full, served & 1)
        acc, row_max, row_sum, k_stage, k_parity, v_stage, v_parity = attend(
            half, own_rows, k_tiles, v_tiles, real, k_full, k_empty, v_full, v_empty, blocks, read_info(told, 1),
            read_info(told, 2), read_info(told, 6), k_stage, k_parity, v_stage, v_parity, scale_log2, dtype, D,
            K_STAGES, V_STAGES,
        )  # fmt: skip
        store_tile(
            half, acc, row_max, row_sum, own_rows, over.index(turn), told, out, lse, o_sb, o_sh, o_sl, heads, q_len, D, LSE
        )
        fence_async_shared()  # what was stored there comes before the next queries
        mbarrier.arrive(q_empty)
        mbarrier.arrive(done.index(turn))
        served += 1
        mbarrier.wait(announced.index(served % 2), (served // 2) & 1)
        blocks = read_info(info.index(served % 2), 0)
