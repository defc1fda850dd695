"""Pass 3: what happens to each site, and if nothing, why. Pure: reads sites, writes decisions."""

from __future__ import annotations

from tsa_compile.passes.context import Context, Decision
from tsa_compile.policies.base import why_dense


def decide_policy(context: Context) -> int:
    """Fill `context.decisions`; returns how many sites will be replaced."""
    for at in context.sites:
        policy = context.policy_for(at.site)
        context.decisions.append(Decision(at, policy, why_dense(policy, at.site)))
    return sum(d.reason is None for d in context.decisions)
