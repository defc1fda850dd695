"""The gate on live rollouts: it trips by the tail of one bin, goes to the next schedule, then to exact, and says so."""

from __future__ import annotations

import logging

import pytest
import torch

import tsa_compile as tsa
from tsa_compile.learn.gate import schedule_plan
from tsa_compile.rl.rollout_gate import RolloutGate, tighter

MASK = torch.ones(2, 200, dtype=torch.bool)
POSITIONS = torch.arange(1900, 2100).expand(2, -1)  # two bins of 200 tokens each


def accepted(first: float, second: float) -> torch.Tensor:
    """A tenth of each bin's tokens are accepted so often, the others always."""
    tokens = torch.ones(2, 200)
    tokens[:, :10], tokens[:, 100:110] = first, second
    return tokens


def test_the_tail_of_one_bin_trips_it(caplog):
    gate = RolloutGate([(0,), (4,)], dense_layers=1)
    begin = gate.plan
    assert begin == schedule_plan((0,), 1)
    with caplog.at_level(logging.WARNING, "tsa_compile"):
        assert not gate.saw(accepted(0.9, 0.87), POSITIONS, MASK)
        assert gate.plan is begin
        assert gate.by_bin == {0: pytest.approx(0.9), 1: pytest.approx(0.87)}
        low = accepted(0.9, 0.5)
        assert low.mean() > 0.96  # the mean says nothing
        assert gate.saw(low, POSITIONS, MASK)
        assert gate.plan == schedule_plan((4,), 1)
        assert gate.saw(low, POSITIONS, MASK)
        assert gate.plan == tsa.Plan(prefill=tsa.Dense(), decode=tsa.Exact())
        assert not gate.saw(low, POSITIONS, MASK)  # there is nothing behind it
    assert gate.said == [m.removeprefix("rollouts: ") for m in caplog.messages]
    assert gate.said[0] == "positions 2000 to 3999: 5th percentile of acceptance 0.500 < 0.86: (0,) -> (4,)"
    assert gate.said[1].endswith("(4,) -> exact decode")


def test_padding_and_bins_of_few_tokens_do_not_count():
    gate = RolloutGate([(0,)], least=201)
    assert not gate.saw(accepted(0.1, 0.1), POSITIONS, MASK)
    assert gate.by_bin == {}
    gate = RolloutGate([(0,)])
    assert not gate.saw(accepted(0.1, 0.1), POSITIONS, accepted(0, 0).bool())
    assert gate.by_bin == {0: 1.0, 1: 1.0}
    assert not gate.saw(accepted(0.1, 0.1), POSITIONS, torch.zeros_like(MASK))


def test_published_schedules_from_a_name_on():
    assert tighter("sparrow-8b-0.86") == ("sparrow-8b-0.86", "sparrow-8b-0.87", "sparrow-8b-0.92")
    assert tighter("sparrow-14b-0.86") == ("sparrow-14b-0.86",)
    gate = RolloutGate("sparrow-8b-0.86")
    assert gate.plan.decode.schedule == gate.name == "sparrow-8b-0.86"
    for wrong, message in (
        (("sparrow",), "schedules must be one of"),
        (((),), "schedules must name at least one"),
        (("sparrow-8b-0.86", 0), r"threshold must be in \(0, 1\], got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            RolloutGate(*wrong)
    with pytest.raises(ValueError, match="least must be an int"):
        RolloutGate("sparrow-8b-0.86", least=0)
