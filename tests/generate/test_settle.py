"""What a step settles, token by token: ends, lengths, stopping criteria, of rows that go on apart and together."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tsa_compile.generate.accept import Accepted
from tsa_compile.generate.settle import Ends
from tsa_compile.generate.token_rows import TokenRows

PAD, PROMPT = 99, 2


class EndTokens:
    eos_token_id = torch.tensor([1, 4])


class Sum:
    """A row stops where its tokens have a sum of at least `total`."""

    def __init__(self, total):
        self.total = total

    def __call__(self, ids, scores):
        return ids[:, PROMPT:].sum(1) >= self.total


def one_by_one(rows, done, tokens, kept, stops, max_length, together):
    """Lists of tokens and what has ended, after a step: as plain generation would append them."""
    rows, done = [list(r) for r in rows], list(done)
    for place in range(len(tokens[0])):
        have = [place <= k for k in kept]
        if all(done) or (together and not all(h or d for h, d in zip(have, done, strict=True))):
            break
        for b, row in enumerate(rows):
            if done[b]:
                row += [PAD] if together else []
            elif have[b]:
                row.append(tokens[b][place])
                done[b] = stops(row) or len(row) == max_length
    return rows, done


@settings(max_examples=150, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), drafted=st.integers(0, 4), together=st.booleans())
def test_a_step_is_what_plain_generation_would_append(data, batch, drafted, together):
    draw = data.draw
    before = [0] * batch if together else [draw(st.integers(0, 3)) for _ in range(batch)]
    max_length = PROMPT + max(before) + draw(st.integers(1, 6))
    done = [draw(st.booleans()) for _ in range(batch - 1)] + [False]
    tokens = [[draw(st.integers(0, 5)) for _ in range(drafted + 1)] for _ in range(batch)]
    kept = [draw(st.integers(0, drafted)) for _ in range(batch)]
    ends, total = draw(st.booleans()), draw(st.sampled_from([None, 3, 9]))
    rows = TokenRows(torch.zeros(batch, PROMPT, dtype=torch.long), 16, PAD)
    rows.append(torch.zeros(batch, 3, dtype=torch.long), torch.tensor(before))
    rows.over = torch.tensor(done)
    rows.know(before, done)
    criteria = [*([EndTokens()] if ends else []), *([Sum(total)] if total is not None else [])]

    def stops(row):
        return (ends and row[-1] in (1, 4)) or (total is not None and sum(row[PROMPT:]) >= total)

    old = [rows.ids[b, :length].tolist() for b, length in enumerate(rows.lengths)]
    want, want_done = one_by_one(old, done, tokens, kept, stops, max_length, together)
    accepted = Accepted(torch.tensor(kept), torch.tensor(tokens))
    _, new = Ends(criteria, max_length).settle(rows, accepted, together)
    assert [rows.ids[b, :length].tolist() for b, length in enumerate(rows.lengths)] == want
    assert rows.done == want_done or together  # at the end of a length all rows are done
    assert all(not w or d for d, w in zip(rows.done, want_done, strict=True))
    assert new == [sum(t != PAD for t in row[len(o) :]) for row, o in zip(want, old, strict=True)]
    assert (rows.all()[:, max(rows.lengths) :] == PAD).all()
