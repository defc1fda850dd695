"""The part of the Hopper kernel that loads, ahead of those that compute. One warp, in Gluon.

It finds tiles, walks over the set bits of their bitmaps, and brings queries, keys and values to shared memory by the tensor
memory accelerator.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from tsa_compile.kernels.attend.pages.hopper_info_device import announce
from tsa_compile.kernels.common.gather_device import barrier
from tsa_compile.kernels.common.hopper_device import BLOCK, advance, load_block

KEYS = gl.constexpr(64)  # of a key block
LANES = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
STEP = gl.constexpr(gl.BlockedLayout([4], [32], [1], [0]))  # a step's keys by lane


@gluon.jit
def count_bits(word):
    return gl.inline_asm_elementwise("popc.b64 $0, $1;", "=r,l", [word], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def load_word(bit_row, w, first, end):
    """Word(s) w of a bitmap's row, with the bits of key blocks first..end-1 alone."""
    word = gl.load(bit_row + w, mask=w * 64 < end, other=0)
    low, high = gl.maximum(first - w * 64, 0), gl.minimum(end - w * 64, 64)
    one = gl.to_tensor(1).to(gl.int64)
    below = gl.where(high >= 64, -1, (one << gl.minimum(gl.maximum(high, 0), 63).to(gl.int64)) - 1)
    return gl.where(low < 64, word & below & ((one * -1) << gl.minimum(low, 63).to(gl.int64)), 0)


@gluon.jit
def count_blocks(bit_row, first, end):
    """Set bits from first to end - 1."""
    number = gl.zeros([32], gl.int32, layout=LANES)
    for start in range(first // 64, gl.cdiv(end, 64), 32):
        number += count_bits(load_word(bit_row, start + gl.arange(0, 32, layout=LANES), first, end))
    return gl.sum(number, 0)


@gluon.jit
def next_block(bit_row, w, word, coming, first, end):
    """The next set bit, if there is one; and what is left: the word's number, its bits, and the word behind it."""
    while (word == 0) & (w * 64 < end):
        w += 1
        word = coming
        coming = load_word(bit_row, w + 1, first, end)
    lowest = word & (0 - word)
    return w * 64 + count_bits(lowest - 1), w, word ^ lowest, coming


@gluon.jit
def place_of(position, b, table, block, k_len, TABLE: gl.constexpr):
    """(entry of the first dimension, row within it) of the key block at `position`; TABLE: blocks of `block` rows lie anywhere.

    A key block behind the last key, of which nothing is read in the end, stands where the last key's block is.
    """
    owner, row = b, position
    if TABLE:
        owner = gl.load(table + gl.minimum(position, k_len - 1) // block)
        row = position % block
    return owner, row


@gluon.jit
def copy_blocks(x, h, one, two, full, pieces, stage, pred, D: gl.constexpr):
    """The key blocks in places `one` and `two`, to a stage of the ring, panel by panel of 64 columns."""
    PANELS: gl.constexpr = D // 64
    for panel in gl.static_range(PANELS):
        at = (stage * PANELS + panel) * 2
        load_block(x, [one[0], h, one[1], panel * 64], full, pieces.index(at).reshape([1, 1, 64, 64]), pred=pred)
        load_block(x, [two[0], h, two[1], panel * 64], full, pieces.index(at + 1).reshape([1, 1, 64, 64]), pred=pred)


@gluon.jit
def store_real(real, one, two, single, first, end, key_mask, MASK: gl.constexpr):
    """Which keys of the step with key blocks at `one` and `two` are real; `single`: the second block stands for none."""
    lane = gl.arange(0, BLOCK, layout=STEP)
    at = gl.where(lane < KEYS, one + lane, two + lane - KEYS)
    ok = (at >= first) & (at < end) & ((lane < KEYS) | (single == 0))
    if MASK:
        ok &= gl.load(key_mask + at, mask=ok, other=0) != 0
    real.store(ok.to(gl.int8))
    barrier()  # before the barrier that announces it is armed


@gluon.jit
def load_steps(
    q, k, v, b, h, kv_head, row, own, first, end, bit_row, first_block, kept, blocks, masked, key_mask,
    real, q_tile, k_pieces, v_pieces, q_full, q_empty, full, empty, served, stage, parity, table, block, k_len,
    D: gl.constexpr, STAGES: gl.constexpr, MASK: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    """A tile's steps: the own keys, from position `own` on, and its queries; then `kept` key blocks, ascending, two a step.

    If they are odd in number, step 1 has one alone: it is masked. Returns the ring's next stage.
    """
    SIZE: gl.constexpr = BLOCK * D * 2
    w = first_block // 64
    word, coming = load_word(bit_row, w, first_block, own // KEYS), load_word(bit_row, w + 1, first_block, own // KEYS)
    one, two, single = own, own + KEYS, 0
    # Values lag a step. Not `own`: a loop carries what its body leaves with another handle than it had before, and `v_one = one`
    # would leave it the same.
    v_one, v_two = 0, 0
    v_owner, v_second = b * 0, b * 0
    for step in range(0, blocks + 1):
        mbarrier.wait(empty.index(stage), parity)
        if step < masked:
            store_real(real.index(stage), one, two, single, first, end, key_mask, MASK)
        has_keys, has_values = step < blocks, step > 0
        mbarrier.expect(full.index(stage), 2 * SIZE, pred=has_keys & has_values)
        mbarrier.expect(full.index(stage), SIZE, pred=has_keys != has_values)
        owner, row_one = place_of(one, b, table, block, k_len, TABLE)
        second, row_two = place_of(two, b, table, block, k_len, TABLE)
        copy_blocks(k, kv_head, (owner, row_one), (second, row_two), full.index(stage), k_pieces, stage, has_keys, D)
        if TABLE:
            copy_blocks(v, kv_head, (v_owner, v_one), (v_second, v_two), full.index(stage), v_pieces, stage, has_values, D)
        else:
            copy_blocks(v, kv_head, (b, v_one), (b, v_two), full.index(stage), v_pieces, stage, has_values, D)
        if step == 0:
            mbarrier.wait(q_empty, (served & 1) ^ 1)
            mbarrier.expect(q_full, SIZE)
            load_block(q, [b, h, row, 0], q_full, q_tile.reshape([1, 1, BLOCK, D]))
        stage, parity = advance(stage, parity, STAGES)
        v_one, v_two = row_one, row_two
        if TABLE:
            v_owner, v_second = owner, second
        if step + 1 < blocks:
            single = gl.where(step == 0, kept % 2, 0)
            found, w, word, coming = next_block(bit_row, w, word, coming, first_block, own // KEYS)
            one = found * KEYS
            two = one
            if single == 0:
                found, w, word, coming = next_block(bit_row, w, word, coming, first_block, own // KEYS)
                two = found * KEYS
    return stage, parity


@gluon.jit
def if_to_repeat(number, i, total, over, done):
    """Waits for the program's tile i, if there was one. `number` if one of its rows is to be computed again; else `total`."""
    turn = (i + 2) % 2
    mbarrier.wait(done.index(turn), (((i + 2) // 2) & 1) ^ 1)
    again = gl.max(over.index(turn).load(STEP).to(gl.int32), 0)
    return gl.where(again == 1, number, total)


@gluon.jit
def find_tile(
    number, bits, starts, lengths, heads, lists, q_len, k_len, row_blocks, words, section,
    START: gl.constexpr, LENGTH: gl.constexpr,
):  # fmt: skip
    """Batch, head, position of the first row and of the first own key; the first key and the one behind the last; its bitmap's
    row, the key block in which the first key lies, and how many key blocks before the own ones are kept."""
    rest = number % (section * row_blocks)
    head_index = number // (section * row_blocks) * section + rest % section
    row_block = row_blocks - 1 - rest // section
    b, h = head_index // heads, head_index % heads
    first, end = 0, k_len
    if START:
        first = gl.minimum(gl.maximum(gl.load(starts + b), 0), k_len)
    if LENGTH:
        end = gl.minimum(first + gl.maximum(gl.load(lengths + b), 0), k_len)
    position = ((k_len - q_len) // BLOCK + row_block) * BLOCK
    own = gl.minimum(position, gl.maximum(end - 1, 0) // BLOCK * BLOCK)
    wide = (b * lists + h * lists // heads).to(gl.int64)
    bit_row = bits + (wide * row_blocks + row_block) * words
    first_block = first // KEYS
    return b, h, position, own, first, end, bit_row, first_block, count_blocks(bit_row, first_block, own // KEYS)


@gluon.jit
def load_tiles(
    q, k, v, bits, starts, lengths, key_mask, holes, table, queue, m_sb, table_sb, block, heads, kv_heads, lists, q_len, k_len,
    row_blocks, words, total, section, info, over, real, q_tile, k_pieces, v_pieces, barriers,
    D: gl.constexpr, STAGES: gl.constexpr, START: gl.constexpr, LENGTH: gl.constexpr, MASK: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    """Every tile of this program, taken from a queue, and once more those whose sums grew too large, as soon as that is known.

    Tile number t is a row block of a head, from the last row block down; `section` heads advance together, so that the keys and
    values they share stay in L2.
    """
    q_full, q_empty, full, empty, announced, done = barriers
    skipped = k_len - q_len
    stage, parity = 0, 1
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
        blocks = 1 + (kept + 1) // 2
        masked = gl.minimum(blocks, 2)
        if MASK:
            masked = gl.where(gl.load(holes + b) != 0, blocks, masked)
        online = gl.where(repeated, blocks, masked)
        announce(info, announced, served, blocks, masked, online, b, h, position - skipped, position - own)
        stage, parity = load_steps(
            q, k, v, b, h, h * kv_heads // heads, position - skipped, own, first, end, bit_row, first_block, kept, blocks, masked,
            key_mask + b.to(gl.int64) * m_sb, real, q_tile, k_pieces, v_pieces, q_full, q_empty, full, empty, served, stage,
            parity, table + b.to(gl.int64) * table_sb, block, k_len, D, STAGES, MASK, TABLE,
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
