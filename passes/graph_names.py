"""One name for one operation, whatever the graph's level: operator.add, aten.add.Tensor and Tensor.add are all "add"."""

from __future__ import annotations

from typing import Any

import sympy
import torch
import torch.fx as fx

_ALIASES = {
    "truediv": "div", "divide": "div", "multiply": "mul", "iadd": "add", "imul": "mul", "isub": "sub", "subtract": "sub",
    "and_": "and", "bitwise_and": "and", "logical_and": "and", "__and__": "and", "iand": "and",
    "or_": "or", "bitwise_or": "or", "logical_or": "or", "__or__": "or", "ior": "or",
    "invert": "not", "inv": "not", "bitwise_not": "not", "logical_not": "not", "not_": "not",
    "less_equal": "le", "less": "lt", "greater_equal": "ge", "greater": "gt", "not_equal": "ne",
    "_softmax": "softmax", "_to_copy": "to", "type": "to", "type_as": "to", "float": "to", "half": "to", "bfloat16": "to",
    "bool": "to", "int": "to", "long": "to", "double": "to", "clone": "to", "contiguous": "to", "alias": "to", "detach": "to",
    "lift_fresh_copy": "to", "lift_fresh": "to", "view": "reshape", "_unsafe_view": "reshape", "view_as": "reshape",
    "bmm": "matmul", "mm": "matmul", "add_": "add", "mul_": "mul", "sub_": "sub", "div_": "div", "masked_fill_": "masked_fill",
    "negative": "neg", "t": "transpose", "swapaxes": "transpose", "swapdims": "transpose", "select": "select", "expand_as": "expand",
    "broadcast_to": "expand", "squeeze_": "squeeze", "unsqueeze_": "unsqueeze", "concat": "cat", "concatenate": "cat",
}  # fmt: skip
# Nodes that read a tensor's shape or check it: they do not compute with its values.
SHAPE_READERS = ("sym_size", "size", "_assert_tensor_metadata", "sym_numel", "dim")


def name_of(node: Any) -> str:
    """The canonical name of what a node computes; "placeholder", "get_attr" or "output" for the rest; "" for no node."""
    if not isinstance(node, fx.Node):
        return ""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = target.overloadpacket.__name__
        else:
            name = getattr(target, "__name__", str(target))
    else:
        return node.op
    return _ALIASES.get(name, name)


def value_of(x: Any) -> Any:
    """The example value of a node (Dynamo: "example_value", export: "val"); anything else is itself."""
    if not isinstance(x, fx.Node):
        return x
    return x.meta.get("example_value", x.meta.get("val"))


def is_tensor(x: Any) -> bool:
    return isinstance(value_of(x), torch.Tensor)


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def expression(x: Any) -> sympy.Expr | None:
    """An integer of the graph as a sympy expression; None if `x` is no integer."""
    x = value_of(x)
    if isinstance(x, torch.SymInt):
        return x.node.expr
    if isinstance(x, int) and not isinstance(x, bool):
        return sympy.Integer(x)
    return None


def shape_of(x: Any) -> tuple[sympy.Expr, ...]:
    """The shape of a node's tensor, as sympy expressions."""
    return tuple(sympy.sympify(expression(n)) for n in value_of(x).shape)


def is_zero(e: Any) -> bool:
    """Whether the expression is zero for every value of its symbols, provably."""
    return bool(sympy.expand(e) == 0) or bool(sympy.simplify(e) == 0)


def not_negative(e: Any) -> bool:
    """Whether the expression is at least zero for every value of its symbols (sizes are at least 1), provably."""
    e = sympy.expand(e)
    sizes = {s: sympy.Symbol(f"{s.name}_size", integer=True, positive=True) for s in e.free_symbols}
    return bool(e.subs(sizes).is_nonnegative)


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two tensors provably have the same shape."""
    x, y = shape_of(a), shape_of(b)
    return len(x) == len(y) and all(is_zero(m - n) for m, n in zip(x, y, strict=True))


def skip_copies(x: fx.Node) -> fx.Node:
    """The node before copies that change neither values nor dtype: contiguous, clone, detach, `to` the same dtype."""
    while name_of(x) == "to" and is_tensor(x.args[0]) and value_of(x).dtype == value_of(x.args[0]).dtype:
        x = x.args[0]
    return x


def skip_casts(x: fx.Node) -> fx.Node:
    """The node before copies and casts of dtype."""
    while name_of(x) == "to" and is_tensor(x.args[0]):
        x = x.args[0]
    return x
