"""Reachability: the exact form against boolean products, and the paper's statements about blocks, windows and bridges."""

import numpy as np
import pytest

from tsa_compile.kernels.edges import Edges
from tsa_compile.passes.check_reach import check_reach, depth_needed, never_connected


def adjacency(edges: Edges, n: int) -> np.ndarray:
    """[target, source] bool of one layer, the diagonal included."""
    a = np.eye(n, dtype=bool)
    for t in range(n):
        for first, last in edges.spans[t % edges.period]:
            a[t, max(0, t - last) : max(0, t - first + 1)] = True
    return a


def brute_force(layers: list[Edges], n: int) -> np.ndarray:
    reach = np.eye(n, dtype=bool)
    for edges in layers:
        reach = (adjacency(edges, n).astype(np.float32) @ reach.astype(np.float32)) > 0
    return reach


def random_edges(rng: np.random.Generator) -> Edges:
    def runs() -> tuple[tuple[int, int], ...]:
        firsts = rng.integers(0, 10, rng.integers(0, 3))
        return tuple((int(first), int(first + rng.integers(0, 5))) for first in firsts)

    period = int(rng.choice([1, 2, 3, 4, 6]))
    return Edges(period, tuple(runs() for _ in range(period)))


def test_the_mask_of_edges_is_their_adjacency() -> None:
    rng = np.random.default_rng(2)
    for edges in (*(random_edges(rng) for _ in range(50)), Edges.every(), Edges.none(), Edges.bridges(8, 3, 11, 5)):
        assert np.array_equal(edges.mask(19).numpy(), adjacency(edges, 19))


def test_the_exact_form_agrees_with_boolean_products_on_2000_random_patterns() -> None:
    n, rng = 52, np.random.default_rng(0)  # three layers go 39 back, and every phase of the common period (12) follows
    for _ in range(2000):
        layers = [random_edges(rng) for _ in range(rng.integers(1, 4))]
        reach, full = check_reach(layers, n), brute_force(layers, n)
        for t in range(n - 12, n):
            got = sum(1 << d for d in range(t + 1) if full[t, t - d])
            assert reach.by_depth[-1][t % reach.period] & ((1 << (t + 1)) - 1) == got


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_fixed_blocks_never_cross_a_boundary(depth: int) -> None:
    reach = check_reach([Edges.blocks(8)] * depth, 40)
    assert reach.hole() == (1, 0)
    assert reach.pair() == (7, 8)
    assert [reach.share(d) for d in range(9)] == [(8 - d) / 8 for d in range(9)]
    assert reach.depth(1) is None


@pytest.mark.parametrize(("width", "depth"), [(2, 1), (5, 3), (16, 4)])
def test_windows_reach_depth_times_width(width: int, depth: int) -> None:
    reach = check_reach([Edges.window(width)] * depth, 100)
    assert reach.hole() == (depth * (width - 1) + 1, 0)
    assert reach.depth(width - 1) == 1


def test_a_bridge_connects_neighbours_in_one_layer_and_all_blocks_with_depth() -> None:
    reach = check_reach([Edges.bridges(8, rows=2, sources=2)] * 5, 17)
    assert reach.depth(1) == 1
    assert reach.hole() is None  # (depth - 1) / 2 blocks back, from every phase
    assert check_reach([Edges.bridges(8, rows=2, sources=2)] * 4, 17).hole() is not None


def test_the_order_of_layers_counts() -> None:
    jump = Edges(4, (((4, 4),), (), (), ()))  # rows at phase 0 read four back
    step = Edges(4, ((), ((1, 1),), (), ()))  # rows at phase 1 read one back
    assert check_reach([jump, step], 8).connects(5, 1)  # first the jump, then the step: 1 <- 0 <- -4
    assert not check_reach([step, jump], 8).connects(5, 1)


def test_staggered_blocks_close_the_boundary_and_one_dense_layer_closes_everything() -> None:
    assert check_reach([Edges.blocks(8), Edges.blocks(8, offset=4)], 40).depth(1) == 2
    assert check_reach([Edges.blocks(8), Edges.every()], 4096).hole() is None


def test_long_windows_in_many_layers_take_moments() -> None:
    reach = check_reach([Edges.window(4096)] * 16 + [Edges.bridges(512, 64, 64)] * 16, 65_536)
    assert reach.hole() is None
    assert reach.depth(4095) == 1


def test_neighbours_that_never_connect_and_the_depth_that_is_needed_agree_with_the_distances() -> None:
    rng, never = np.random.default_rng(1), 0
    for _ in range(300):
        layers = [random_edges(rng) for _ in range(rng.integers(1, 4))]
        layers += [Edges.window(2)] * int(rng.integers(0, 2))
        deep = check_reach(layers * 40, 30)
        needed = depth_needed(layers, 30)
        if never_connected(layers) is None:
            assert deep.depth(29) == needed
        else:
            never += 1
            assert needed is None
            assert deep.hole() is not None
            assert deep.hole()[0] == 1
    assert 50 < never < 250


def test_the_depth_of_windows_and_bridges() -> None:
    assert depth_needed([Edges.window(5)], 4 * 7 + 1) == 7
    assert depth_needed([Edges.bridges(8, 2, 2)], 17) == 5
    assert depth_needed([Edges.blocks(8)], 1) == 0
    assert depth_needed([], 1) is None
    assert never_connected([Edges.blocks(8), Edges.blocks(8, 4)]) is None


def test_a_length_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        check_reach([Edges.every()], 0)
