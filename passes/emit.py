"""How passes put operators into a graph: `emit`, and what every new node carries."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
from torch._subclasses import FakeTensor

from tsa_compile.passes.facts.names import meta_key, value_of

_ORIGIN = ("nn_module_stack", "stack_trace", "source_fn_stack", "torch_fn", "from_node", "custom")


def emit_into(graph: fx.Graph) -> Callable[..., Any]:
    """The `emit` of a policy: puts a call of an operator at the graph's insertion point.

    Returns a node, or a tuple of nodes where the operator's schema has several results.
    """

    def emit(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(op, torch._ops.OpOverload):
            raise TypeError(f"emit calls operator overloads, such as torch.ops.aten.add.Tensor; got {op!r}")
        node = graph.call_function(op, args, kwargs)
        results = len(op._schema.returns)
        return node if results == 1 else tuple(graph.call_function(operator.getitem, (node, n)) for n in range(results))

    return emit


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

        known = all(isinstance(size, int) for size in value.shape)  # of a symbol it would be asked whether it is 1
        node.meta["tensor_meta"] = _extract_tensor_metadata(value, include_contiguity=known)
