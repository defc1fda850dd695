"""Mutation suite: no small change of a proven mask ever gives a wrong answer. Either it is seen and the site stays dense with a
reason, or what replaces the site computes the changed attention."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.passes.graphs import KEEP_ALL
from tests.passes.mutants import Mutant, all_mutants
from tests.passes.test_masks import HEADS, inputs, unpack
from tsa_compile.backend import Backend
from tsa_compile.plan import Plan


def eager(mutant: Mutant, x: Tensor, pad: Tensor) -> Tensor | None:
    """What the mutant computes; None: it is stillborn."""
    torch.manual_seed(0)
    try:
        return mutant.function()(*unpack(mutant.base, x), pad)
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError, NameError, OverflowError, ZeroDivisionError):
        return None


def compiled(mutant: Mutant, x: Tensor, pad: Tensor) -> tuple[Tensor, Backend, str]:
    """(result, backend with its report, text of the graph before the passes)"""
    torch._dynamo.reset()
    backend, graphs = Backend(Plan(KEEP_ALL), "eager"), []

    def traced(gm, inputs):
        graphs.append(gm.code)
        return backend(gm, inputs)

    function, base = mutant.function(), mutant.base
    torch.manual_seed(0)
    with torch.no_grad():
        result = torch.compile(lambda x, pad: function(*unpack(base, x), pad), backend=traced, fullgraph=True)(x, pad)
    return result, backend, "".join(graphs)


def decided_rows(mutant: Mutant, pad: Tensor) -> Tensor:
    """`[B, H, Lq]`: queries with more than three real keys; rows without any are left open, and a change may hide one more."""
    seen = pad.cumsum(-1)[:, mutant.base.past :] > (3 if mutant.base.padded else -1)
    return seen[:, None].expand(-1, HEADS, -1)


def living() -> list[tuple[Mutant, tuple[Tensor, Tensor], Tensor]]:
    """(mutant, inputs, expected result) of those that run."""
    found = []
    for mutant in all_mutants():
        torch.manual_seed(1)
        given = inputs(mutant.base)
        expected = eager(mutant, *given)
        if expected is not None and expected.shape == unpack(mutant.base, given[0])[0].shape:
            found.append((mutant, given, expected))
    return found


@pytest.mark.parametrize("examples", [80, pytest.param(240, marks=pytest.mark.slow)])
def test_no_mutant_gives_a_wrong_answer(examples):
    """The counts at the end say that the suite has teeth: how many graphs, and how many would be wrong were the change missed."""
    graphs, replaced, dense, unlike_the_base = set(), 0, 0, 0
    population = living()

    phases = [hypothesis.Phase.generate]  # there is nothing to shrink

    @hypothesis.settings(max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases)
    @hypothesis.given(st.sampled_from(population))
    def check(drawn: tuple[Mutant, tuple[Tensor, Tensor], Tensor]) -> None:
        nonlocal replaced, dense, unlike_the_base
        mutant, (x, pad), expected = drawn
        result, backend, text = compiled(mutant, x, pad)
        (site,) = backend.report.sites or [None]
        taken = site is not None and site.replaced
        if site is not None and not taken:
            assert site.reason
        rows = decided_rows(mutant, pad) if taken else torch.ones(expected.shape[:3], dtype=torch.bool)
        torch.testing.assert_close(result[rows], expected[rows], atol=2e-5, rtol=2e-5, equal_nan=True)
        if text not in graphs:
            graphs.add(text)
            replaced, dense = replaced + taken, dense + (not taken)
            base = mutant.base.function(*unpack(mutant.base, x), pad)[rows]
            unlike_the_base += not torch.allclose(base, expected[rows], atol=1e-3, equal_nan=True)

    check()
    print(f"{len(graphs)} graphs of {len(population)} mutants: {replaced} replaced, {dense} dense, {unlike_the_base} changed")
    assert len(graphs) >= examples * 5 / 6
    assert replaced >= examples / 8
    assert dense >= examples * 5 / 12
    assert unlike_the_base >= examples * 5 / 8
