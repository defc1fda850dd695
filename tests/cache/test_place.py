"""Where steps on fixed buffers write, and what they see: moved to a step, shown, advanced, against the definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.cache.place import Place

CAPACITY = 24


def seen(at, new, padding):
    """bool `[B, 1, new, CAPACITY]`, entry by entry."""
    mask = torch.zeros(len(at), 1, new, CAPACITY, dtype=torch.bool)
    for b, first in enumerate(at):
        for r in range(new):
            mask[b, 0, r, padding[b] : first + r + 1] = True
    return mask


@settings(max_examples=60, deadline=None)
@given(data=st.data(), padded=st.booleans(), apart=st.booleans(), new=st.sampled_from([1, 1, 4]))
def test_what_rows_see_where_padding_is_known(data, padded, apart, new):
    """Whatever steps of other kinds the place was moved to before."""
    place = Place(2, CAPACITY, torch.device("cpu"), torch.int64)
    for _ in range(3):
        if data.draw(st.booleans()):
            mask = torch.randint(2, (2, data.draw(st.integers(1, CAPACITY))))
            place.move(5, None, mask)
            assert place.shown is None
            continue
        longest = data.draw(st.integers(4, 12))
        at = [data.draw(st.integers(4, longest)) if apart else longest, longest]
        padding = [data.draw(st.integers(0, 4)) if padded else 0 for _ in at]
        place.move(longest, torch.tensor(at, dtype=torch.int32) if apart else None, None)
        shown = place.show(new, torch.tensor(padding, dtype=torch.int32) if padded else None)
        assert place.holds(shown)
        for n in range(4 if new == 1 else 1):
            if n:
                place.advance()
            now = [a + n for a in at]
            assert torch.equal(shown, seen(now, new, padding))
            assert place.at.tolist() == now
            assert place.lengths.tolist() == [a + new - p for a, p in zip(now, padding, strict=True)]
            assert (place.start is None) != padded
            assert place.start is None or place.start.tolist() == padding
            assert int(place.offset) == longest + n
            assert place.padded == padded
            for b, (end, pad) in enumerate(zip(now, padding, strict=True)):
                assert place.key_mask[b, : end + new].tolist() == [j >= pad for j in range(end + new)]


def test_a_mask_of_the_call_is_brought_along():
    """Where padding is not known, the new rows of a loop are shown one by one, and forgotten at the next move."""
    place = Place(2, CAPACITY, torch.device("cpu"), torch.int64)
    mask = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    place.move(4, torch.tensor([4, 2], dtype=torch.int32), mask, steps=3)
    for _ in range(2):
        place.advance()
    assert place.mask[:, :8].tolist() == [[1, 0, 1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 0, 0, 0]]
    assert torch.equal(place.key_mask, place.mask.bool())
    place.move(4, None, mask[:, :4])
    assert place.mask[:, :8].tolist() == [[1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
