"""All that masks the scores of a few query rows as one tensor, emitted at the graph's insertion point."""

from __future__ import annotations

import functools
import math

import torch
import torch.fx as fx

from tsa_compile.passes.context import GraphSite
from tsa_compile.passes.facts.names import tensor
from tsa_compile.passes.prove_mask.source import MaskSource

aten = torch.ops.aten


def mask_tensor(graph: fx.Graph, at: GraphSite, keys: fx.Node | int) -> fx.Node | None:
    """Bool, or what is added to the scores, `[B or 1, H or 1, Lq or 1, Lk]`, of a site whose masks are taken as data; else None.

    Args:
        keys: `Lk`.
    """
    if at.mask.data is None:
        return None
    shown, added = [], []
    for source in at.mask.data:
        assert source.mask is not None
        x, example = _of_four(graph, source, "h" in at.match.layouts.q), tensor(source.mask)
        if example.dim() == 0 or example.shape[-1] == 1:
            x = graph.call_function(aten.expand.default, (x, [-1, -1, -1, keys]))
        if example.dtype == torch.bool:
            shown.append(graph.call_function(aten.logical_not.default, (x,)) if source.kind == "hide" else x)
        else:
            added.append(x if source.factor == 1.0 else graph.call_function(aten.mul.Scalar, (x, source.factor)))
    return _together(graph, shown, added)


def _together(graph: fx.Graph, shown: list[fx.Node], added: list[fx.Node]) -> fx.Node:
    """What all of `shown` show and all of `added` add; of one of them the tensor itself."""
    if len(added) > 1:  # in their own dtype the sum may round
        added = [graph.call_function(aten.to.dtype, (x, torch.float32)) for x in added]
    visible = functools.reduce(lambda a, b: graph.call_function(aten.logical_and.default, (a, b)), shown) if shown else None
    total = functools.reduce(lambda a, b: graph.call_function(aten.add.Tensor, (a, b)), added) if added else None
    if total is not None and visible is not None:
        return graph.call_function(aten.where.ScalarOther, (visible, total, -math.inf))
    both = visible if total is None else total
    assert both is not None
    return both


def _of_four(graph: fx.Graph, source: MaskSource, has_heads: bool) -> fx.Node:
    """A mask with all four dimensions, those of the operands."""
    x = source.mask
    assert x is not None
    rank = 4 if has_heads or source.split is not None else 3
    for _ in range(rank - tensor(source.mask).dim()):
        x = graph.call_function(aten.unsqueeze.default, (x, 0))
    if source.split is not None:
        batch, heads = source.split
        x = graph.call_function(aten.expand.default, (x, [batch if isinstance(batch, int) else -1, heads, -1, -1]))
        x = graph.call_function(aten.flatten.using_ints, (x, 0, 1))
    return x if has_heads else graph.call_function(aten.unsqueeze.default, (x, 1))
