"""One name for one operation, be it `operator.add`, `aten.add.Tensor` or `.add()`; and access to nodes."""

from __future__ import annotations

import operator
import re
from typing import Any

import torch
import torch.fx as fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

_ALIASES = {
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "multiply": "mul",
    "subtract": "sub",
    "negative": "neg",
    "and_": "and",
    "__and__": "and",
    "bitwise_and": "and",
    "logical_and": "and",
    "or_": "or",
    "__or__": "or",
    "bitwise_or": "or",
    "logical_or": "or",
    "invert": "not",
    "inv": "not",
    "bitwise_not": "not",
    "logical_not": "not",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "_to_copy": "to",
    "type": "to",
    "_unsafe_view": "view",
    "unsafe_view": "view",
    "reshape": "view",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "bmm": "matmul",
    "sym_size": "size",
    "_shape_as_tensor": "shape",
}
_CASTS = frozenset({"float", "half", "bfloat16", "double", "bool", "long", "int"})
# Nodes that read or check a tensor's shape and dtype; they compute nothing from its values.
SHAPE_READERS = frozenset({"size", "dim", "_assert_tensor_metadata", "sym_numel", "numel"})
SAME_VALUE = frozenset({"contiguous", "clone", "alias", "detach", "detach_", "lift_fresh_copy", "lift_fresh", "lift"})


def op_name(node: object) -> str:
    """The operation's normalised name, such as "add" or "matmul"; "placeholder" for an input; "" for a non-node."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = _function_name(node.target)
    else:
        return node.op
    if name in _CASTS and node.op == "call_method":
        return "to"
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]  # `a.__eq__(b)`, as Dynamo traces comparisons in masks up to torch 2.12
    return _ALIASES.get(name, name)


def _function_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def describe(node: fx.Node) -> str:
    """The node for a message: its name and its operation."""
    return f"{node.name} ({op_name(node)})"


def arg(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def value_of(x: Any) -> Any:
    """The example value of a node (fake tensor, SymInt, number); anything else is returned as it is."""
    return x.meta.get("val", x.meta.get("example_value")) if isinstance(x, fx.Node) else x


def number_of(x: Any) -> Any:
    """The number that a node holds where Dynamo made a float an input, as with `dynamic=True`; anything else as it is.

    Reading it is a guard: for another number Dynamo compiles anew.
    """
    value = value_of(x)
    known = isinstance(x, fx.Node) and isinstance(value, torch.SymFloat) and not free_unbacked_symbols(value)
    return float(value) if known else x


class Unreadable(Exception):
    """A node is not what its reader knows; the message says what was seen."""


def tensor_of(x: Any) -> torch.Tensor | None:
    """The example tensor of a node, or None if it has none."""
    value = value_of(x)
    return value if isinstance(value, torch.Tensor) else None


def tensor(x: Any) -> torch.Tensor:
    """The example tensor of a node that has one.

    Raises:
        Unreadable: it has none.
    """
    value = tensor_of(x)
    if value is None:
        raise Unreadable(f"{x} has no example tensor")
    return value


def source(node: fx.Node) -> fx.Node:
    """The first argument of an operation on a tensor.

    Raises:
        Unreadable: it is no node, or given by name.
    """
    if not node.args or not isinstance(node.args[0], fx.Node):
        raise Unreadable(f"{describe(node)}: its first argument is no tensor of the graph")
    return node.args[0]


def dims_of(permute: fx.Node) -> list[int]:
    """The dimensions of a permute, given as one list or one by one."""
    dims = permute.args[1] if isinstance(permute.args[1], (tuple, list)) else permute.args[1:]
    if not all(isinstance(d, int) for d in dims):
        raise Unreadable(f"{describe(permute)}: its dimensions are not constants")
    return [d for d in dims if isinstance(d, int)]


def meta_key(node: fx.Node) -> str:
    """Where this graph keeps example values: "val" (torch.export) or "example_value" (Dynamo)."""
    return "val" if "val" in node.meta else "example_value"


def same_value(node: object) -> bool:
    """Does the node hand on its first argument unchanged, apart from memory layout?"""
    if not isinstance(node, fx.Node) or not node.args:
        return False
    if op_name(node) in SAME_VALUE:
        return True
    if op_name(node) != "to":
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    return before is not None and after is not None and before.dtype == after.dtype


def is_getitem(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is operator.getitem


def module_path(node: fx.Node) -> str:
    """The path of the innermost module a node was traced in, such as "model.layers.3.self_attn"; "" if unknown."""
    path = ""
    for entry in (node.meta.get("nn_module_stack") or {}).values():
        path = entry[0] if isinstance(entry, tuple) else path
    path = re.sub(r"^L\[[^\]]*\]", "", path)  # Dynamo: L['self'].model.layers.0
    path = re.sub(r"\[['\"]?([^\]'\"]*)['\"]?\]", r".\1", path)  # _modules['model'], layers[0]
    return ".".join(p for p in path.split(".") if p not in ("", "_modules", "_orig_mod"))
