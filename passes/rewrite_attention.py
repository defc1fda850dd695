"""Pass 3: swap each decided site for what its policy lowers to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor, FakeTensorMode

from tsa_compile.passes.decide_policy import Decision
from tsa_compile.passes.graph_names import value_of
from tsa_compile.passes.mutation import is_impure
from tsa_compile.passes.verify_graph import check_result

if TYPE_CHECKING:
    from tsa_compile.passes.pipeline import Context


def rewrite_attention(context: Context) -> int:
    """Replace every site without a reason against it; returns how many were."""
    graph, replaced = context.gm.graph, 0
    for decision in context.decisions:
        if decision.reason is None:
            _replace(graph, decision)
            replaced += 1
    if replaced:
        graph.eliminate_dead_code(is_impure)
        context.gm.recompile()
    return replaced


def _replace(graph: fx.Graph, decision: Decision) -> None:
    old, before = decision.site.node, set(graph.nodes)
    with graph.inserting_before(old):
        new = decision.policy.lower(graph, decision.site)
        if value_of(old).dtype != value_of(decision.site.q).dtype:
            new = graph.call_function(torch.ops.aten.to.dtype, (new, value_of(old).dtype))
    for node in graph.nodes:
        if node not in before:
            _fill_meta(node, old)
    check_result(old, new)
    old.replace_all_uses_with(new)
    graph.erase_node(old)


def _fill_meta(node: fx.Node, old: fx.Node) -> None:
    """Give a new node the old one's origin, and its example value by running it on fakes."""
    key = "val" if "val" in old.meta else "example_value"
    for name in ("nn_module_stack", "stack_trace", "source_fn_stack"):
        if name in old.meta:
            node.meta[name] = old.meta[name]
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    mode = _fake_mode(value_of(old))
    if mode is None:
        node.meta[key] = node.target(*args, **kwargs)
        return
    with mode, torch.no_grad():
        node.meta[key] = node.target(*args, **kwargs)


def _fake_mode(x: Any) -> FakeTensorMode | None:
    return x.fake_mode if isinstance(x, FakeTensor) else None
