"""Remove what a replaced attention leaves without use: its mask, its repeated K and V, its scores.

`fx.Graph.eliminate_dead_code` would go over the whole graph, and it takes in-place methods for pure, such as the
`.index_copy_()` of a static cache. This goes backwards from the replaced nodes only and keeps every write that shows.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.fx as fx

from tsa_compile.passes.facts.mutation import may_alias_input, writes_to
from tsa_compile.passes.facts.names import op_name

_CHECKS = frozenset({"_assert_tensor_metadata"})
_IDLE_RANDOM = frozenset({"dropout"})  # only an inactive one gets here: active dropout is an obstacle


def erase_dead(graph: fx.Graph, roots: Iterable[fx.Node] = (), unused: Iterable[fx.Node] = ()) -> int:
    """Erase `roots`, those of `unused` that nothing reads or needs, and, backwards, all that only they used.

    Returns how many nodes went.
    """
    roots = set(roots)
    stack, erased = [*roots, *unused], set()
    while stack:
        node = stack.pop()
        if node in erased:
            continue
        checks = [u for u in node.users if op_name(u) in _CHECKS]
        if len(checks) < len(node.users) or not (node in roots or _erasable(node)):
            continue
        for dead in (*checks, node):
            inputs = dead.all_input_nodes
            graph.erase_node(dead)
            erased.add(dead)
            stack += inputs
    return len(erased)


def _erasable(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method", "get_attr"):
        return False
    written = writes_to(node)
    if written:
        return all(_private(x, node) for x in written)
    return op_name(node) in _IDLE_RANDOM or not node.is_impure()


def _private(x: fx.Node, reader: fx.Node) -> bool:
    """Is `x` memory that the graph made itself and that nothing but `reader` reads?"""
    if x.op not in ("call_function", "call_method") or set(x.users) != {reader}:
        return False
    return not may_alias_input(x) or all(_private(y, x) for y in x.all_input_nodes[:1])
