"""Whether speculation pays: by the table alone, by what rounds have lost, by what the last ones gave."""

from __future__ import annotations

import random

import pytest

from tsa_compile.generate.payoff import LOSS, Cost, Payoff, as_costs

PAYS = Cost(1, 1000, 0.5, 1.0)  # of gamma 4: 3 exact steps


def test_no_table_no_decision():
    assert Payoff((), 4, 100).why_off(1, 1000) is None


def test_the_table_alone():
    assert "gives at most 5 tokens" in Payoff([Cost(1, 1000, 1.0, 1.1)], 4, 100).why_off(1, 1000)
    assert "gave 2.50 tokens when it was measured" in Payoff([Cost(1, 1000, 0.5, 1.0, 2.5)], 4, 100).why_off(1, 1000)
    assert Payoff([Cost(1, 1000, 0.5, 1.0, 3.5)], 4, 100).why_off(1, 1000) is None


def test_the_nearest_line_counts_batch_first():
    payoff = Payoff([Cost(1, 1000, 2.0, 1.0), Cost(8, 100_000, 0.2, 1.0)], 4, 100)
    assert payoff.why_off(6, 1000) is None
    assert payoff.why_off(2, 100_000) is not None


@pytest.mark.parametrize("tokens", [200, 2000])
@pytest.mark.parametrize("good", [0, 5, 60])
def test_what_a_request_loses_is_bounded(tokens, good):
    """Whatever rounds give: with the exact steps that follow, a request takes at most LOSS more, and the round that tipped it."""
    random.seed(good)
    payoff, got, took = Payoff([PAYS], 4, tokens), 1.0, 1.0
    for n in range(10_000):
        if payoff.why_off(1, 1000) is not None:
            break
        given = 5 if n < good else random.choice((1, 1, 2))
        payoff.saw([given])
        got, took = got + given, took + 3.0
        if got >= tokens:
            break
    took += max(0.0, tokens - got)
    assert took <= tokens * (1 + LOSS) + 2
    assert got < tokens or good


def test_a_fall_is_seen_whatever_was_won_before():
    payoff = Payoff([PAYS], 4, 10_000)
    for _ in range(500):
        assert payoff.why_off(1, 1000) is None
        payoff.saw([5, 4])
    bad = 0
    while (why := payoff.why_off(1, 1000)) is None:
        payoff.saw([1, 2])
        bad += 1
    assert 0 < bad < 16
    assert "a round gives" in why


def test_lines():
    assert as_costs([(1, 2, 0.5, 1.0), PAYS, (1, 2, 0.5, 1.0, 6.2)]) == (
        Cost(1, 2, 0.5, 1.0),
        PAYS,
        Cost(1, 2, 0.5, 1.0, 6.2),
    )
    with pytest.raises(ValueError, match="given > 0"):
        Cost(1, 2, 0.5, 1.0, 0.0)
