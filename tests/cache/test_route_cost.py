"""The cost model of routes: against a loop that adds up what happens, and where its choice must turn."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.ranks import run_ranks
from tsa_compile.cache.route_cost import WAYS, Link, Work, cheapest, seconds
from tsa_compile.tools.bench.tune_distributed import measure, predicted_and_measured

LINK = Link(probe=16e-6, bandwidth=25e9, attend=1e-10, merge=5e-6, splice=1e-9, recompute=2e-6)
WORK = Work(rows=8, tokens=2048, holders=2, layers=32, steps=10, heads=32, kv_heads=8, head_dim=128)

links = st.builds(
    Link, *[st.floats(1e-9, 1e-3)] * 1, st.floats(1e6, 1e12), *[st.floats(0, 1e-3)] * 3, st.none() | st.floats(0, 1e-3)
)
works = st.builds(
    Work, *[st.integers(1, n) for n in (64, 5000, 8, 6, 20)], st.just(8), st.just(2), st.just(64),
    reuse=st.none() | st.integers(1, 25), here=st.just(1),
)  # fmt: skip


def by_hand(link, work):
    """One step after the other, one layer after the other."""
    spent = dict.fromkeys(WAYS, 0.0)
    for step in range(work.steps):
        fresh = step == 0 or (work.reuse is not None and step % work.reuse == 0)
        if fresh:
            spent["fetch"] += link.probe
        for _ in range(work.layers):
            if fresh:
                spent["fetch"] += (work.tokens - work.here) * (
                    2 * work.kv_heads * work.head_dim * work.itemsize / link.bandwidth + link.splice
                )
                spent["recompute"] += float("inf") if link.recompute is None else (work.tokens - work.here) * link.recompute
            moved = work.rows * work.heads * (2 * work.head_dim * work.itemsize + 4)
            held = -(-work.tokens // work.holders)
            spent["route"] += link.probe + moved / link.bandwidth + work.rows * held * link.attend + work.holders * link.merge
            for way in ("fetch", "recompute"):
                spent[way] += work.rows * work.tokens * link.attend
    return spent


@given(links, works)
def test_costs_are_what_a_loop_adds_up(link, work):
    costs, expected = seconds(link, work), by_hand(link, work)
    assert costs == pytest.approx(expected, rel=1e-9)
    assert costs[cheapest(link, work)] == min(costs.values())


def test_keys_come_once_steps_ask_for_them_often_enough():
    """A fetch is paid once, a round trip in every layer of every step."""
    ways = [cheapest(LINK, dataclasses.replace(WORK, steps=steps)) for steps in (1, 2, 4, 8, 16, 64, 256)]
    assert ways == sorted(ways, key=["route", "fetch"].index)
    assert {ways[0], ways[-1]} == {"route", "fetch"}
    changing = dataclasses.replace(WORK, steps=256, reuse=1)
    assert cheapest(LINK, changing) == "route"
    assert cheapest(dataclasses.replace(LINK, recompute=0.0), dataclasses.replace(WORK, steps=256)) == "recompute"


@pytest.mark.parametrize(("field", "value"), [("bandwidth", 0.0), ("probe", -1.0), ("recompute", -1e-9)])
def test_a_bad_number_is_named(field, value):
    with pytest.raises(ValueError, match=f"Link.{field} must be a positive number, got {value}"):
        dataclasses.replace(LINK, **{field: value})


def measured():
    link = measure(torch.device("cpu"), heads=2, kv_heads=1, dim=16, tokens=64)
    return link, predicted_and_measured(link, torch.device("cpu"), 2, 64, heads=2, kv_heads=1, dim=16)


def test_every_rank_measures_the_same_numbers():
    (first, (expected, taken)), (second, _) = run_ranks(2, measured)
    assert first == second
    assert 0 < first.probe < 1
    assert first.bandwidth > 1e6
    assert expected > first.probe
    assert taken > 0
