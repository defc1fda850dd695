"""What a policy's `lower` needs of a site: the operands of the `tsa` operators, emitted into the graph."""

from __future__ import annotations

import functools
import operator

import torch
import torch.fx as fx

from tsa_compile.passes.graph_names import shape_of
from tsa_compile.passes.site import AttentionSite, KeyMask

aten = torch.ops.aten


def attention_operands(graph: fx.Graph, site: AttentionSite) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node | None]:
    """(q, k, v, key_mask) with queries at the last positions; key_mask is `[B, Lk]` bool, or None."""
    k, v = site.k, site.v
    used = None
    if site.mask.offset is not None:
        used = graph.call_function(operator.add, (_size(graph, site.q, 2), site.mask.offset))
        k, v = (graph.call_function(aten.slice.Tensor, (x, 2, 0, used)) for x in (k, v))
    masks = [_two_dims(graph, site, m, used) for m in site.mask.key_masks]
    if not masks:
        return site.q, k, v, None
    both = functools.partial(graph.call_function, aten.logical_and.default)
    return site.q, k, v, functools.reduce(lambda a, b: both((a, b)), masks)


def _two_dims(graph: fx.Graph, site: AttentionSite, mask: KeyMask, used: fx.Node | None) -> fx.Node:
    """A key mask of any rank as [B, Lk]."""
    rank = len(shape_of(mask.node))
    x = mask.node
    for dim in reversed(range(rank)):  # every other dim has size 1, or nothing varies along it
        if dim - rank not in (mask.key_dim, mask.batch_dim):
            x = graph.call_function(aten.select.int, (x, dim, 0))
    if mask.batch_dim is not None and mask.batch_dim > mask.key_dim:
        x = graph.call_function(aten.transpose.int, (x, 0, 1))
    if mask.batch_dim is None:
        x = graph.call_function(aten.unsqueeze.default, (x, 0))
    x = graph.call_function(aten.expand.default, (x, [_size(graph, site.q, 0), -1]))
    return x if used is None else graph.call_function(aten.slice.Tensor, (x, 1, 0, used))


def _size(graph: fx.Graph, x: fx.Node, dim: int) -> fx.Node | int:
    n = shape_of(x)[dim]
    return int(n) if n.is_number else graph.call_function(aten.sym_size.int, (x, dim))
