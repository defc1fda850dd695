"""Pass 3: what happens to each site, and if nothing, why. Pure: reads sites, writes decisions."""

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


_KINDS = {
    "causal": "causal mask: {policy} is for {masks} attention",
    "bidirectional": "bidirectional: no causal mask",
    "sliding window": "sliding window of {window}: already local",
}


def decide_policy(context: Context) -> int:
    """Fill `context.decisions`; returns how many sites will be replaced."""
    for site in context.sites:
        policy = context.policy_for(site)
        context.decisions.append(Decision(site, policy, dense_reason(site, policy) or policy.refuse(site)))
    return sum(d.reason is None for d in context.decisions)


def dense_reason(site: AttentionSite, policy: Policy) -> str | None:
    """What rules out `policy` before it is asked: the site, or a mask of a kind that the policy does not take."""
    if isinstance(site.q_len, int) and site.q_len == 1:
        return "decode step: one query"
    if site.obstacle is not None:
        return site.obstacle
    mask = site.mask
    if mask.unproven is not None:
        return mask.unproven
    if mask.kind in policy.masks:
        return None
    return _KINDS[mask.kind].format(policy=policy.name, masks=" or ".join(sorted(policy.masks)), window=mask.window)
