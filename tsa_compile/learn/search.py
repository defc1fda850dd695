"""Greedy order of the steps by what each costs alone, and the search for how many of them the target allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple


class Step(NamedTuple):
    """One layer goes to a higher coverage."""

    layer: str
    coverage: float


def greedy_order(alone: Mapping[Step, tuple[float, float]]) -> list[Step]:
    """Steps from the cheapest on: least loss for each further token that is not kept.

    Args:
        alone: (KL, sparsity) with this layer alone sparse at this coverage.

    Returns:
        Each layer's steps in ascending coverage, without those that a better jump passes over or that drop no further token.
    """
    reached: dict[str, tuple[float, float, float]] = {step.layer: (0.0, 0.0, 0.0) for step in alone}
    order: list[Step] = []
    while True:
        best: tuple[float, Step] | None = None
        for step, (kl, sparsity) in sorted(alone.items()):
            coverage, kl_now, sparsity_now = reached[step.layer]
            if step.coverage > coverage and sparsity > sparsity_now:
                price = max(kl - kl_now, 0.0) / (sparsity - sparsity_now)
                best = min(best or (price, step), (price, step))
        if best is None:
            return order
        step = best[1]
        reached[step.layer] = (step.coverage, *alone[step])
        order.append(step)


def drift_order(drift: Mapping[str, float], coverages: tuple[float, ...]) -> list[Step]:
    """The paper's order: layers by ascending drift, all at the first coverage, then all at the next."""
    return [Step(layer, c) for c in coverages for layer in sorted(drift, key=lambda n: (drift[n], n))]


def first_where(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The least n in (low, high] for which `holds`, by bisection, given that it holds for `high` and, from some n on, always."""
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def coverage_of(steps: list[Step]) -> dict[str, float]:
    """Layer -> coverage after these steps."""
    return {step.layer: step.coverage for step in steps}
