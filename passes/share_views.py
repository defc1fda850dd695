"""One view for all sites with the same mask: `key_view` or `padding_range`, and what it is made of, are alike in every layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from tsa_compile.passes.context import Replacement

_VIEWS = (torch.ops.tsa.key_view.default, torch.ops.tsa.padding_range.default)


def share_views(graph: fx.Graph, replacements: Sequence[Replacement]) -> int:
    """Of equal views keep the first in the graph's order, and none that nobody reads; returns how many nodes are gone.

    What sites emit is functional (`verify_graph` sees to it), and a mask that the graph writes to is not proven, so two nodes
    with the same target and operands have the same value.
    """
    created = {node for r in replacements for node in r.created}
    involved: set[fx.Node] = set()
    for view in [n for n in created if n.target in _VIEWS]:
        involved.update(view.users)
        stack = [view]
        while stack:
            node = stack.pop()
            involved.add(node)
            stack += [n for n in node.all_input_nodes if n in created]
    first: dict[Any, fx.Node] = {}
    ordered = [n for n in graph.nodes if n in involved]
    for node in ordered:
        kept = first.setdefault((node.target, _frozen(node.args), _frozen(node.kwargs)), node)
        if kept is not node:
            node.replace_all_uses_with(kept)
    unread = 0
    for node in reversed(ordered):
        if not node.users:
            graph.erase_node(node)
            unread += 1
    return unread


def _frozen(x: Any) -> Any:
    """Equal for equal operands: nodes compare by identity, numbers with their types."""
    if isinstance(x, dict):
        return tuple((k, _frozen(v)) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return tuple(_frozen(v) for v in x)
    return x if isinstance(x, fx.Node) else (type(x), x)
