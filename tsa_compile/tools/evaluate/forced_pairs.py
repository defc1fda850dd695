"""A plan of `BlockSparse` brought to a share of the pairs by one factor on all of its alphas."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tsa_compile.plan import Plan
from tsa_compile.policies.base import Policy
from tsa_compile.policies.block_sparse import BlockSparse

NEAR = 0.985
STEPS = 10
LARGEST = 0.999


def scaled(plan: Plan, factor: float) -> Plan:
    """The plan with alphas times `factor`, none above LARGEST; other policies stay."""

    def of(policy: Policy) -> Policy:
        if not isinstance(policy, BlockSparse):
            return policy
        numbers = policy.alpha if isinstance(policy.alpha, tuple) else (policy.alpha,)
        alpha = tuple(min(float(a) * factor, LARGEST) for a in numbers)
        return dataclasses.replace(policy, alpha=alpha if isinstance(policy.alpha, tuple) else alpha[0])

    rules = tuple(rule._replace(policy=of(rule.policy)) for rule in plan.rules)
    return dataclasses.replace(plan, prefill=None if plan.prefill is None else of(plan.prefill), rules=rules)


def force(plan: Plan, share: float, pairs: Callable[[Plan], float]) -> tuple[Plan, float]:
    """(The plan, the factor) that reads at most `share` of the pairs, and if bisection finds it at least NEAR of that.

    Args:
        pairs: what a plan reads.

    Raises:
        ValueError: even with the largest alphas it reads more.
    """
    low, high = 0.0, 1.0  # a factor that reads too much, and one that may do
    best: tuple[float, float] | None = None  # factor, pairs
    for _ in range(STEPS):
        factor = high if best is None else (low + best[0]) / 2
        read = pairs(scaled(plan, factor))
        if read > share:
            low, high = factor, 2 * factor
        elif best is None or read > best[1]:
            best = factor, read
        if best is not None and (best[1] >= NEAR * share or best[0] - low < 1e-6):
            break
    if best is None:
        raise ValueError(f"the plan reads {read:.4f} of the pairs with alphas {factor:g} times as large, more than {share:g}")
    return scaled(plan, best[0]), best[0]
