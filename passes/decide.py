"""Pass 3: what happens to each site, and if nothing, why. Pure: reads sites, writes decisions."""

from __future__ import annotations

import dataclasses

from tsa_compile.passes.context import Context, Decision
from tsa_compile.passes.find.projected import why_not_projected
from tsa_compile.policies.why_dense import where_it_pays


def decide_policy(context: Context) -> int:
    """Fill `context.decisions`; returns how many sites will be replaced."""
    for at in context.sites:
        policy = context.policy_for(at.site)
        site, reason = where_it_pays(policy, at.site, context.pays_from(policy, at.site))
        if reason is None and policy.reads_projected(at.site):
            reason = why_not_projected(context, at)
        context.decisions.append(Decision(dataclasses.replace(at, site=site), policy, reason))
    return sum(d.reason is None for d in context.decisions)
