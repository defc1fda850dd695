"""Does it matter how a replaced attention's result lies in memory?

A graph was traced with the strides of its own attention: a `view` that fits them may fail for others, and `as_strided` reads
other entries. Most models transpose and copy the result at once, which makes any layout the same.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor

from tsa_compile.passes.facts.names import op_name, tensor, value_of
from tsa_compile.passes.facts.sizes import SizeProver

_MOST_STEPS = 64
_READERS = frozenset({"as_strided", "stride", "is_contiguous", "storage_offset", "data_ptr", "untyped_storage"})


def layout_matters(old: fx.Node, result: torch.Tensor, sizes: SizeProver) -> bool:
    """May the graph tell `result`, in the place of `old`, from what it was traced with? Shapes and dtypes are the same.

    Follows the result through the graph until the strides are those of the trace.
    """
    if _same_strides(tensor(old), result, sizes):
        return False
    example = tensor(old)
    mode = example.fake_mode if isinstance(example, FakeTensor) else contextlib.nullcontext()
    values: dict[fx.Node, Any] = {old: result}
    reached = set(old.users)
    with torch.no_grad(), mode:
        for node in old.graph.nodes:
            if node not in reached:
                continue
            if len(values) > _MOST_STEPS or node.op not in ("call_function", "call_method") or op_name(node) in _READERS:
                return True
            after = _computed(node, values)
            if after is None:
                return True
            if not _same_layout(value_of(node), after, sizes):
                values[node] = after
                reached |= set(node.users)
    return False


def in_layout_of(graph: fx.Graph, x: fx.Node, old: fx.Node) -> fx.Node:
    """A copy of `x` in the order of dimensions that `old` has in memory, at the graph's insertion point."""
    strides = tensor(old).stride()
    order = sorted(range(len(strides)), key=lambda d: -int(strides[d])) if _known(strides) else list(range(len(strides)))
    aten = torch.ops.aten
    if order != sorted(order):
        x = graph.call_function(aten.permute.default, (x, order))
    x = graph.call_function(aten.clone.default, (x,), {"memory_format": torch.contiguous_format})
    if order != sorted(order):
        x = graph.call_function(aten.permute.default, (x, [order.index(d) for d in range(len(order))]))
    return x


def _known(strides: Any) -> bool:
    return all(isinstance(s, int) for s in strides)


def _computed(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The node's example value for other operands; None: it cannot be computed for them."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: values[n] if n in values else value_of(n))
    try:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs) if callable(node.target) else None
    except (RuntimeError, ValueError, TypeError, AttributeError):  # such as a view that does not fit
        return None


def _same_layout(before: Any, after: Any, sizes: SizeProver) -> bool:
    if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
        return _same_strides(before, after, sizes)
    if isinstance(before, (tuple, list)) and isinstance(after, (tuple, list)):
        return all(_same_layout(a, b, sizes) for a, b in zip(before, after, strict=True))
    return not isinstance(after, torch.Tensor)


def _same_strides(before: torch.Tensor, after: torch.Tensor, sizes: SizeProver) -> bool:
    """Strides of dimensions of one entry say nothing."""
    if before.dim() != after.dim():
        return False
    pairs = zip(before.shape, before.stride(), after.stride(), strict=True)
    return all((isinstance(size, int) and size == 1) or sizes.same(a, b) for size, a, b in pairs)
