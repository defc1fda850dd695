"""Entries of tensors made from nothing: arange, full, tril."""

from __future__ import annotations

import sympy
import torch.fx as fx

from tsa_compile.passes.facts.names import arg, op_name, source, tensor, tensor_of
from tsa_compile.passes.facts.sizes import known_size, size_expr
from tsa_compile.passes.prove_mask.element import Elements, Index, Transfer, transfer
from tsa_compile.passes.prove_mask.formula import AtMostZero
from tsa_compile.passes.prove_mask.number import number
from tsa_compile.passes.prove_mask.values import Value, cast, select


@transfer("arange")
def _arange(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    bounds = [known_size(x) for x in node.args]
    if not bounds or "start" in node.kwargs or "step" in node.kwargs:
        return None
    start = bounds[0] if len(bounds) > 1 else sympy.Integer(0)
    step = bounds[2] if len(bounds) > 2 else sympy.Integer(1)
    return cast(number(start + step * index[0]), tensor(node).dtype)


def _filled(position: int, name: str, default: object = None) -> Transfer:
    def fn(elements: Elements, node: fx.Node, index: Index) -> Value | None:
        fill = default if default is not None else arg(node, position, name)
        example = tensor_of(fill)
        if example is not None and example.dim():
            return None
        value = elements.operand(fill, node, ())
        return None if value is None else cast(value, tensor(node).dtype)

    return fn


for _prefix in ("", "new_"):
    transfer(f"{_prefix}zeros")(_filled(0, "", 0))
    transfer(f"{_prefix}ones")(_filled(0, "", 1))
transfer("zeros_like")(_filled(0, "", 0))
transfer("ones_like")(_filled(0, "", 1))
transfer("full", "full_like")(_filled(1, "fill_value"))
transfer("new_full")(_filled(2, "fill_value"))
transfer("scalar_tensor", "tensor", "as_tensor")(_filled(0, "s"))


@transfer("tril", "triu")
def _triangle(elements: Elements, node: fx.Node, index: Index) -> Value | None:
    diagonal = size_expr(arg(node, 1, "diagonal", 0))
    dtype = tensor(node).dtype
    inside, outside = elements.entry(source(node), index), cast(number(0), dtype)
    if diagonal is None or outside is None:
        return None
    row, column = index[-2:]
    past = column - row - diagonal if op_name(node) == "tril" else row - column + diagonal
    return select(elements.settle(AtMostZero(sympy.expand(past))), inside, outside, dtype)
