"""Scores by the last queries for Hopper, in Gluon (Triton's explicit dialect): the heads of a program from one read of K a pass.

Warp-specialised: one warpgroup copies key tiles to a ring (hopper_ring_device.py), two compute (hopper_passes_device.py), half
of a tile's rows each, and wait for tiles only, not for each other, so that one's maxima and sums run under the other's
exponentials.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tsa_compile.kernels.common.gather_device import barrier
from tsa_compile.kernels.score.last_queries.hopper_passes_device import lse_pass, mean_pass
from tsa_compile.kernels.score.last_queries.hopper_ring_device import (
    BLOCK,
    allocate_barriers,
    allocate_tiles,
    copy_tiles,
    row_extent,
)

LENGTHS = ("heads", "kv_heads", "q_len", "k_len", "last_queries", "splits", "span")
COMPUTE_REGISTERS = gl.constexpr(232)
COPY_REGISTERS = gl.constexpr(40)


@gluon.jit
def compute(
    half: gl.constexpr, q_tiles, k_tiles, lse_tiles, q_full, full, empty, part_max, part_sum, through, mean,
    base, splits, start, tiles, tiles_again, length, rows, last_queries, k_len, stop, stop_again, scale_log2,
    HEADS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, LSE: gl.constexpr, MEAN: gl.constexpr,
):  # fmt: skip
    """A part that computes: half of the queries in the first pass, half of each tile's keys in the second."""
    mbarrier.wait(q_full, 0, pred=tiles + tiles_again > 0)
    if LSE:
        lse_pass(
            half, q_tiles, k_tiles, full, empty, part_max, part_sum, base, splits, start, tiles, length, rows, last_queries, stop,
            scale_log2, HEADS, STAGES,
        )  # fmt: skip
    if LSE and MEAN:
        barrier()  # all of this part's stores come before its sign that it is through
        seen = gl.atomic_add(through, 1, sem="acq_rel") + 1
        if tiles_again > 0:
            while seen < 2 * splits:
                seen = gl.atomic_add(through, 0, sem="acquire")
        barrier()
    if MEAN:  # noqa: SIM102 - settled when it is compiled
        if tiles_again > 0:
            mean_pass(
                half, q_tiles, k_tiles, lse_tiles, full, empty, part_max, part_sum, mean, base, splits, start, tiles,
                tiles + tiles_again, stop_again, rows, last_queries, k_len, scale_log2, HEADS, STAGES, SPLITS,
            )  # fmt: skip


@gluon.jit(do_not_specialize=LENGTHS)
def score_hopper_kernel(
    q, k, part_max, part_sum, through, mean, order, ranks, q_sb, q_sh, q_sl, k_sb, k_sh, k_sl,
    heads, kv_heads, q_len, k_len, last_queries, splits, span, scale_log2,
    D: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr, SPLITS: gl.constexpr, PADDED: gl.constexpr,
    LSE: gl.constexpr, MEAN: gl.constexpr,
):  # fmt: skip
    """Grid (B * H / HEADS, splits). `lse_pass` of a span of keys, `mean_pass` of it, or both in one launch: then the grid is
    cooperative, and the programs of the same heads wait for each other between the passes.

    through: int32, zero, one for each program_id(0): how many parts of them are through with the first pass.
    """
    programs = heads // HEADS
    b, h = (gl.program_id(0) // programs).to(gl.int64), (gl.program_id(0) % programs * HEADS).to(gl.int64)
    length, rows = row_extent(ranks, b, q_len, k_len, last_queries, PADDED)
    start = gl.program_id(1) * span
    stop, stop_again = gl.minimum(start + span, length), gl.minimum(start + span, length - last_queries)
    some = (rows > 0).to(gl.int32)
    tiles = some * gl.cdiv(gl.maximum(stop - start, 0), BLOCK) if LSE else 0
    tiles_again = some * gl.cdiv(gl.maximum(stop_again - start, 0), BLOCK) if MEAN else 0
    q_tiles, k_tiles = allocate_tiles(q.dtype.element_ty, D, HEADS, STAGES)
    lse_tiles = gl.allocate_shared_memory(gl.float32, [2 * HEADS, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full, full, empty = allocate_barriers(STAGES)
    q += b * q_sb + h * q_sh
    k += b * k_sb + (h * kv_heads // heads) * k_sh
    order += b * k_len
    through += gl.program_id(0)
    base = b * heads + h
    gl.warp_specialize(
        [
            (compute, (
                0, q_tiles, k_tiles, lse_tiles, q_full, full, empty, part_max, part_sum, through, mean,
                base, splits, start, tiles, tiles_again, length, rows, last_queries, k_len, stop, stop_again, scale_log2,
                HEADS, STAGES, SPLITS, LSE, MEAN,
            )),
            (compute, (
                1, q_tiles, k_tiles, lse_tiles, q_full, full, empty, part_max, part_sum, through, mean,
                base, splits, start, tiles, tiles_again, length, rows, last_queries, k_len, stop, stop_again, scale_log2,
                HEADS, STAGES, SPLITS, LSE, MEAN,
            )),
            (copy_tiles, (
                q, q_sh, q_sl, k, k_sl, order, start, tiles, tiles_again, length, rows, k_len - q_len,
                q_tiles, k_tiles, q_full, full, empty, D, HEADS, STAGES, PADDED,
            )),
        ],
        [4, 4],
        [COMPUTE_REGISTERS, COPY_REGISTERS],
    )  # fmt: skip
