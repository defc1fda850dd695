"""Reachability by boolean products: against paths counted one by one, against the periodic form, and in the order of layers."""

import numpy as np
import pytest
import torch

from tests.passes.test_check_reach import random_edges
from tsa_compile.kernels.edges import Edges
from tsa_compile.passes.check_reach import check_reach
from tsa_compile.passes.reach_masks import reach_of_masks


def by_sets(layers: list[torch.Tensor]) -> list[set[int]]:
    """The definition, with sets: R_l(t) = R_{l-1}(t) and R_{l-1}(s) of each s that t reads."""
    found = [{t} for t in range(layers[0].shape[0])]
    for mask in layers:
        found = [own.union(*(found[s] for s in mask[t].nonzero()[:, 0].tolist())) for t, own in enumerate(found)]
    return found


def test_lists_without_a_period() -> None:
    for _ in range(50):
        n = int(torch.randint(1, 24, ()))
        layers = [torch.rand(n, n) < 0.1 for _ in range(3)]
        got = reach_of_masks(layers)
        assert [set(row.nonzero()[:, 0].tolist()) for row in got] == by_sets(layers)


def test_periodic_edges_as_masks() -> None:
    rng = np.random.default_rng(4)
    for _ in range(100):
        layers = [random_edges(rng) for _ in range(3)]
        got, want = reach_of_masks([edges.mask(40) for edges in layers]), check_reach(layers, 40)
        for t in range(28, 40):
            assert all(bool(got[t, t - d]) == want.connects(d, t) for d in range(t + 1))


def test_the_order_of_layers_counts() -> None:
    jump, step = torch.zeros(2, 6, 6, dtype=torch.bool)
    jump[4, 0] = step[5, 4] = True
    assert reach_of_masks([jump, step])[5, 0]
    assert not reach_of_masks([step, jump])[5, 0]


def test_what_a_selection_chose_can_close_a_hole_that_nothing_guarantees() -> None:
    blocks = Edges.blocks(8).mask(24)
    chosen = blocks.clone()
    chosen[8, 7] = True
    assert not reach_of_masks([blocks] * 3)[20, 0]
    assert reach_of_masks([blocks, chosen, blocks])[15, 0]


@pytest.mark.parametrize(
    "layers", [[], [torch.ones(2, 3, dtype=torch.bool)], [torch.ones(2, 2)], [torch.ones(n, n, dtype=torch.bool) for n in (2, 3)]]
)
def test_bad_masks_are_refused(layers: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"layers must be bool \[n, n\] of one size"):
        reach_of_masks(layers)
