"""Pass 2: what happens to each site, and if nothing, why. Pure: reads sites, writes decisions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Policy

if TYPE_CHECKING:
    from tsa_compile.passes.pipeline import Context


@dataclasses.dataclass(frozen=True)
class Decision:
    """A site, its policy, and the reason why it stays dense; None: it is replaced."""

    site: AttentionSite
    policy: Policy
    reason: str | None


def decide_policy(context: Context) -> int:
    """Fill `context.decisions`; returns how many sites will be replaced."""
    for site in context.sites:
        policy = context.policy_for(site)
        context.decisions.append(Decision(site, policy, _dense_reason(site) or policy.refuse(site)))
    return sum(d.reason is None for d in context.decisions)


def _dense_reason(site: AttentionSite) -> str | None:
    """What rules out any policy: the operators are for causal prefill."""
    if isinstance(site.q_len, int) and site.q_len == 1:
        return "decode step: one query"
    if site.obstacle is not None:
        return site.obstacle
    if site.mask.unproven is not None:
        return site.mask.unproven
    if not site.mask.causal:
        return "bidirectional: no causal mask"
    if site.mask.window is not None:
        return f"sliding window of {site.mask.window}: already local"
    return None
