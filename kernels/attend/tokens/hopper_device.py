"""The prefill over kept tokens for Hopper: persistent and warp-specialised, in Gluon (Triton's explicit dialect).

As in FlashAttention-3 (arXiv 2407.08608), one warpgroup loads (hopper_load_device.py) and two compute, 64 rows each
(hopper_attend_device.py). A tile of BLOCK kept queries passes over its key blocks from the diagonal down to the first, so that
only the first one is masked. It takes steps 0 to blocks, through a ring of shared memory: step i brings the keys of its i-th
block and the values of the block before, as these are multiplied together.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from tsa_compile.kernels.attend.tokens.hopper_attend_device import attend_tiles
from tsa_compile.kernels.attend.tokens.hopper_load_device import load_tiles
from tsa_compile.kernels.common.hopper_device import BLOCK, WARPS

LENGTHS = ("heads", "kv_heads", "lists", "q_len", "k_len", "total", "tiles", "section", "i_sb", "i_sg", "queued")
LOAD_REGISTERS = gl.constexpr(40)
ATTEND_REGISTERS = gl.constexpr(232)


@gluon.jit
def allocate_barriers(COPIES: gl.constexpr, STAGES: gl.constexpr):
    """(the queries are there; each stage of the ring is filled; each has been read) and, for every other tile, (it is announced;
    its queries' rows have been read; the rows between them are zero). COPIES: arrivals that fill a stage."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    announced = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    done = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    zeroed = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    mbarrier.init(q_full, 32 * WARPS)  # the threads that copy, each when its copies have arrived
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), COPIES)
        mbarrier.init(empty.index(i), 2)  # the warpgroups that compute
    for i in gl.static_range(2):
        mbarrier.init(announced.index(i), 1)
        mbarrier.init(done.index(i), 2)
        mbarrier.init(zeroed.index(i), 1)
    fence_async_shared()
    return q_full, full, empty, announced, done, zeroed


@gluon.jit(do_not_specialize=LENGTHS)
def sparse_prefill_hopper_kernel(
    q, k, v, out, lse, indices, counts, queue,
    q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, o_sb, o_sh, o_sl, i_sb, i_sg,
    heads, kv_heads, lists, q_len, k_len, total, tiles, section, queued, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """`sparse_prefill_kernel` (device.py) by one program a multiprocessor; rows contiguous and 16-byte aligned.

    PACKED: k and v are descriptors of the kept rows of each list, [B * lists * Lk, D], by blocks of BLOCK rows; finite up to the
    end of the block with the last. Their strides are not read. `queued`: tiles are taken from a queue, whose int32 counter is
    zero.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    QUICK: gl.constexpr = dtype == gl.bfloat16  # float16 ends at 65504
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tile = gl.allocate_shared_memory(dtype, [BLOCK, D], tile_layout)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK, D], tile_layout)
    positions = gl.allocate_shared_memory(gl.int32, [2, BLOCK], flat)
    rows = gl.allocate_shared_memory(gl.int32, [2, BLOCK], flat)  # of the queries of this tile and the next
    info = gl.allocate_shared_memory(gl.int32, [2, 4], flat)
    barriers = allocate_barriers(1 if PACKED else 32 * WARPS, STAGES)

    gl.warp_specialize(
        [
            (attend_tiles, (
                0, out, lse, o_sb, o_sh, o_sl, heads, q_len, scale_log2, info, rows, q_tile, k_tiles, v_tiles, barriers,
                D, STAGES, STRIP, QUICK,
            )),
            (attend_tiles, (
                1, out, lse, o_sb, o_sh, o_sl, heads, q_len, scale_log2, info, rows, q_tile, k_tiles, v_tiles, barriers,
                D, STAGES, STRIP, QUICK,
            )),
            (load_tiles, (
                q, k, v, out, indices, counts, q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, o_sb, o_sh, o_sl, i_sb, i_sg,
                heads, kv_heads, lists, q_len, k_len, total, tiles, section, gl.num_programs(0), queue, queued,
                positions, info, rows, q_tile, k_tiles, v_tiles, barriers, D, STAGES, STRIP, PACKED, QUICK,
            )),
        ],
        [4, 4],
        [ATTEND_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
