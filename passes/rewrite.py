"""Pass 4: swap each decided site for what its policy lowers to."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor

from tsa_compile.passes.decide import Decision
from tsa_compile.passes.facts.dead_code import erase_dead
from tsa_compile.passes.facts.names import meta_key, value_of
from tsa_compile.passes.operands import LAYOUT

if TYPE_CHECKING:
    from tsa_compile.passes.pipeline import Context

_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node", "custom")


def rewrite_attention(context: Context) -> int:
    """Replace every site that has no reason against it; returns how many.

    From the last to the first, so that a site that reads another's output is lowered while that output still stands.
    """
    for decision in reversed(context.decisions):
        if decision.reason is None:
            context.replacements.append((decision, *_replace(context.gm.graph, decision)))
    if context.replacements:
        erase_dead(context.gm.graph, [d.site.node for d, _, _ in context.replacements])
        context.gm.recompile()
    return len(context.replacements)


def _replace(graph: fx.Graph, decision: Decision) -> tuple[fx.Node, list[fx.Node]]:
    """(the node that takes the site's place, all new nodes)"""
    site, old = decision.site, decision.site.node
    last_before = old.prev
    with graph.inserting_before(old):
        new = decision.policy.lower(graph, site)
        layout = LAYOUT
        if "h" not in site.layouts.out:
            new = graph.call_function(torch.ops.aten.squeeze.dim, (new, LAYOUT.index("h")))
            layout = LAYOUT.replace("h", "")
        if site.layouts.out != layout:
            order = [layout.index(d) for d in site.layouts.out]
            new = graph.call_function(torch.ops.aten.permute.default, (new, order))
    created = []
    node = last_before.next
    while node is not old:
        describe_new(node, old)
        created.append(node)
        node = node.next
    old.replace_all_uses_with(new)
    return new, created


def describe_new(node: fx.Node, old: fx.Node) -> None:
    """Give a new node the old one's origin, and the example value that its operator computes from its operands'."""
    node.meta.update({name: old.meta[name] for name in _ORIGIN if name in old.meta})
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    example = value_of(old)  # its own mode: the one being traced with may be another by now
    mode = example.fake_mode if isinstance(example, FakeTensor) else contextlib.nullcontext()
    with torch.no_grad(), mode:
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    node.meta[meta_key(old)] = value
    if "tensor_meta" in old.meta and isinstance(value, torch.Tensor):
        from torch.fx.passes.shape_prop import _extract_tensor_metadata

        node.meta["tensor_meta"] = _extract_tensor_metadata(value)
