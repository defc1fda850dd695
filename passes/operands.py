"""What a site reads, in the operators' form, emitted at the graph's insertion point."""

from __future__ import annotations

import functools
import operator

import torch
import torch.fx as fx

from tsa_compile.kernels.types import IDENTITY, KvView, Operands
from tsa_compile.passes.context import GraphSite
from tsa_compile.passes.facts.names import tensor
from tsa_compile.passes.mask_tensor import mask_tensor
from tsa_compile.passes.prove_mask.proven import KeyTerm

aten = torch.ops.aten
LAYOUT = "bhld"


def operands_of(graph: fx.Graph, at: GraphSite) -> Operands:
    """Nodes of q `[B, H, Lq, D]`, k `[B, Hk, K, D]`, v `[B, Hk, K, Dv]`, key_mask `[B, K]` bool or None.

    The queries are the last `Lq` of the `K` keys; `K` is `Lk`, or the part of it that any query sees. All have the
    output's dtype.
    """
    match, layouts = at.match, at.match.layouts
    used = _keys_used(graph, at)
    pairs = ((match.q, layouts.q), (match.k, layouts.k), (match.v, layouts.v))
    q, k, v = (_operand(graph, at.site.dtype, x, layout) for x, layout in pairs)
    if used is not None:
        k, v = (graph.call_function(aten.slice.Tensor, (x, 2, 0, used)) for x in (k, v))
    key_mask = _key_mask(graph, at, used)
    keys = 0 if at.mask.data is None else _size(graph, match.k, layouts.k.index("l"))
    view = _view(graph, key_mask) if at.mask.rows is None else KvView(None, 1, *at.mask.rows)
    return Operands(q, k, v, key_mask, view, mask_tensor(graph, at, keys), _sinks(graph, at))


def _operand(graph: fx.Graph, dtype: torch.dtype, x: fx.Node, layout: str) -> fx.Node:
    if tensor(x).dtype != dtype:
        x = graph.call_function(aten.to.dtype, (x, dtype))  # as autocast does
    order = [layout.index(d) for d in LAYOUT if d in layout]
    if order != sorted(order):
        x = graph.call_function(aten.permute.default, (x, order))
    return x if "h" in layout else graph.call_function(aten.unsqueeze.default, (x, LAYOUT.index("h")))


def _sinks(graph: fx.Graph, at: GraphSite) -> fx.Node | None:
    """`[H]`"""
    if at.sinks is None:
        return None
    x = at.sinks.node
    for dim in reversed(range(len(at.sinks.index))):
        if at.sinks.index[dim] is not None:
            x = graph.call_function(aten.select.int, (x, dim, at.sinks.index[dim]))
    return graph.call_function(aten.contiguous.default, (x,))


def _keys_used(graph: fx.Graph, at: GraphSite) -> fx.Node | int | None:
    used = at.mask.keys_used
    if used is None or isinstance(used, int):
        return used
    return _size(graph, at.match.q, at.match.layouts.q.index("l"))  # a symbolic number of keys is the number of queries


def _size(graph: fx.Graph, x: fx.Node, dim: int) -> fx.Node | int:
    size = tensor(x).shape[dim]
    return size if isinstance(size, int) else graph.call_function(aten.sym_size.int, (x, dim))


def _view(graph: fx.Graph, key_mask: fx.Node | None) -> KvView:
    """Where the real keys are; `rewrite_attention` leaves one such node for all sites with the same mask."""
    if key_mask is None:
        return IDENTITY
    both = graph.call_function(torch.ops.tsa.key_view.default, (key_mask,))
    return KvView.ordered(*(graph.call_function(operator.getitem, (both, i)) for i in range(2)))


def _key_mask(graph: fx.Graph, at: GraphSite, used: fx.Node | int | None) -> fx.Node | None:
    """All terms and-ed."""
    if not at.mask.key_mask:
        return None
    match, layouts = at.match, at.match.layouts
    batch = _size(graph, match.q, layouts.q.index("b"))
    keys = used if used is not None else _size(graph, match.k, layouts.k.index("l"))
    terms = [_term(graph, term, batch, keys) for term in at.mask.key_mask]
    return functools.reduce(lambda a, b: graph.call_function(aten.logical_and.default, (a, b)), terms)


def _term(graph: fx.Graph, term: KeyTerm, batch: fx.Node | int, keys: fx.Node | int) -> fx.Node:
    """One term as `[B, K]`."""
    x, axes = term.node, list(term.axes)
    for dim in reversed(range(len(axes))):
        if axes[dim][0] == "fixed":
            x = graph.call_function(aten.select.int, (x, dim, axes.pop(dim)[1]))
    for dim, (name, start) in enumerate(axes):
        x = _cut(graph, x, dim, start, batch if name == "batch" else keys)
    names = [name for name, _ in axes]
    if names == ["key", "batch"]:
        x = graph.call_function(aten.transpose.int, (x, 0, 1))
    for dim, name in enumerate(("batch", "key")):
        if name not in names:
            x = graph.call_function(aten.unsqueeze.default, (x, dim))
    if term.negated:
        x = graph.call_function(aten.logical_not.default, (x,))
    return graph.call_function(aten.expand.default, (x, [batch, keys]))


def _cut(graph: fx.Graph, x: fx.Node, dim: int, start: int, length: fx.Node | int) -> fx.Node:
    """`length` entries along a dimension, from `start` on."""
    if isinstance(length, int):
        return graph.call_function(aten.slice.Tensor, (x, dim, start, start + length))
    end = graph.call_function(operator.add, (length, start)) if start else length
    return graph.call_function(aten.slice.Tensor, (x, dim, start, end))
