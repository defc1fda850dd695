"""Pass 4: swap each decided site for what its policy selects and attends."""

from __future__ import annotations

import dataclasses

import torch
import torch.fx as fx

from tsa_compile.passes.context import Context, Decision, Replacement
from tsa_compile.passes.emit import describe_new, emit_into
from tsa_compile.passes.facts.dead_code import erase_dead
from tsa_compile.passes.facts.names import tensor
from tsa_compile.passes.find.state import state_of
from tsa_compile.passes.layout import in_layout_of, layout_matters
from tsa_compile.passes.operands import LAYOUT, operands_of
from tsa_compile.passes.share_views import share_views


def rewrite_attention(context: Context) -> int:
    """Replace every site that has no reason against it; returns how many.

    From the last to the first, so that a site that reads another's output is rewritten while that output still stands.
    """
    for decision in reversed(context.decisions):
        if decision.reason is None:
            context.replacements.append(_replace(context, decision))
    if context.replacements:
        share_views(context.gm.graph, context.replacements)
        erase_dead(context.gm.graph, [r.at.node for r in context.replacements])
        context.gm.recompile()
    return len(context.replacements)


def _replace(context: Context, decision: Decision) -> Replacement:
    graph = context.gm.graph
    at, policy, old = decision.at, decision.policy, decision.at.node
    last_before = old.prev
    with graph.inserting_before(old):
        site, emit = dataclasses.replace(at.site, operands=operands_of(graph, at)), emit_into(graph)
        state = state_of(graph, at)
        new = policy.attend(emit, site, policy.select(emit, site, state))
        layout = LAYOUT
        if "h" not in at.match.layouts.out:
            new = graph.call_function(torch.ops.aten.squeeze.dim, (new, LAYOUT.index("h")))
            layout = LAYOUT.replace("h", "")
        if at.match.layouts.out != layout:
            order = [layout.index(d) for d in at.match.layouts.out]
            new = graph.call_function(torch.ops.aten.permute.default, (new, order))
    created = _described(last_before.next, old)
    if layout_matters(old, tensor(new), context.facts.sizes):
        last_before = old.prev
        with graph.inserting_before(old):
            new = in_layout_of(graph, new, old)
        created += _described(last_before.next, old)
    old.replace_all_uses_with(new)
    return Replacement(at, new, created, frozenset((state or {}).values()))


def _described(node: fx.Node, old: fx.Node) -> list[fx.Node]:
    """The nodes from `node` up to `old`, which get its origin and example values of their own."""
    created = []
    while node is not old:
        describe_new(node, old)
        created.append(node)
        node = node.next
    return created
