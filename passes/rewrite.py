"""Pass 6: swap each decided site for what its policy selects and attends."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.fx as fx

from tsa_compile.kernels.types import Selection
from tsa_compile.passes.context import Context, Decision, Replacement
from tsa_compile.passes.emit import describe_new, emit_into
from tsa_compile.passes.facts.dead_code import erase_dead
from tsa_compile.passes.facts.names import meta_key, tensor
from tsa_compile.passes.find.state import state_of
from tsa_compile.passes.keep_states import follow
from tsa_compile.passes.layout import in_layout_of, layout_matters
from tsa_compile.passes.operands import LAYOUT, operands_of
from tsa_compile.passes.share_views import share_views
from tsa_compile.passes.site import AttentionSite
from tsa_compile.policies.base import Emit


def rewrite_attention(context: Context) -> int:
    """Replace every site that has no reason against it; returns how many.

    From the last to the first, so that a site that reads another's output is rewritten while that output still stands.
    """
    selected: dict[int, _Selected] = {}
    for decision in reversed(context.decisions):
        if decision.reason is None:
            context.replacements.append(_replace(context, decision, selected))
    if context.replacements:
        share_views(context.gm.graph, context.replacements)
        erase_dead(context.gm.graph, [r.at.node for r in context.replacements])
        context.gm.recompile()
    return len(context.replacements)


@dataclasses.dataclass(frozen=True)
class _Selected:
    """What is emitted of a site before it is attended: its operands and selection, behind the node `last_before`."""

    last_before: fx.Node
    site: AttentionSite
    selection: Selection | None
    state: dict[str, Any] | None


def _select(context: Context, decision: Decision, selected: dict[int, _Selected]) -> _Selected:
    """The operands of a site and the keys that it reads: those of its anchor, which are emitted here if they were not yet."""
    graph, at, old = context.gm.graph, decision.at, decision.at.node
    if at.site.index in selected:
        return selected[at.site.index]
    shared = None if decision.anchor is None else _select(context, decision.anchor, selected).selection
    last_before = old.prev
    with graph.inserting_before(old):
        site, emit = dataclasses.replace(at.site, operands=operands_of(graph, at)), emit_into(graph)
        follow(graph, decision, site.operands.key_mask)
        state = state_of(graph, at)
        if decision.anchor is None:
            selection = decision.policy.select(emit, site, state)
        else:
            selection = _of_heads(emit, shared, decision.heads, decision.anchor.site)
    _described(last_before.next, old)
    selected[at.site.index] = found = _Selected(last_before, site, selection, state)
    return found


def _of_heads(emit: Emit, selection: Any, heads: tuple[int, ...] | None, anchor: AttentionSite) -> Any:
    """A selection whose KV head `g` has what KV head `heads[g]` of the given one has.

    Lists are the second dimension, where there is one: of KV heads, or of query heads, whose groups are mapped as they are.
    """
    if heads is None or heads == tuple(range(anchor.kv_heads)):
        return selection
    return type(selection)(
        *(x if tensor(x).dim() < 2 else _rows_of_heads(emit, x, heads, int(anchor.kv_heads)) for x in selection)
    )


def _rows_of_heads(emit: Emit, x: fx.Node, heads: tuple[int, ...], kv_heads: int) -> Any:
    group = int(tensor(x).shape[1]) // kv_heads
    heads = tuple(h * group + i for h in heads for i in range(group))
    return emit(torch.ops.aten.cat.default, [emit(torch.ops.aten.slice.Tensor, x, 1, h, h + 1) for h in heads], 1)


def _replace(context: Context, decision: Decision, selected: dict[int, _Selected]) -> Replacement:
    graph = context.gm.graph
    at, policy, old = decision.at, decision.policy, decision.at.node
    found = _select(context, decision, selected)
    last_before = found.last_before
    with graph.inserting_before(old):
        new = policy.attend(emit_into(graph), found.site, found.selection)
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
    return Replacement(at, new, created, frozenset(x for x in (found.state or {}).values() if isinstance(x, fx.Node)))


def _described(node: fx.Node, old: fx.Node) -> list[fx.Node]:
    """The nodes from `node` up to `old`, which get its origin and example values of their own, if they have none yet."""
    created = []
    while node is not old:
        if meta_key(old) not in node.meta:
            describe_new(node, old)
        created.append(node)
        node = node.next
    return created
