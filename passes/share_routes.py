"""Pass 4: sites that take the selection of a site before them, which is then made once for all. Writes decisions alone.

Cross-layer routes: "You Only Index Once" (CLSA, arXiv 2606.06467), with a map of heads for models that were not trained for it.
"""

from __future__ import annotations

import dataclasses

from tsa_compile.passes.context import Context, Decision
from tsa_compile.passes.site import Route

SIZES = ("batch", "q_len", "k_len")  # that a shared selection rests on


def share_routes(context: Context) -> int:
    """Name the anchor of each replaced site that has one; returns how many. Where it cannot be, a warning has the reason."""
    shared = 0
    for n, decision in enumerate(context.decisions):
        route = context.route_for(decision.site)
        if route is None or decision.reason is not None:
            continue
        found = _anchor(context, decision, route)
        if isinstance(found, str):
            context.warnings.append(f"{decision.site.module or decision.at.node.name} selects by itself: {found}")
            continue
        context.decisions[n] = dataclasses.replace(decision, anchor=found, heads=route.heads)
        shared += 1
    return shared


def _anchor(context: Context, decision: Decision, route: Route) -> Decision | str:
    """The decision whose selection a site takes, or why it cannot."""
    site, policy = decision.site, decision.policy
    named = [d for d in context.decisions if route.is_anchor(d.site) and d.site.phase == site.phase]
    if len(named) != 1:
        return f"{route.name} is {len(named)} attentions of this graph" if named else f"{route.name} is not in this graph"
    anchor = named[0]
    if anchor.site.index >= site.index:
        return f"{route.name} does not come before it"
    if anchor.reason is not None:
        return f"{route.name} is not replaced: {anchor.reason}"
    if context.route_for(anchor.site) is not None:
        return f"{route.name} takes another's selection itself"
    if anchor.policy != policy or not policy.shareable:
        return (
            f"{route.name} has another policy" if anchor.policy != policy else f"{policy.name} makes no list that others can read"
        )
    same = context.facts.sizes.same
    different = [name for name in SIZES if not same(getattr(anchor.site, name), getattr(site, name))]
    different += ["mask"] if anchor.site.mask != site.mask else []
    if different:
        return f"{route.name} differs in {', '.join(different)}"
    return _wrong_heads(anchor, decision, route) or anchor


def _wrong_heads(anchor: Decision, decision: Decision, route: Route) -> str | None:
    a, b, heads = anchor.site, decision.site, route.heads
    if heads is None:
        return None if (a.heads, a.kv_heads) == (b.heads, b.kv_heads) else f"{route.name} has other heads, and no map is given"
    if b.phase == "prefill" and a.heads * b.kv_heads != b.heads * a.kv_heads:  # lists of query heads
        return f"{route.name} has other groups of query heads"
    fits = len(heads) == b.kv_heads and isinstance(a.kv_heads, int) and max(heads) < a.kv_heads
    return None if fits else f"the map {heads} does not fit {b.kv_heads} KV heads that read lists of {a.kv_heads}"
