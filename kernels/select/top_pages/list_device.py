"""A decode step's lists of pages from the shares of pages (shares_device.py): the second launch. Triton.

One program makes one list. It holds the scores of its row in registers, as far as they fit; finds the least score that is
chosen by counting the pages above three scores at a time, on the bits; and writes the pages from that on in ascending order.
Nothing is sorted, no program waits for another, and nothing that it writes is read again.
"""

import triton
import triton.language as tl

from tsa_compile.kernels.common.pages_device import PAGE
from tsa_compile.kernels.select.top_pages.shares_device import ALWAYS

ONE = tl.constexpr(1073741824)  # a share of 1, in the units of the budget
SHARE_ONE = tl.constexpr(1065353216)  # the bits of 1.0
PAGES_OF_ENTRY = tl.constexpr(125)
UNIT = tl.constexpr(1099511627776.0)  # masses are whole numbers of its inverse: their sum has no order
LENGTHS = ("kv_heads", "capacity", "groups", "most", "share", "entries", "mass_bits")


@triton.jit
def load_scores(scores, first, whole, BLOCK: tl.constexpr):
    page = first + tl.arange(0, BLOCK)
    bits = tl.load(scores + page, mask=page // 4 < tl.cdiv(whole, 4), other=-1)  # four at a time; rows have room
    return tl.where(page < whole, bits, -1)


@triton.jit
def shares_of(bits):
    """Shares in whole 2**-40, those of pages that are always read, too."""
    return ((bits & (ALWAYS - 1)).to(tl.float32, bitcast=True) * UNIT).to(tl.int64)


@triton.jit
def held_by(bits, above, step, MASS: tl.constexpr):
    """What the pages with a score above `above` hold. Of numbers: above each of `above`, + `step`, + 2 * `step`, 21 bits each."""
    if MASS:
        return tl.sum(tl.where(bits > above, shares_of(bits), 0))
    else:
        two = tl.sum((bits > above).to(tl.int32) + ((bits > above + step).to(tl.int32) << 16))  # of at most 2**14 pages each
        third = tl.sum((bits > above + 2 * step).to(tl.int32))
        return (two & 0xFFFF).to(tl.int64) + ((two >> 16).to(tl.int64) << 21) + (third.to(tl.int64) << 42)


@triton.jit
def held(bits, scores, whole, above, step, MASS: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr):
    """`held_by` of all pages. ALL: `bits` are all scores; else they are read again."""
    total = held_by(bits, above, step, MASS)
    if not ALL:
        for first in tl.range(BLOCK, whole, BLOCK):
            total += held_by(load_scores(scores, first, whole, BLOCK), above, step, MASS)
    return total


@triton.jit
def extent(bits):
    """(pages, those always read, least and greatest score of the others) of some scores, the numbers as one: << 32."""
    real, free = bits >= 0, (bits >= 0) & (bits < ALWAYS)
    number = tl.sum(real.to(tl.int64) + ((bits >= ALWAYS).to(tl.int64) << 32))
    return number, tl.min(tl.where(free, bits, SHARE_ONE)), tl.max(tl.where(free, bits, 0))


@triton.jit
def extent_of_all(bits, scores, whole, BLOCK: tl.constexpr, ALL: tl.constexpr):
    number, least, greatest = extent(bits)
    if not ALL:
        for first in tl.range(BLOCK, whole, BLOCK):
            more, low, high = extent(load_scores(scores, first, whole, BLOCK))
            number, least, greatest = number + more, tl.minimum(least, low), tl.maximum(greatest, high)
    return (number & 0xFFFFFFFF).to(tl.int32), (number >> 32).to(tl.int32), least, greatest


@triton.jit
def wanted_by_budget(total, share, entry, table, entries):
    """ceil(share * total) and the schedule's entry for so many pages; `entry`: the schedule's first."""
    if entries > 1:
        entry = tl.load(table + tl.minimum(total // PAGES_OF_ENTRY, entries - 1))
    return ((total.to(tl.int64) * share + ONE - 1) // ONE).to(tl.int32) + entry


@triton.jit
def narrowed(low, high, above, at, now, target):
    """(low, high, what is held above high) after a look at `at`; both are `at` if just the target is held above it."""
    above = tl.where((now <= target) & (at < high), now, above)
    high = tl.where(now <= target, tl.minimum(high, at), high)
    return tl.where(now >= target, tl.maximum(low, at), low), high, above


@triton.jit
def find_cut(bits, scores, whole, target, low, high, above, MASS: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr):
    """(cut, need): the pages above the cut and the first `need` of those at it are the fewest that hold `target`.

    Pages above `low` hold that; pages above `high` hold `above`, which is less. Or both are the cut, and `above` is the target.
    """
    each = tl.full([], 1, tl.int64)
    if MASS:
        while high - low > 1:
            middle = low + (high - low) // 2
            now = held(bits, scores, whole, middle, 0, MASS, BLOCK, ALL)
            low, high, above = narrowed(low, high, above, middle, now, target)
        each = tl.maximum(shares_of(high), 1)
    else:
        while high - low > 1:
            step = tl.maximum((high - low) // 4, 1)
            first = low + step
            numbers = held(bits, scores, whole, first, step, MASS, BLOCK, ALL)
            for i in tl.static_range(3):
                now = ((numbers >> (21 * i)) & 0x1FFFFF).to(tl.int32)
                low, high, above = narrowed(low, high, above, first + i * step, now, target)
    return high, tl.cdiv(target - above, each).to(tl.int32)


@triton.jit
def write_block(bits, first, cut, need, out, most, above_seen, equal_seen):
    """Appends those of the pages from `first` on that are chosen; returns how many above the cut and at it there are so far."""
    page = first + tl.arange(0, bits.shape[0])
    above, equal = (bits > cut).to(tl.int32), (bits == cut).to(tl.int32)
    both = tl.cumsum((above << 16) + equal, 0)  # a block has fewer than 2**15
    left = tl.maximum(need - equal_seen, 0)
    take = (above > 0) | ((equal > 0) & ((both & 0xFFFF) <= left))
    place = (both >> 16) + tl.minimum(both & 0xFFFF, left) - 1
    place = (
        tl.where(take, place, -1).to(tl.int16).to(tl.int32)
    )  # narrow, as threads exchange it: the store has a layout of its own
    before = above_seen + tl.minimum(equal_seen, need)
    tl.store(out + before + place, page, mask=(place >= 0) & (place < most - before))
    seen = tl.sum((above << 16) + equal)
    return above_seen + (seen >> 16), equal_seen + (seen & 0xFFFF)


@triton.jit
def make_list(
    scores, whole, is_open, out, most, share, table, entries, mass, MASS: tl.constexpr, BLOCK: tl.constexpr, ALL: tl.constexpr
):  # fmt: skip
    """Writes a list, without the open page; returns its length. ALL: a row has at most BLOCK whole pages."""
    bits, entry = load_scores(scores, 0, whole, BLOCK), tl.load(table)
    real, always, least, greatest = extent_of_all(bits, scores, whole, BLOCK, ALL)
    low, high = least - 1, greatest
    if MASS:
        above = held(bits, scores, whole, SHARE_ONE, 0, MASS, BLOCK, ALL)
        total = held(bits, scores, whole, -1, 0, MASS, BLOCK, ALL)
        target = tl.maximum(tl.ceil(total.to(tl.float64) * mass).to(tl.int64), above)
        everything = target < 0
    else:
        wanted = tl.maximum(wanted_by_budget(real + is_open, share, entry, table, entries) - is_open, always)
        target = tl.minimum(wanted, real)
        everything = target == real
        above = tl.where(everything, real, always)
    only_always = (target == above) & (everything == 0)
    low = tl.where(everything, -1, tl.where(only_always, SHARE_ONE, low))
    high = tl.where(everything, -1, tl.where(only_always, SHARE_ONE, high))
    cut, need = find_cut(bits, scores, whole, target, low, high, above, MASS, BLOCK, ALL)
    above, equal = write_block(bits, 0, cut, need, out, most, 0, 0)
    if not ALL:
        for first in tl.range(BLOCK, whole, BLOCK):
            bits = load_scores(scores, first, whole, BLOCK)
            above, equal = write_block(bits, first, cut, need, out, most, above, equal)
    return above + tl.minimum(equal, need)


@triton.jit(do_not_specialize=LENGTHS)
def page_lists_kernel(
    scores, indices, list_counts, start, lengths, keep, table,
    kv_heads, capacity, groups, most, share, entries, mass_bits,
    SMALL: tl.constexpr, BLOCK: tl.constexpr, MASS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (B * Hk): one list of pages, to indices [B, Hk, most] and list_counts [B, Hk].

    Args:
        scores: int32 [B, Hk, 16 * groups], of `page_shares_kernel`.
        keep: int64 [Hk], the budget's share by KV head; None: `share` for all.
        table: int32 [entries], the budget's schedule. MASS: the mass wanted instead, the bits of a float64.
        SMALL, BLOCK: pages that a program holds; the least that suffices. Beyond the second, scores are read in each step.
        EARLY: started while the first launch runs (programmatic dependent launch, from compute capability 9.0 on).
    """
    list_index = tl.program_id(0).to(tl.int64)
    b = list_index // kv_heads
    begin, end = 0, capacity
    if start is not None:
        begin = tl.maximum(tl.load(start + b), 0)
    if lengths is not None:
        end = tl.minimum(begin + tl.load(lengths + b), capacity)
    if keep is not None:
        share = tl.load(keep + list_index % kv_heads)
    whole = tl.maximum(end // PAGE, 0)
    is_open = ((end % PAGE > 0) & (end > begin)).to(tl.int32)
    mass = mass_bits.to(tl.int64).to(tl.float64, bitcast=True)
    scores += list_index * groups * 16
    indices += list_index * most
    if EARLY:
        tl.extra.cuda.gdc_wait()  # for all of the first launch
    if whole <= SMALL:
        written = make_list(scores, whole, is_open, indices, most, share, table, entries, mass, MASS, SMALL, True)
    elif whole <= BLOCK:
        written = make_list(scores, whole, is_open, indices, most, share, table, entries, mass, MASS, BLOCK, True)
    else:
        written = make_list(scores, whole, is_open, indices, most, share, table, entries, mass, MASS, BLOCK, False)
    tl.store(indices + written, whole, mask=(is_open > 0) & (written < most))
    tl.store(list_counts + list_index, tl.minimum(written + is_open, most))
