"""Attention over kept key blocks for Hopper and heads of 256: hopper_device.py with a key block of 64 a step, in Gluon.

Queries take 64 KiB of shared memory, and a key block's keys or values 32 KiB: two of keys and three of values fit. Keys are given
back as soon as their scores are there, so that two of them are 1.4 steps ahead.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from tsa_compile.kernels.attend.pages.hopper_wide_attend_device import attend_tiles
from tsa_compile.kernels.attend.pages.hopper_wide_load_device import load_tiles
from tsa_compile.kernels.common.hopper_device import BLOCK

LENGTHS = ("m_sb", "table_sb", "block", "heads", "kv_heads", "lists", "q_len", "k_len", "row_blocks", "words", "total", "section")
LOAD_REGISTERS = gl.constexpr(40)
ATTEND_REGISTERS = gl.constexpr(232)
KEYS = gl.constexpr(64)


@gluon.jit
def allocate(number: gl.constexpr, arrivals: gl.constexpr):
    """Barriers, each for so many arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [number, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(number):
        mbarrier.init(bars.index(i), arrivals)
    return bars


@gluon.jit(do_not_specialize=LENGTHS)
def key_block_attention_wide_kernel(
    q, k, v, out, lse, bits, starts, lengths, key_mask, holes, table, queue,
    o_sb, o_sh, o_sl, m_sb, table_sb, block, heads, kv_heads, lists, q_len, k_len, row_blocks, words, total, section, scale_log2,
    D: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, START: gl.constexpr, LENGTH: gl.constexpr,
    MASK: gl.constexpr, LSE: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    """`key_block_attention_hopper_kernel` by steps of one key block; k and v: descriptors by pieces [1, 1, KEYS, D]."""
    dtype: gl.constexpr = out.dtype.element_ty
    tile_layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q_tile = gl.allocate_shared_memory(dtype, [BLOCK, D], tile_layout)  # a tile's results, too
    k_tiles = gl.allocate_shared_memory(dtype, [K_STAGES, KEYS, D], tile_layout)
    v_tiles = gl.allocate_shared_memory(dtype, [V_STAGES, KEYS, D], tile_layout)
    real = gl.allocate_shared_memory(gl.int8, [K_STAGES, KEYS], flat)  # which keys of a masked step are
    over = gl.allocate_shared_memory(gl.int8, [2, BLOCK], flat)  # which rows of a tile are to be computed again
    info = gl.allocate_shared_memory(gl.int32, [2, 8], flat)
    # A tile's queries are there; its results have left; keys, values of a stage are there; they have been read; and, for every
    # other tile, it is announced; it is done. Two: the warpgroups that compute.
    q_full, q_empty = allocate(1, 1).index(0), allocate(1, 2).index(0)
    k_full, k_empty = allocate(K_STAGES, 1), allocate(K_STAGES, 2)
    v_full, v_empty = allocate(V_STAGES, 1), allocate(V_STAGES, 2)
    announced, done = allocate(2, 1), allocate(2, 2)
    fence_async_shared()
    barriers = (q_full, q_empty, k_full, k_empty, v_full, v_empty, announced, done)
    gl.warp_specialize(
        [
            (attend_tiles, (
                0, out, lse, o_sb, o_sh, o_sl, heads, q_len, scale_log2, info, over, real, q_tile, k_tiles, v_tiles, barriers,
                D, K_STAGES, V_STAGES, LSE,
            )),
            (attend_tiles, (
                1, out, lse, o_sb, o_sh, o_sl, heads, q_len, scale_log2, info, over, real, q_tile, k_tiles, v_tiles, barriers,
                D, K_STAGES, V_STAGES, LSE,
            )),
            (load_tiles, (
                q, k, v, bits, starts, lengths, key_mask, holes, table, queue, m_sb, table_sb, block, heads, kv_heads, lists,
                q_len, k_len, row_blocks, words, total, section, info, over, real, q_tile, k_tiles, v_tiles, barriers,
                D, K_STAGES, V_STAGES, START, LENGTH, MASK, TABLE,
            )),
        ],
        [4, 1],
        [ATTEND_REGISTERS, LOAD_REGISTERS],
    )  # fmt: skip
