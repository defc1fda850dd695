"""Attention over kept key blocks for Hopper: persistent and warp-specialised, in Gluon (Triton's explicit dialect).

The loop is that of the prefill over kept tokens (attend/tokens/hopper_device.py): one warp loads (hopper_load_device.py), two
warpgroups compute 64 rows each (hopper_attend_device.py), and a step of the ring brings the keys of its own 128 and the values of
the step before. Keys come by the tensor memory accelerator from where they lie: step 0 has the row block's own 128 keys, and
each step after it any two kept key blocks of 64, so that blocks need not be neighbours.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from tsa_compile.kernels.attend.pages.hopper_attend_device import attend_tiles
from tsa_compile.kernels.attend.pages.hopper_load_device import load_tiles
from tsa_compile.kernels.common.hopper_device import BLOCK

LENGTHS = ("m_sb", "table_sb", "block", "heads", "kv_heads", "lists", "q_len", "k_len", "row_blocks", "words", "total", "section")
LOAD_REGISTERS = gl.constexpr(48)
ATTEND_REGISTERS = gl.constexpr(232)


@gluon.jit
def allocate_barriers(STAGES: gl.constexpr):
    """(a tile's queries are there; they have been read; each stage of the ring is filled; it has been read) and, for every other
    tile, (it is announced; it is done)."""
    layout: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [1], layout)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], layout)
    announced = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    done = gl.allocate_shared_memory(gl.int64, [2, 1], layout)
    mbarrier.init(q_full, 1)
    mbarrier.init(q_empty, 2)  # the warpgroups that compute
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), 1)
        mbarrier.init(empty.index(i), 2)
    for i in gl.static_range(2):
        mbarrier.init(announced.index(i), 1)
        mbarrier.init(done.index(i), 2)
    fence_async_shared()
    return q_full, q_empty, full, empty, announced, done


@gluon.jit(do_not_specialize=LENGTHS)
def key_block_attention_hopper_kernel(
    q, k, v, out, lse, bits, starts, lengths, key_mask, holes, table, queue,
    o_sb, o_sh, o_sl, m_sb, table_sb, block, heads, kv_heads, lists, q_len, k_len, row_blocks, words, total, section, scale_log2,
    D: gl.constexpr, STAGES: gl.constexpr, START: gl.constexpr, LENGTH: gl.constexpr, MASK: gl.constexpr, LSE: gl.constexpr,
    TABLE: gl.constexpr,
):  # fmt: skip
    """`key_block_attention_kernel` (device.py) by one program a multiprocessor.

    q, k, v: descriptors of [B, heads, length, D] by pieces [1, 1, BLOCK, D] of q, and [1, 1, 64, 64] of k and v. holes: int32
    [B], 1 where the mask hides keys between the first and the last. table: int32 [B, P], rows table_sb apart; TABLE: position j
    is row j % block of entry table[b, j // block] of k and v. queue: an int32 counter of tiles, zero.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    PIECES: gl.constexpr = 2 * (D // 64)  # of a tile [BLOCK, D]: panels of 64 columns, each with two key blocks
    q_tile = gl.allocate_shared_memory(dtype, [BLOCK, D], tile_layout)
    k_pieces = gl.allocate_shared_memory(dtype, [STAGES * PIECES, 64, 64], tile_layout)
    v_pieces = gl.allocate_shared_memory(dtype, [STAGES * PIECES, 64, 64], tile_layout)
    real = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK], flat)  # which keys of a masked step are
    over = gl.allocate_shared_memory(gl.int8, [2, BLOCK], flat)  # which rows of a tile are to be computed again
    info = gl.allocate_shared_memory(gl.int32, [2, 8], flat)
    barriers = allocate_barriers(STAGES)
    k_tiles = k_pieces._reinterpret(dtype, [STAGES, BLOCK, D], tile_layout)
    v_tiles = v_pieces._reinterpret(dtype, [STAGES, BLOCK, D], tile_layout)

    gl.warp_specialize(
        [
            (attend_tiles, (
                0, out, lse, o_sb, o_sh, o_sl, heads, q_len, scale_log2, info, over, real, q_tile, k_tiles, v_tiles, barriers,
                D, STAGES, LSE,
            )),
            (attend_tiles, (
                1, out, lse, o_sb, o_sh, o_sl, heads, q_len, scale_log2, info, over, real, q_tile, k_tiles, v_tiles, barriers,
                D, STAGES, LSE,
            )),
            (load_tiles, (
                q, k, v, bits, starts, lengths, key_mask, holes, table, queue, m_sb, table_sb, block, heads, kv_heads, lists,
                q_len, k_len, row_blocks, words, total, section, info, over, real, q_tile, k_pieces, v_pieces, barriers,
                D, STAGES, START, LENGTH, MASK, TABLE,
            )),
        ],
        [4, 1],
        [ATTEND_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
