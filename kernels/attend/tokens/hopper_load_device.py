"""The part of the Hopper prefill that loads, ahead of those that compute: finds tiles, brings their queries, keys and values to
shared memory, and zeroes the rows between kept ones. In Gluon.

Gathered rows come by cp.async, 16 bytes a thread, and packed ones by the tensor memory accelerator.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

from tsa_compile.kernels.attend.tokens.hopper_ring_device import announce
from tsa_compile.kernels.common.gather_device import gather_rows, row_layout, row_pointers
from tsa_compile.kernels.common.hopper_device import BLOCK, WARPS, advance, load_block


@gluon.jit
def next_tile(round, programs, queue, queued):
    """The tile number of this program's `round`, from 1 on. `queued`: the first that no program has taken; else 0..P-1, then
    P-1..0, and so on, which evens out tiles of falling length."""
    pid = gl.program_id(0)
    t = programs + gl.atomic_add(queue, 1) if queued else round * programs + gl.where(round % 2 == 0, pid, programs - 1 - pid)
    return t


@gluon.jit
def find_tile(t, indices, counts, i_sb, i_sg, heads, lists, tiles, section):
    """Tile number t -> batch, head, kept list, its length, tile, tiles of the head.

    `section` heads advance together, longest tiles first, so that the keys and values they share stay in L2.
    """
    rest = t % (section * tiles)
    head_index = t // (section * tiles) * section + rest % section
    b, h = head_index // heads, head_index % heads
    kept = indices + b.to(gl.int64) * i_sb + (h * lists // heads).to(gl.int64) * i_sg
    n = gl.load(counts + b)
    n_tiles = gl.maximum(gl.cdiv(n, BLOCK), 1)
    return b, h, kept, n, n_tiles - 1 - rest // section, n_tiles


@gluon.jit
def zero_rows(out, stride_l, first, last, D: gl.constexpr):
    ROWS: gl.constexpr = 32
    lane = gl.arange(0, ROWS, layout=gl.SliceLayout(1, row_layout(D, WARPS)))
    zeros = gl.zeros([ROWS, D], out.dtype.element_ty, layout=row_layout(D, WARPS))
    for start in range(first, last, ROWS):
        rows = start + lane
        gl.store(row_pointers(out, rows, stride_l, D, WARPS), zeros, mask=gl.expand_dims(rows < last, 1))


@gluon.jit
def shared_rows(positions, D: gl.constexpr):
    return positions.load(gl.SliceLayout(1, row_layout(D, WARPS)))


@gluon.jit
def gather_step(step, blocks, k_head, v_head, k_sl, v_sl, keys, values, k_tile, v_tile, full, D: gl.constexpr):
    """Keys at the shared positions `keys`, but not after the last block; values at those of the step before, if there is one."""
    if step < blocks:
        gather_rows(k_tile, k_head, shared_rows(keys, D), k_sl, D, WARPS)
    if step > 0:
        gather_rows(v_tile, v_head, shared_rows(values, D), v_sl, D, WARPS)
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def copy_step(step, blocks, k, v, row, k_tile, v_tile, full, D: gl.constexpr):
    """As `gather_step`, from packed storage: keys from `row` on, and the block of values behind them, which the step before took
    the keys of."""
    SIZE: gl.constexpr = BLOCK * D * 2
    both = (step > 0) & (step < blocks)
    mbarrier.expect(full, 2 * SIZE, pred=both)
    mbarrier.expect(full, SIZE, pred=both == 0)
    load_block(k, [row, 0], full, k_tile, pred=step < blocks)
    load_block(v, [row + BLOCK, 0], full, v_tile, pred=step > 0)


@gluon.jit
def load_steps(
    blocks, kept, slots, at, row, q_head, k_from, v_from, o_head, q_sl, k_sl, v_sl, o_sl, zero_first, zero_last,
    positions, tile_rows, q_tile, k_tiles, v_tiles, q_full, full, empty, zeroed, stage, parity,
    D: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """A tile's steps: its keys and values from the diagonal down, its queries, and zeros to the rows between them.

    k_from, v_from: of its KV head, whose rows `at` come first and then those before `slots` in `kept`; or PACKED, the
    descriptors, to be read from `row` down. Returns the ring's next stage.
    """
    for step in range(0, blocks + 1):
        if not PACKED:
            positions.index(step % 2).store(gl.maximum(at, 0))
            slots -= BLOCK
            at = gl.load(kept + slots, mask=slots >= 0, other=0)  # for the next step, long before it is needed
        mbarrier.wait(empty.index(stage), parity)
        if step == 1:
            gather_rows(q_tile, q_head, gl.maximum(shared_rows(tile_rows, D), 0), q_sl, D, WARPS)
            async_copy.mbarrier_arrive(q_full, increment_count=False)
        k_tile, v_tile = k_tiles.index(stage), v_tiles.index(stage)
        if PACKED:
            copy_step(step, blocks, k_from, v_from, row - step * BLOCK, k_tile, v_tile, full.index(stage), D)
        else:
            keys, values = positions.index(step % 2), positions.index(1 - step % 2)
            gather_step(step, blocks, k_from, v_from, k_sl, v_sl, keys, values, k_tile, v_tile, full.index(stage), D)
        stage, parity = advance(stage, parity, STAGES)
        if not STRIP and step == gl.minimum(blocks, STAGES - 1):  # the ring is full, or the tile loaded
            zero_rows(o_head, o_sl, zero_first, zero_last, D)
            mbarrier.arrive(zeroed)
    return stage, parity


@gluon.jit
def if_to_repeat(number, i, total, rows, done, QUICK: gl.constexpr):
    """Waits for the program's tile i, if there was one. `number` if a row's sum did not stay below SUM_LIMIT; else `total`."""
    turn = (i + 2) % 2
    mbarrier.wait(done.index(turn), (((i + 2) // 2) & 1) ^ 1)
    if QUICK:
        over = gl.max(rows.index(turn).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
        number = gl.where(over == 1, number, total)
    else:
        number = total
    return number


@gluon.jit
def load_tiles(
    q, k, v, out, indices, counts, q_sb, q_sh, q_sl, k_sb, k_sh, k_sl, v_sb, v_sh, v_sl, o_sb, o_sh, o_sl, i_sb, i_sg,
    heads, kv_heads, lists, q_len, k_len, total, tiles, section, programs, queue, queued,
    positions, info, rows, q_tile, k_tiles, v_tiles, barriers,
    D: gl.constexpr, STAGES: gl.constexpr, STRIP: gl.constexpr, PACKED: gl.constexpr, QUICK: gl.constexpr,
):  # fmt: skip
    """Every tile of this program, and once more those whose sums grew too large, as soon as that is known."""
    gl.static_assert(STAGES <= 3)  # else the second step of a tile does not wait until its queries' place has been read
    q_full, full, empty, announced, done, zeroed = barriers
    lane = gl.arange(0, BLOCK, layout=gl.BlockedLayout([1], [32], [4], [0]))
    skipped = k_len - q_len
    stage, parity = 0, 1
    served = 0  # tiles with a query
    t, round = gl.program_id(0), 1
    number, repeated = t, False
    before_last, last_served = total, total  # tile numbers, until it is known that they need no second time; `total`: none
    while number < total:
        if not repeated:
            t, round = next_tile(round, programs, queue, queued), round + 1
        b, h, kept, n, tile, n_tiles = find_tile(number, indices, counts, i_sb, i_sg, heads, lists, tiles, section)
        slots = tile * BLOCK + lane  # both of the tile's queries and of its first keys
        at = gl.load(kept + slots, mask=(slots >= 0) & (slots < n), other=-1)
        last = gl.load(kept + gl.minimum((tile + 1) * BLOCK, n) - 1, mask=(tile >= 0) & (n > 0), other=-1)
        before = gl.load(kept + tile * BLOCK - 1, mask=tile > 0, other=-1)
        o_head = out + b.to(gl.int64) * o_sb + h.to(gl.int64) * o_sh
        if last >= skipped:
            blocks, turn = tile + 1, served % 2
            announce(info, rows, announced, served, at - skipped, blocks, b, h, 1 if repeated or not QUICK else blocks)
            if PACKED:
                k_from, v_from = k, v
            else:
                kv_head = (h * kv_heads // heads).to(gl.int64)
                k_from, v_from = k + b.to(gl.int64) * k_sb + kv_head * k_sh, v + b.to(gl.int64) * v_sb + kv_head * v_sh
            row = (b * lists + h * lists // heads) * k_len + tile * BLOCK
            q_head = q + b.to(gl.int64) * q_sb + h.to(gl.int64) * q_sh
            zero_last = gl.where(tile == n_tiles - 1, q_len, last - skipped + 1)
            stage, parity = load_steps(
                blocks, kept, slots, at, row, q_head, k_from, v_from, o_head, q_sl, k_sl, v_sl, o_sl,
                gl.maximum(before - skipped + 1, 0), zero_last, positions, rows.index(turn), q_tile, k_tiles, v_tiles,
                q_full, full, empty, zeroed.index(turn), stage, parity, D, STAGES, STRIP, PACKED,
            )  # fmt: skip
            before_last, last_served = last_served, gl.where(repeated, total, number)
            served += 1
        elif not STRIP and tile == n_tiles - 1:
            zero_rows(o_head, o_sl, 0, q_len, D)  # no query was kept
        again = if_to_repeat(before_last, served - 2, total, rows, done, QUICK)
        if again == total and t >= total:  # nothing else is left to do meanwhile
            again = if_to_repeat(last_served, served - 1, total, rows, done, QUICK)
            before_last, last_served = last_served, total
        repeated = again < total
        number = gl.where(repeated, again, t)
    announce(info, rows, announced, served, lane, 0, 0, 0, 0)
