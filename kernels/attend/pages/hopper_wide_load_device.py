"""The part of the wide Hopper kernel that loads, ahead of those that compute. One warp, in Gluon.

As hopper_load_device.py, but keys and values have rings of their own, a key block of 64 a stage: values are needed a step later
and are given back later, so they have the longer ring.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tsa_compile.kernels.attend.pages.hopper_info_device import announce
from tsa_compile.kernels.attend.pages.hopper_load_device import find_tile, if_to_repeat, load_word, next_block, place_of
from tsa_compile.kernels.common.gather_device import barrier
from tsa_compile.kernels.common.hopper_device import BLOCK, advance, load_block

KEYS = gl.constexpr(64)  # of a key block
STEP = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))  # a step's keys by lane


@gluon.jit
def store_real(real, position, first, end, key_mask, MASK: gl.constexpr):
    """Which keys of the key block at `position` are real."""
    at = position + gl.arange(0, KEYS, layout=STEP)
    ok = (at >= first) & (at < end)
    if MASK:
        ok &= gl.load(key_mask + at, mask=ok, other=0) != 0
    real.store(ok.to(gl.int8))
    barrier()  # before the barrier that announces it is armed


@gluon.jit
def load_steps(
    q, k, v, b, h, kv_head, row, own, first, end, bit_row, first_block, blocks, masked, key_mask, real, q_tile, k_tiles, v_tiles,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, served, k_stage, k_parity, v_stage, v_parity, table, block, k_len,
    D: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, MASK: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    """A tile's steps: the own keys' two, from position `own` on, and then the kept key blocks, ascending. Its queries come behind
    the first two steps' keys, as they wait for the results of the tile before. Returns both rings' next stages."""
    SIZE: gl.constexpr = KEYS * D * 2
    w = first_block // 64
    word, coming = load_word(bit_row, w, first_block, own // KEYS), load_word(bit_row, w + 1, first_block, own // KEYS)
    position = own + 0
    v_owner, v_row = b * 0, 0  # of the step before: not `own`, see hopper_load_device.py
    for step in range(0, blocks + 1):
        has_keys, has_values = step < blocks, step > 0
        mbarrier.wait(k_empty.index(k_stage), k_parity, pred=has_keys)
        if step < masked:
            store_real(real.index(k_stage), position, first, end, key_mask, MASK)
        owner, k_row = place_of(position, b, table, block, k_len, TABLE)
        mbarrier.expect(k_full.index(k_stage), SIZE, pred=has_keys)
        load_block(
            k, [owner, kv_head, k_row, 0], k_full.index(k_stage), k_tiles.index(k_stage).reshape([1, 1, KEYS, D]), pred=has_keys
        )
        if step == 1:
            mbarrier.wait(q_empty, (served & 1) ^ 1)
            mbarrier.expect(q_full, BLOCK * D * 2)
            load_block(q, [b, h, row, 0], q_full, q_tile.reshape([1, 1, BLOCK, D]))
        mbarrier.wait(v_empty.index(v_stage), v_parity, pred=has_values)
        mbarrier.expect(v_full.index(v_stage), SIZE, pred=has_values)
        v_entry = v_owner if TABLE else b
        load_block(
            v, [v_entry, kv_head, v_row, 0], v_full.index(v_stage), v_tiles.index(v_stage).reshape([1, 1, KEYS, D]),
            pred=has_values,
        )  # fmt: skip
        next_k, next_k_parity = advance(k_stage, k_parity, K_STAGES)
        next_v, next_v_parity = advance(v_stage, v_parity, V_STAGES)
        k_stage, k_parity = gl.where(has_keys, next_k, k_stage), gl.where(has_keys, next_k_parity, k_parity)
        v_stage, v_parity = gl.where(has_values, next_v, v_stage), gl.where(has_values, next_v_parity, v_parity)
        v_row = k_row
        if TABLE:
            v_owner = owner
        if step == 0:
            position = own + KEYS
        elif step + 1 < blocks:
            found, w, word, coming = next_block(bit_row, w, word, coming, first_block, own // KEYS)
            position = found * KEYS
    return k_stage, k_parity, v_stage, v_parity


@gluon.jit
def load_tiles(
    q, k, v, bits, starts, lengths, key_mask, holes, table, queue, m_sb, table_sb, block, heads, kv_heads, lists, q_len, k_len,
    row_blocks, words, total, section, info, over, real, q_tile, k_tiles, v_tiles, barriers,
    D: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr, START: gl.constexpr, LENGTH: gl.constexpr,
    MASK: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    """As hopper_load_device.load_tiles."""
    q_full, q_empty, k_full, k_empty, v_full, v_empty, announced, done = barriers
    skipped = k_len - q_len
    k_stage, k_parity, v_stage, v_parity = 0, 1, 0, 1
    served = 0
    number, repeated = gl.program_id(0), False
    coming = number
    before_last, last_served = total, total  # tile numbers, until it is known that they need no second time; `total`: none
    while number < total:
        if not repeated:
            coming = gl.num_programs(0) + gl.atomic_add(queue, 1)
        b, h, position, own, first, end, bit_row, first_block, kept = find_tile(
            number, bits, starts, lengths, heads, lists, q_len, k_len, row_blocks, words, section, START, LENGTH
        )
        blocks = 2 + kept
        masked = gl.minimum(blocks, 3)
        if MASK:
            masked = gl.where(gl.load(holes + b) != 0, blocks, masked)
        online = gl.where(repeated, blocks, masked)
        announce(info, announced, served, blocks, masked, online, b, h, position - skipped, position - own)
        k_stage, k_parity, v_stage, v_parity = load_steps(
            q, k, v, b, h, h * kv_heads // heads, position - skipped, own, first, end, bit_row, first_block, blocks, masked,
            key_mask + b.to(gl.int64) * m_sb, real, q_tile, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty,
            served, k_stage, k_parity, v_stage, v_parity, table + b.to(gl.int64) * table_sb, block, k_len,
            D, K_STAGES, V_STAGES, MASK, TABLE,
        )  # fmt: skip
        before_last, last_served = last_served, gl.where(repeated, total, number)
        served += 1
        again = if_to_repeat(before_last, served - 2, total, over, done)
        if again == total and coming >= total:  # nothing else is left to do meanwhile
            again = if_to_repeat(last_served, served - 1, total, over, done)
            before_last, last_served = last_served, total
        repeated = again < total
        number = gl.where(repeated, again, coming)
    announce(info, announced, served, 0, 0, 0, 0, 0, 0, 0)
