"""What models have that Torch-TensorRT 2.14 converts wrongly or not at all, written so that it does. Passes work in place."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx

aten = torch.ops.aten


def drop_empty_operands(gm: fx.GraphModule, settings: Any = None) -> fx.GraphModule:
    """`cat` without operands of shape `[0]`, to which transformers' caches append their first keys.

    PyTorch skips them whatever the others' rank; Torch-TensorRT's converter wants one rank.
    """
    for node in gm.graph.find_nodes(op="call_function", target=aten.cat.default):
        operands, *dim = node.args
        kept = [x for x in operands if not _is_empty(gm, x)]
        if len(kept) == 1:
            node.replace_all_uses_with(kept[0])
            gm.graph.erase_node(node)
        elif kept:
            node.args = (kept, *dim)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


def _is_empty(gm: fx.GraphModule, node: fx.Node) -> bool:
    value = getattr(gm, str(node.target), None) if node.op == "get_attr" else node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dim() == 1 and isinstance(value.shape[0], int) and value.shape[0] == 0


def count_from_the_front(gm: fx.GraphModule, settings: Any = None) -> fx.GraphModule:
    """Slices of a dynamic dimension that start at its end, `x[:, -1:]`, start at a position: the size less that number.

    Where another dimension is dynamic too, Torch-TensorRT's converter starts that one behind its end.
    """
    for node in gm.graph.find_nodes(op="call_function", target=aten.slice.Tensor):
        x, dim, start, *rest = (*node.args, 0, 0)[: max(3, len(node.args))]
        value = x.meta.get("val")
        if not isinstance(value, torch.Tensor) or isinstance(value.shape[dim], int) or not isinstance(start, int) or start >= 0:
            continue
        with gm.graph.inserting_before(node):
            size = gm.graph.call_function(aten.sym_size.int, (x, dim))
            first = gm.graph.call_function(operator.add, (size, start))
        size.meta["val"] = value.shape[dim]
        first.meta["val"] = value.shape[dim] + start
        node.args = (x, dim, first, *rest)
    gm.recompile()
    return gm
